"""Score slices: load the translators of a chain, print the cost, run the cycle, and compute error maps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from datasets.brats2021 import BraTS2021Dataset
from datasets.loader import all_slices
from datasets.records import read_lesion_flags, read_preprocessing
from evaluation.metrics import scored_region
from evaluation.results import HEALTHY, REFERENCE, Part, Parts, divide
from evaluation.subjects import subject_of
from guided_diffusion import checkpoint, dist_util
from models import load_method
from models.cycle import Cycle, anomaly_score, error_floor
from models.training import bytes_a_sample, weight_bytes
from utils.cli import UserError
from utils.device import autocast, available_memory, pick_precision, require_memory, speed_up_passes

from .chain import Chain, network_name

GPU_BATCH = 512  # network samples at a time, memory permitting: more are hardly faster (docs/speed.md)


class Scorer:
    """The loaded translators of a chain.

    Raises:
        UserError: if the config describes no valid network or diffusion, or the weights do not match it.
    """

    def __init__(self, chain: Chain, device: torch.device):
        self.config, self.device = chain.config, device
        self.method = load_method(chain.model_name)
        self.precision = pick_precision(self.config.precision, device)
        self.reference = chain.reference
        self.score_kind = self.method.score_kind(self.config)
        self.samples = 0  # that `print_cost` announced
        try:
            self.forward = self._load(chain, "forward", lambda: self.samples * self.steps)
            self.backward = self._load(chain, "backward", lambda: self.samples) if chain.backward else nn.Identity()
        except ValueError as error:
            raise UserError(str(error)) from error
        self.batch_size = self.config.score_model.sampling.batch_size
        if device.type == "cuda":  # out of memory, `in_batches` halves it
            self.batch_size = max(self.batch_size, GPU_BATCH)
        else:  # out of memory, the process would be killed
            sample = bytes_a_sample(self.method, self.config) * self.precision.itemsize // 4
            # Without gradients, a pass takes a fifth to a seventh.
            require_memory(device, sample // 8, "a network pass of one slice", "data.image_size")
            self.batch_size = max(1, min(self.batch_size, available_memory() // max(1, sample)))
        self.steps = self.method.count_steps(self.forward)
        self.passes_per_sample = self.steps + bool(chain.backward)

    def _load(self, chain: Chain, direction: str, samples: Callable[[], int]) -> Any:
        """Return the translator of a direction; `samples()` will pass through its network."""
        method, translator = load_method(network_name(chain.model_name, direction)), chain.translators[direction]
        n_bytes, setting = weight_bytes(method, translator.config), "score_model.model.model_channels"
        require_memory(self.device, n_bytes, f"the network of {translator.checkpoint}", setting)
        network = method.create_network(translator.config.score_model)
        load_weights(network, translator.checkpoint)
        network = speed_up_passes(network, self.device, self.precision, samples)
        return method.create_translator(network, translator.config)

    def count_passes(self, brainmask: Tensor) -> int:
        """Return the number of network passes for slices with these brain masks [N, 1, H, W]."""
        return self.method.count_samples(brainmask, self.forward, self.config) * self.passes_per_sample

    def cycle(self, image: Tensor, brainmask: Tensor, reference: Tensor, desc: str = "scoring") -> Cycle:
        """Run the cycle on slices [N, 1, H, W], with a progress bar over network passes; return it on the CPU.

        The output is compared with `reference`, the same slices in the modality `self.reference`. With several
        processes, each computes its share of the slices, and all of them return the complete cycle.
        """
        share = dist_util.shard(len(image))
        image, reference = (slices[share].to(self.device) for slices in (image, reference))
        brainmask = brainmask[share]
        passes = self.count_passes(brainmask)
        look = {"unit": "pass", "unit_scale": True, "dynamic_ncols": True, "disable": dist_util.rank() > 0}
        with autocast(self.device, self.precision), tqdm(total=passes, desc=desc, **look) as bar:
            options = {
                "batch_size": self.batch_size,
                "progress": lambda samples: bar.update(samples * self.passes_per_sample),
                "reference": reference,
            }
            cycle = self.method.cycle(image, brainmask, self.forward, self.backward, self.config, **options)
        shares = dist_util.gather(Cycle(*(field.cpu() for field in cycle)))
        return Cycle(*(torch.cat(field) for field in zip(*shares, strict=True)))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a bare state dict into `network`.

    Raises:
        UserError: if the file is damaged, is not a state dict of finite floats, or belongs to another network.
    """
    try:
        state = checkpoint.read_state(path)
        for name, weights in state.items():
            if not weights.is_floating_point():
                raise TypeError(f"{name} holds {weights.dtype}")
            if not weights.isfinite().all():
                raise TypeError(f"{name} holds weights that are not finite")
        network.load_state_dict(state)
    except (checkpoint.UnreadableError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not fit the network in the config ({checkpoint.reason(error)})") from error


def print_cost(scorer: Scorer, *brainmasks: Tensor) -> dict[str, Any]:
    """Print the cost of scoring slices with these brain masks [N, 1, H, W], and return it for metrics.json.

    The scorer then compiles its networks if so many samples repay it.
    """
    passes = sum(map(scorer.count_passes, brainmasks))
    scorer.samples = passes // scorer.passes_per_sample // dist_util.world_size()
    precision = str(scorer.precision).removeprefix("torch.")
    print(f"{passes:,} network passes, on {dist_util.world_size()} × {scorer.device.type} in {precision}")
    if scorer.steps > 1:
        samples, back = passes // scorer.passes_per_sample, scorer.passes_per_sample - scorer.steps
        print(f"({samples:,} {scorer.method.samples_are} × {scorer.steps} steps forward and {back} back)")
    sampling = scorer.method.sampling_name(scorer.config)
    if scorer.device.type == "cpu" and sampling and not sampling.startswith("fast"):
        print("this takes long on a CPU: --sampling fast makes far fewer passes")
    return {"precision": precision, "network_passes": passes}


def create_maps(
    scorer: Scorer, slices: Mapping[str, Parts[dict]], add: Callable[[str, Part], None], voxel_size: list | None = None
) -> dict[str, Any]:
    """Compute the error maps of each split's slices, part by part.

    Args:
        scorer: the loaded chain.
        slices: batches by split, as from `load_slices`.
        add: called with the split and the maps of each part, arrays [n, H, W] by name.
        voxel_size: of the slices, to be recorded.

    Returns:
        The cost and the constants of the maps, for metrics.json.
    """
    cost = print_cost(scorer, *(batch["brainmask"] for parts in slices.values() for batch in parts))
    cost |= {"score": scorer.score_kind, "voxel_size": voxel_size}
    # The first part fixes the error floor: preferably of val, and of train only if there is no other.
    for split in sorted(slices, key=lambda split: (split != "val", split == "train")):
        for i, batch in enumerate(slices[split]):
            image, reference, brainmask = batch[scorer.config.data.input], batch[scorer.reference], batch["brainmask"]
            count = f", part {i + 1} of {len(slices[split])}" if len(slices[split]) > 1 else ""
            cycle = scorer.cycle(image, brainmask, reference, f"scoring {split}{count}")
            if "usual_error" not in cost:
                scored = torch.from_numpy(scored_region(brainmask[:, 0].numpy()))[:, None]
                cost["usual_error"] = error_floor(reference, cycle, scored & ~batch["seg"])
            scores = anomaly_score(reference, cycle, scorer.score_kind, cost["usual_error"])
            images = {"image": image, "truth": batch["seg"], "brainmask": brainmask, "scores": scores}
            if scorer.reference != scorer.config.data.input:
                images[REFERENCE] = reference
            images |= {field: getattr(cycle, field) for field in ("translation", "reconstruction", "variance")}
            maps = {key: value[:, 0].numpy() for key, value in images.items()}
            add(split, maps | {"names": batch["name"], HEALTHY: batch[HEALTHY]})
    return cost


def maps_in_memory(scorer: Scorer, slices: Mapping[str, Parts[dict]]) -> tuple[dict[str, list[Part]], dict[str, Any]]:
    """Return the parts of the error maps of each split, and their cost, as `create_maps` does."""
    maps: dict[str, list[Part]] = {split: [] for split in slices}
    cost = create_maps(scorer, slices, lambda split, part: maps[split].append(part))
    return maps, cost


def kinds_to_load(chain: Chain) -> list[str]:
    """Return the kinds of images that scoring loads for each slice."""
    return [*dict.fromkeys((chain.config.data.input, chain.reference)), "seg", "brainmask"]


def voxel_size(chain: Chain) -> list[float] | None:
    """Return the voxel size of the slices in mm, along the slice axis, the height and the width; None if unknown."""
    grid = read_preprocessing(Path(chain.config.data.data_dir))["grid"]
    if grid is None:
        return None
    (height, width), (*sizes, depth) = grid["shape"], grid["spacing"]
    scale = [n / chain.config.data.image_size for n in (height, width)]
    return [float(depth), *(float(mm * factor) for mm, factor in zip(sizes, scale, strict=True))]


def load_slices(chain: Chain, split: str, limit: int | None = None) -> Parts[dict] | None:
    """Return the slices of a split, as batches of whole subjects, or at most `limit` slices, evenly spaced.

    Returns:
        The batches, loaded one at a time, with `healthy` beside each slice: whether its subject has no lesion anywhere.
        None if there are no validation or training slices.

    Raises:
        UserError: if there are no test slices, a modality is missing, or (when loaded) no slice of a batch has brain.
    """
    data, first = chain.config.data, dist_util.rank() == 0
    if split != "test" and not any(Path(data.data_dir, split).glob("*/*.npy")):
        if split == "val":
            print(f"no validation slices in {data.data_dir}: only the oracle threshold is reported")
        return None
    where = (data.data_dir, split, kinds_to_load(chain), data.image_size)
    dataset = BraTS2021Dataset(*where, progress=first, keep=False)
    names = [files["name"] for files in dataset.files]
    parts = divide(names)
    if limit and limit < len(dataset):
        parts = [[i * len(dataset) // limit for i in range(limit)]]
    lesions = read_lesion_flags(Path(data.data_dir))

    def load(i: int) -> dict:
        batch = all_slices(Subset(dataset, parts[i]))
        if not batch["brainmask"].any():
            raise UserError(f"{data.data_dir}/{split} has no brain (every brain mask is 0): preprocess again")
        subjects = [subject_of(name) for name in batch["name"]]
        seen = {name for name, lesion in zip(subjects, batch["seg"], strict=True) if lesion.any()}
        return batch | {HEALTHY: np.array([not lesions.get(name, False) and name not in seen for name in subjects])}

    return Parts(load, len(parts), dataset.fingerprint)

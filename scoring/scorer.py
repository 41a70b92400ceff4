"""Slices through the cycle of two trained translators: their anomaly scores, what these cost, and how far they are."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm import tqdm

from datasets.brats2021 import BraTS2021Dataset
from datasets.loader import all_slices
from evaluation.metrics import scored_region
from evaluation.results import REFERENCE
from guided_diffusion import checkpoint, dist_util
from models import load_method
from models.cycle import Cycle, anomaly_score, error_floor
from models.training import bytes_a_sample
from utils.cli import UserError
from utils.device import autocast, available_memory, compile_if_it_pays, pick_precision, speed_up

from .chain import Chain, network_of


class Scorer:
    """The translators of a chain, loaded: turns slices of any number into anomaly scores.

    A UserError for a config that no network or diffusion can be made of, or weights that do not fit it.
    """

    def __init__(self, chain: Chain, device: torch.device):
        self.config, self.device = chain.config, device
        self.method = load_method(chain.model_name)
        self.precision = pick_precision(self.config.precision, device)
        self.reference = chain.reference
        self.score_kind = self.method.score_kind(self.config)
        try:
            self.networks = {direction: load_network(chain, direction, device) for direction in chain.translators}
            self.forward = self.method.create_translator(self.networks["forward"], self.config)
            self.backward = nn.Identity()
            if chain.backward:
                method = load_method(network_of(chain.model_name, "backward"))
                self.backward = method.create_translator(self.networks["backward"], chain.backward.config)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.batch_size = self.config.score_model.sampling.batch_size
        if device.type == "cpu":  # too large a batch would get the process killed; on a GPU, in_batches handles it
            fitting = available_memory() // max(1, bytes_a_sample(self.method, self.config))
            self.batch_size = max(1, min(self.batch_size, fitting))
        self.steps = self.method.count_steps(self.forward)
        self.passes_a_sample = self.steps + bool(chain.backward)

    def passes(self, brainmask: Tensor) -> int:
        """Return the number of network passes that slices with these brain masks [N, 1, H, W] take."""
        return self.method.count_samples(brainmask, self.forward, self.config) * self.passes_a_sample

    def cycle(self, image: Tensor, brainmask: Tensor, reference: Tensor, desc: str = "scoring") -> Cycle:
        """The cycle of slices [N, 1, H, W], on the CPU, behind a progress bar over the network passes.

        Its end is compared with `reference`, the same slices in the modality that `self.reference` names. Of several
        processes each makes its share of the slices, and all get the whole.
        """
        share = dist_util.share(len(image))
        image, reference = (slices[share].to(self.device) for slices in (image, reference))
        brainmask = brainmask[share]
        for network in self.networks.values():
            compile_if_it_pays(network, self.device, self.passes(brainmask) // self.batch_size)
        shown = {"unit": "pass", "unit_scale": True, "dynamic_ncols": True, "disable": dist_util.rank() > 0}
        with autocast(self.device, self.precision), tqdm(total=self.passes(brainmask), desc=desc, **shown) as bar:
            how = {
                "batch_size": self.batch_size,
                "progress": lambda samples: bar.update(samples * self.passes_a_sample),
                "reference": reference,
            }
            cycle = self.method.cycle(image, brainmask, self.forward, self.backward, self.config, **how)
        shares = dist_util.gather(Cycle(*(field.cpu() for field in cycle)))
        return Cycle(*(torch.cat(field) for field in zip(*shares, strict=True)))


def load_network(chain: Chain, direction: str, device: torch.device) -> nn.Module:
    """Return the trained network of one direction on the device; errors as from `Scorer`."""
    found = chain.translators[direction]
    network = load_method(network_of(chain.model_name, direction)).create_network(found.config.score_model)
    load_weights(network, found.checkpoint)
    return speed_up(network.eval(), device, training=False)


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a bare state dict into `network`.

    A UserError if the file is damaged, is no state dict of finite floats, or fits another network.
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
        raise UserError(
            f"{path} does not fit the network that the config describes ({checkpoint.reason(error)})"
        ) from error


def announce(scorer: Scorer, *brainmasks: Tensor) -> dict[str, Any]:
    """Say what it costs to score slices with these brain masks [N, 1, H, W]; the same for metrics.json."""
    passes = sum(map(scorer.passes, brainmasks))
    precision = str(scorer.precision).removeprefix("torch.")
    print(f"{passes:,} network passes, on {dist_util.world_size()} × {scorer.device.type} in {precision}")
    if scorer.steps > 1:
        samples, back = passes // scorer.passes_a_sample, scorer.passes_a_sample - scorer.steps
        print(f"({samples:,} {scorer.method.samples_are} × {scorer.steps} steps forward and {back} back)")
    if scorer.device.type == "cpu" and (hint := scorer.method.cpu_hint(scorer.config)):
        print(hint)
    return {"precision": precision, "network_passes": passes}


def create_maps(scorer: Scorer, slices: dict[str, dict]) -> tuple[dict[str, dict], dict[str, Any]]:
    """Error maps, arrays [N, H, W] by name, of the slices of every split; and what they cost."""
    cost = announce(scorer, *(batch["brainmask"] for batch in slices.values())) | {"score": scorer.score_kind}
    maps = {}
    # The first one says what an error is usual: validation slices, or else those of any other split but training.
    for split in sorted(slices, key=lambda split: (split != "val", split == "train")):
        batch = slices[split]
        image, reference, brainmask = (
            batch[kind] for kind in (scorer.config.data.input, scorer.reference, "brainmask")
        )
        cycle = scorer.cycle(image, brainmask, reference, f"scoring {split}")
        if "usual_error" not in cost:
            scored = torch.from_numpy(scored_region(brainmask[:, 0].numpy()))[:, None]
            cost["usual_error"] = error_floor(reference, cycle, scored & ~batch["seg"])
        scores = anomaly_score(reference, cycle, scorer.score_kind, cost["usual_error"])
        images = {"image": image, "truth": batch["seg"], "brainmask": brainmask, "scores": scores}
        if scorer.reference != scorer.config.data.input:
            images[REFERENCE] = reference
        images |= {"translation": cycle.translation, "reconstruction": cycle.reconstruction, "variance": cycle.variance}
        maps[split] = {key: value[:, 0].numpy() for key, value in images.items()} | {"names": batch["name"]}
    return maps, cost


def kinds_scored(chain: Chain) -> list[str]:
    """What scoring reads of each slice."""
    return [*dict.fromkeys((chain.config.data.input, chain.reference)), "seg", "brainmask"]


def load_slices(chain: Chain, split: str, most: int | None = None) -> dict | None:
    """Load the slices of a split as one batch, at most `most` of them, spread evenly.

    Returns:
        The batch, or None if there are no validation slices, which is printed, or no training slices.

    Raises:
        UserError: if there are no test slices, or not of the modalities that are scored.
    """
    data, first = chain.config.data, dist_util.rank() == 0
    if split != "test" and not any(Path(data.data_dir, split).glob("*/*.npy")):
        if split == "val":
            print(f"no validation slices in {data.data_dir}: only the oracle threshold can be shown")
        return None
    where = (data.data_dir, split, kinds_scored(chain), data.image_size)
    dataset = BraTS2021Dataset(*where, processes=dist_util.local_world_size(), progress=first)
    if most and most < len(dataset):
        dataset = Subset(dataset, [i * len(dataset) // most for i in range(most)])
    return all_slices(dataset)

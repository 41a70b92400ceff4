"""Slices through the cycle of two trained translators: their anomaly scores, what these cost, and how far they are."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from datasets.brats2021 import BraTS2021Dataset
from datasets.loader import all_slices
from guided_diffusion import checkpoint, dist_util
from models.build import create_masked_translator, create_network
from models.cycle import Cycle, cyclic_unet, mmccd, slices_and_bands
from models.masks import sweep
from utils.cli import UserError
from utils.device import autocast, in_batches, pick_precision, speed_up

from .chain import Chain, sampling_name


class Scorer:
    """Both translators of a cycle, loaded: turns slices of any number into anomaly scores.

    Raises:
        UserError: a config that no network or diffusion can be made of, or weights that do not fit it.
    """

    def __init__(self, chain: Chain, device: torch.device):
        self.config, self.device = chain.config, device
        self.batch_size = self.config.score_model.sampling.batch_size
        self.precision = pick_precision(self.config.precision, device)
        self.masked_translator = None  # Cyclic UNet has none
        self.networks = []
        try:
            for name, found in ((chain.model_name, chain.forward), ("unet", chain.backward)):
                network = create_network(name, found.config.score_model.model)
                load_weights(network, found.checkpoint)
                self.networks.append(speed_up(network.eval(), device, training=False))
            if chain.model_name == "diffusion":
                self.masked_translator = create_masked_translator(self.networks[0], self.config)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.bands = sweep(self.config.data.image_size, self.config.score_model.sampling.stride)
        steps = self.masked_translator.diffusion.num_timesteps if self.masked_translator else 1
        self.passes_a_sample = steps + 1  # forward, and one back

    def samples(self, brainmask: Tensor) -> list[int]:
        """How many samples each slice of these brain masks [N, 1, H, W] takes: one, or one for each band."""
        if not self.masked_translator:
            return [1] * len(brainmask)
        taken = Counter(i for i, _ in slices_and_bands(brainmask, self.masked_translator, self.bands))
        return [taken[i] for i in range(len(brainmask))]

    def score(self, image: Tensor, brainmask: Tensor, progress: Callable[[int], None]) -> Cycle:
        """The cycle of slices [N, 1, H, W], on the CPU; `progress` is told of network passes made.

        Of several processes each makes its share of the slices, and all get the whole.
        """

        def made(samples: int) -> None:
            progress(samples * self.passes_a_sample)

        share = dist_util.share(len(image))
        image, brainmask = image[share].to(self.device), brainmask[share].to(self.device)
        with autocast(self.device, self.precision):
            if self.masked_translator:
                cycle = mmccd(
                    image,
                    brainmask,
                    self.masked_translator,
                    self.networks[1],
                    bands=self.bands,
                    batch_size=self.batch_size,
                    average=self.config.score_model.sampling.average,
                    progress=made,
                )
            else:
                parts = [Cycle(*(image[:0],) * 3)]  # a process may have no slices
                in_batches(
                    lambda batch: parts.append(cyclic_unet(batch, *self.networks)),
                    image,
                    self.batch_size,
                    made,
                )
                cycle = Cycle(*(torch.cat(field) for field in zip(*parts, strict=True)))
        shares = dist_util.gather(Cycle(*(field.cpu() for field in cycle)))
        return Cycle(*(torch.cat(field) for field in zip(*shares, strict=True)))


def load_weights(network: nn.Module, path: Path) -> None:
    """Load a bare state dict into `network`.

    Raises:
        UserError: the file is damaged, is no state dict, or fits another network.
    """
    try:
        network.load_state_dict(checkpoint.read_state(path))
    except (checkpoint.UnreadableError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the network that the config describes ({checkpoint.reason(error)})"
        ) from error


def create_maps(scorer: Scorer, slices: dict[str, dict]) -> tuple[dict[str, dict], dict[str, Any]]:
    """Error maps, arrays [N, H, W] by name, of the slices of every split; and what they cost."""
    taken = [scorer.samples(batch["brainmask"]) for batch in slices.values()]  # by every slice of each split
    cost = announce(scorer, taken)
    maps = {}
    with progress_bar(scorer, taken) as bar:
        for split, batch in slices.items():
            image = batch[scorer.config.data.input]
            cycle = scorer.score(image, batch["brainmask"], bar.update)
            images = {
                "image": image,
                "translation": cycle.translation,
                "reconstruction": cycle.reconstruction,
                "scores": cycle.score,
                "truth": batch["seg"],
                "brainmask": batch["brainmask"],
            }
            maps[split] = {
                "names": batch["name"],
                **{key: value[:, 0].numpy() for key, value in images.items()},
            }
    return maps, cost


def announce(scorer: Scorer, taken: list[list[int]]) -> dict[str, Any]:
    """Say what it costs to score batches of slices that take so many samples each; the same for metrics.json."""
    samples = sum(map(sum, taken))
    passes = samples * scorer.passes_a_sample
    cost = {"precision": str(scorer.precision).removeprefix("torch."), "network_passes": passes}
    print(
        f"{passes:,} network passes, on {dist_util.world_size()} × {scorer.device.type} in {cost['precision']}"
    )
    if scorer.masked_translator:
        print(
            f"({samples:,} slices with a band hidden × {scorer.passes_a_sample - 1} steps forward and 1 back)"
        )
        if scorer.device.type == "cpu" and sampling_name(scorer.config) != "fast":
            print("that takes long on a CPU: --sampling fast makes far fewer")
    return cost


def progress_bar(scorer: Scorer, taken: list[list[int]], desc: str = "scoring") -> tqdm:
    """A bar over the network passes of this process's share of the slices, shown by the first process."""
    samples = sum(sum(batch[dist_util.share(len(batch))]) for batch in taken)
    shown = {"desc": desc, "unit": "pass", "unit_scale": True, "dynamic_ncols": True}
    return tqdm(total=samples * scorer.passes_a_sample, disable=dist_util.rank() > 0, **shown)


def kinds_scored(config: Any) -> list[str]:
    """What scoring reads of each slice."""
    return [config.data.input, "seg", "brainmask"]


def load_slices(config: Any, split: str) -> dict | None:
    """All slices of a split as one batch; None, with a word about it, if there are no validation slices.

    Raises:
        UserError: there are no test slices, or not of the input modality.
    """
    if split == "val" and not any(Path(config.data.data_dir, split).glob("*/*.npy")):
        print(f"no validation slices in {config.data.data_dir}: only the oracle threshold can be shown")
        return None
    return all_slices(
        BraTS2021Dataset(
            config.data.data_dir,
            split,
            kinds_scored(config),
            config.data.image_size,
            processes=dist_util.local_world_size(),
            progress=dist_util.rank() == 0,
        )
    )

"""Checkpoint selection: of all saved weights, those with the highest validation AUPRC."""

from collections.abc import Iterator

import torch

from evaluation.evaluate import Pixels
from evaluation.metrics import RIM, average_precision
from evaluation.report import score_functions, scored
from evaluation.results import Parts
from guided_diffusion.checkpoint import EMA_PREFIX, list_checkpoints
from utils.cli import UserError
from utils.storage import Folder

from .chain import Chain
from .scorer import Scorer, maps_in_memory

WEIGHT_PREFIXES = {"EMA": EMA_PREFIX, "raw": "model"}  # of the checkpoints' file names


def best_on_validation(chain: Chain, experiments: Folder, slices: Parts | None, device: torch.device) -> Chain:
    """Return the chain with the highest validation AUPRC among the EMA and raw weights of all saved steps.

    Args:
        chain: with the newest checkpoints.
        experiments: folder of their experiments.
        slices: validation slices from `load_slices`.
        device: to score on.

    Raises:
        UserError: if there are no validation slices.
    """
    if slices is None:
        raise UserError(f"--select validation needs validation slices, but {chain.config.data.data_dir} has none")
    results = {}
    for name, candidate in candidate_chains(chain, experiments):
        maps = maps_in_memory(Scorer(candidate, device), {"val": slices})[0]["val"]
        published = score_functions(chain.config.score_model.sampling.smooth, 1, {})["scores"]
        results[name] = average_precision(*Pixels(scored(maps, published), RIM).pooled), candidate
        print(f"{name}: validation AUPRC {results[name][0]:.3f}")
    best = max(results, key=lambda name: results[name][0])
    print(f"chosen: {best}")
    return results[best][1]


def candidate_chains(chain: Chain, experiments: Folder) -> Iterator[tuple[str, Chain]]:
    """Yield (description, chain) of every saved step, oldest first, with backward weights of the same step if saved."""
    folders = {direction: one.checkpoint.parent for direction, one in chain.translators.items()}
    for folder in folders.values():
        experiments.pull(folder.name, "model*.pt", "ema_*.pt")
    for kind, prefix in WEIGHT_PREFIXES.items():
        weights = {direction: list_checkpoints(folder, prefix) for direction, folder in folders.items()}
        for step, name in weights["forward"].items():
            forward = chain.forward._replace(checkpoint=folders["forward"] / name)
            backward = chain.backward
            if backward and step in weights["backward"]:
                backward = backward._replace(checkpoint=folders["backward"] / weights["backward"][step])
            yield f"{kind} weights of step {step:,}", chain._replace(forward=forward, backward=backward)

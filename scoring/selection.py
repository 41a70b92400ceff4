"""Which checkpoint of each translator to test: the one that finds most on the validation slices."""

from collections.abc import Iterator

import torch

from evaluation.metrics import average_precision, ranked_scores
from evaluation.scores import smooth_scores
from guided_diffusion.checkpoint import EMA, saved
from utils.cli import UserError
from utils.storage import Folder

from .chain import Chain
from .scorer import Scorer, create_maps

KINDS = {"EMA": EMA, "raw": "model"}  # of weights, and how the names of their files begin


def best_on_validation(chain: Chain, experiments: Folder, slices: dict | None, device: torch.device) -> Chain:
    """The chain with the checkpoints, averaged or raw weights of any saved step, of the highest validation AUPRC.

    Two translators are taken from the same step as far as both have saved it; otherwise the backward one stays.

    Args:
        chain: with the newest checkpoints.
        experiments: where theirs lie.
        slices: the validation slices as from `load_slices`.
        device: to score on.

    A UserError if there are no validation slices.
    """
    if slices is None:
        raise UserError(f"--select validation needs validation slices, and {chain.config.data.data_dir} has none")
    found = {}
    for name, candidate in candidates(chain, experiments):
        maps, _ = create_maps(Scorer(candidate, device), {"val": slices})
        maps = maps["val"]
        scores = smooth_scores(maps["scores"], chain.config.score_model.sampling.smooth)
        found[name] = average_precision(*ranked_scores(scores, maps["truth"], maps["brainmask"])), candidate
        print(f"{name}: validation AUPRC {found[name][0]:.3f}")
    best = max(found, key=lambda name: found[name][0])
    print(f"chosen: {best}")
    return found[best][1]


def candidates(chain: Chain, experiments: Folder) -> Iterator[tuple[str, Chain]]:
    """Chains with the weights of every saved step, oldest first, by what to call them."""
    folders = {direction: one.checkpoint.parent for direction, one in chain.translators.items()}
    for folder in folders.values():
        experiments.pull(folder.name, "model*.pt", "ema_*.pt")
    for kind, prefix in KINDS.items():
        weights = {direction: saved(folder, prefix) for direction, folder in folders.items()}
        for step, name in weights["forward"].items():
            forward = chain.forward._replace(checkpoint=folders["forward"] / name)
            backward = chain.backward
            if backward and step in weights["backward"]:
                backward = backward._replace(checkpoint=folders["backward"] / weights["backward"][step])
            yield f"{kind} weights of step {step:,}", chain._replace(forward=forward, backward=backward)

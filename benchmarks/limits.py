"""What limits MMCCD: where the cyclic error of trained translators comes from, on validation slices.

    python benchmarks/limits.py --data_dir ./datasets/phantom200 --logdir experiments/learning_curve/seed0

Validation slices have both modalities, so each half of the cycle can be held against the truth: the forward translator
under its band against the true target, and the backward one with the true target put in. Mean squared errors of healthy
and of lesion pixels say what is imagined well, and the AUPRC and Dice of each error as a score what that is worth.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import print_table
from benchmarks.tradeoff import accuracy
from scoring.chain import Chain, chain_parser, find_chain, require_same_preprocessing
from utils.cli import UserError, parse_run_args, run
from utils.storage import open_folder

DRAWS = 3  # of the noise, each with a seed of its own


def main() -> None:
    args, overrides = parse_args()

    from datasets.brats2021 import BraTS2021Dataset
    from datasets.loader import all_slices
    from utils.device import pick_device

    with open_folder(args.logdir) as experiments:
        chain = find_chain(args, overrides, experiments)
    config = chain.config
    require_same_preprocessing(chain, Path(config.data.data_dir))
    kinds = [config.data.input, config.data.trans, "seg", "brainmask"]
    slices = all_slices(BraTS2021Dataset(config.data.data_dir, "val", kinds, config.data.image_size))
    print(f"forward:  {chain.forward.checkpoint}\nbackward: {chain.backward.checkpoint}\n")
    errors = cycle_errors(chain, slices, pick_device(args.gpu_id))
    print_table(
        ["mean squared error", "healthy", "lesion", "lesion / healthy", "AUPRC", "oracle Dice"],
        [[name, *describe(error, slices)] for name, error in errors.items()],
    )
    print("\nof the scored region; AUPRC and Dice take the error as the score, those of B need both modalities")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(__doc__.splitlines()[0])
    parser.set_defaults(model_name="diffusion", dataset="phantom", sampling="fast")
    args, overrides = parse_run_args(parser)
    if args.model_name != "diffusion":
        raise UserError("it is MMCCD that is taken apart: leave --model_name out")
    return args, overrides


def cycle_errors(chain: Chain, slices: dict, device: Any) -> dict[str, Any]:
    """Squared errors [N, 1, H, W] by what they are of. A is the input modality, B the target, f and b the translators.

    A sweep gives of every pixel the mean over bands of what is reconstructed, and the mean of its squared error; what
    the second exceeds the error of the mean by is the variance of the draws.
    """
    import torch

    from scoring.scorer import Scorer

    config = chain.config.copy_and_resolve_references()
    config.score_model.sampling.average = "errors"
    image, target = slices[config.data.input], slices[config.data.trans]
    draws = []
    for draw in range(DRAWS):
        config.seed = chain.config.seed + draw
        scorer = Scorer(chain._replace(forward=chain.forward._replace(config=config)), device)
        draws.append(scorer.score(image, slices["brainmask"], f"draw {draw + 1} of {DRAWS}"))
    backward = scorer.networks[1]
    scorer.networks[1] = torch.nn.Identity()  # the half of the cycle: its "reconstruction" is B
    half = scorer.score(image, slices["brainmask"], "the half of it")
    with torch.inference_mode():
        from_truth = backward(target.to(device)).float().cpu()

    reconstructions = torch.stack([draw.reconstruction for draw in draws])
    scatter_of_b = half.score - (image - half.reconstruction).square()
    scatter_of_a = draws[0].score - (image - draws[0].reconstruction).square()
    return {
        "B − f(A), a draw": (target - half.reconstruction).square() + scatter_of_b,
        "B − f(A), mean of the bands": (target - half.reconstruction).square(),
        "variance of f(A) over bands": scatter_of_b,
        "A − b(B), the true target": (image - from_truth).square(),
        "A − b(f(A)), a draw": draws[0].score,
        "A − b(f(A)), mean of the bands": (image - draws[0].reconstruction).square(),
        f"A − b(f(A)), mean of {DRAWS} sweeps": (image - reconstructions.mean(0)).square(),
        "variance of b(f(A)) over bands": scatter_of_a,
        f"variance of the mean over {DRAWS} sweeps": reconstructions.var(0),
    }


def describe(error: Any, slices: dict) -> list[str]:
    """The cells of a row: mean over healthy and over lesion pixels, their ratio, and the error as a score."""
    import torch

    from evaluation.metrics import scored_region

    scored = torch.from_numpy(scored_region(slices["brainmask"][:, 0].numpy()))[:, None]
    lesion = slices["seg"]
    healthy, sick = (error[scored & part].mean().item() for part in (~lesion, lesion))
    auprc, dice = accuracy(error, slices)
    return [f"{healthy:.3f}", f"{sick:.3f}", f"{sick / healthy:.1f}", f"{auprc:.3f}", f"{dice:.3f}"]


if __name__ == "__main__":
    run(main)

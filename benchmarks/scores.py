"""How MMCCD finds the most: scores, smoothings, steps, bands, their widths and both inputs, over three seeds.

    python benchmarks/scores.py --data_dir ./datasets/phantom

For every seed it trains with modality_cyclic_train.py: a UNet in both directions, which serve either input, and a
masked diffusion for each input and width. The slices are swept once with each sampling; all scores and smoothings come
from that sweep.
Interrupted, the same command resumes: training from its checkpoints, scoring from the CSV. --test names other cohorts
to test on.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.points import Row, over_seeds, read_points, run_training, write_points
from benchmarks.shared.timing import print_table
from scoring.chain import Chain, chain_parser, find_chain
from utils.cli import ArgumentParser, UserError, run
from utils.storage import Folder

CYCLES = (("flair", "t2"), ("t2", "flair"))  # input, trans


class Point(NamedTuple):
    """One score of the slices of a split of a cohort."""

    cohort: str
    split: str
    input: str
    method: str  # unet or diffusion
    width: int  # px of a band; 0 for the UNet
    steps: str  # respacing of the timesteps; none for the UNet
    bands: int  # of the sweep, in the width of one; 0 for the UNet
    seed: int
    score: str
    smooth: str


COLUMNS = ("passes", "auprc", "oracle_dice", "validation_dice")


def main() -> None:
    args = parse_args()
    trainings = [
        training
        for seed in args.seeds
        for training in (
            *((seed, "unet", "flair", "t2", process, 0) for process in ("forward", "backward")),
            *((seed, "diffusion", *cycle, "forward", width) for cycle in CYCLES for width in args.widths),
        )
    ]
    with ThreadPoolExecutor(args.workers) as pool:
        from tqdm import tqdm

        done = pool.map(lambda training: train(args, *training), trainings)
        list(tqdm(done, total=len(trainings), desc="training", unit="network"))

    rows = read_points(args.csv, Point, COLUMNS)
    diffusions = [("diffusion", width, *sampling) for width in args.widths for sampling in args.samplings]
    for seed, cycle, method in product(args.seeds, CYCLES, [("unet", 0, "none", 0), *diffusions]):
        for cohort in (args.data_dir, *args.test):
            if not any(p[0] == cohort.name and p[2:8] == (cycle[0], *method, seed) for p in rows):
                rows |= dict(measure(args, cohort, seed, *cycle, *method))
                write_points(args.csv, Point, COLUMNS, rows)
    show(rows)
    print(f"\n{args.csv}")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_dir", type=Path, default=Path("datasets/phantom"), help="slices to train, choose and test on")
    add("--test", type=Path, nargs="*", default=[], help="more folders of slices, whose test slices are scored too")
    add("--gpu_id", default="0", help="number of the CUDA device, or cpu")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, data order and noise; one run each")
    add("--widths", type=int, nargs="+", default=[4, 8], help="of the bands that are trained with, px")
    samplings = "DDIM steps, and how many bands of the sweep lie in the width of one, as STEPS:BANDS"
    add("--samplings", type=steps_and_bands, nargs="+", default=[("trailing2", 4)], help=samplings)
    add("--iterations", type=int, default=1200, help="training steps of each network")
    workers = "trainings at a time, with one thread each if several"
    add("--workers", type=int, default=os.cpu_count() or 1, help=workers)
    add("--logdir", type=Path, default=Path("experiments/scores"), help="folder of all these trainings")
    add("--csv", type=Path, default=Path("experiments/scores.csv"), help="points measured")
    args = parser.parse_args()
    if args.iterations < 1 or args.workers < 1:
        raise UserError("--iterations and --workers must be at least 1")
    return args


def steps_and_bands(text: str) -> tuple[str, int]:
    """STEPS and BANDS of a sampling; a ValueError, as argparse expects, for anything else."""
    steps, bands = text.split(":")
    return steps, int(bands)


def train(
    args: argparse.Namespace, seed: int, model_name: str, input: str, trans: str, process: str, width: int
) -> None:
    """Bring one training to its end; one that has ended already is left as it is."""
    flags = [
        *("--dataset=phantom", f"--data_dir={args.data_dir}", f"--gpu_id={args.gpu_id}", f"--seed={seed}"),
        *(f"--model_name={model_name}", f"--training_process={process}", f"--input={input}", f"--trans={trans}"),
        *(f"--logdir={logdir(args, seed, width)}", f"--config.score_model.training.iterations={args.iterations}"),
        *([f"--config.score_model.mask.width={width}"] if width else []),
    ]
    run_training(f"{model_name} of seed {seed}", *flags, one_thread=args.workers > 1)


def logdir(args: argparse.Namespace, seed: int, width: int) -> Path:
    """Experiments of a seed; the diffusions of a width lie in a folder of their own."""
    return args.logdir / f"seed{seed}" / (f"width{width}" if width else "")


def measure(
    args: argparse.Namespace,
    cohort: Path,
    seed: int,
    input: str,
    trans: str,
    method: str,
    width: int,
    steps: str,
    bands: int,
) -> Iterator[tuple[Point, Row]]:
    """Every score of one cycle, on the validation and test slices of a cohort; passes are those of a slice."""
    from config import SCORING, sampling_keys
    from evaluation.metrics import smooth_scores
    from models.cycle import anomaly_score
    from scoring.scorer import Scorer, create_maps, load_slices
    from utils.device import pick_device

    chain = chain_of(args, cohort, seed, input, trans, method, width)
    if method == "diffusion":
        chain.config.update_from_flattened_dict(sampling_keys(steps, bands, "standardised", "none", width))
    slices = {split: load_slices(chain, split) for split in ("val", "test")}
    if slices["val"] is None:
        raise UserError(f"{cohort} has no validation slices: preprocess some")
    maps, cost = create_maps(Scorer(chain, pick_device(args.gpu_id)), slices)
    passes = cost["network_passes"] / sum(len(batch["seg"]) for batch in slices.values())
    for score, smooth in product(SCORING["score"] if method == "diffusion" else ["errors"], SCORING["smooth"]):
        scores = {
            split: smooth_scores(anomaly_score(*cycle_of(group), score, cost["usual_error"]).numpy(), smooth)
            for split, group in maps.items()
        }
        for split in maps:
            row = {"passes": passes, **accuracy(scores, maps, split)}
            yield Point(cohort.name, split, input, method, width, steps, bands, seed, score, smooth), row


def chain_of(
    args: argparse.Namespace, cohort: Path, seed: int, input: str, trans: str, method: str, width: int
) -> Chain:
    """The translators of a cycle. The UNets are trained for FLAIR as the input, and change places for T2."""
    unets = [f"unet_{process}_phantom_t2_flair" for process in ("forward", "backward")]
    forward, backward = unets if input == "flair" else reversed(unets)
    folder = logdir(args, seed, 0)
    if method == "diffusion":
        forward = f"{logdir(args, seed, width).name}/diffusion_forward_phantom_{trans}_{input}"
    from scoring.chain import newest_ema

    checkpoints = [newest_ema(Folder(folder), name) for name in (forward, backward)]
    flags = [
        *("--dataset=phantom", f"--data_dir={cohort}", f"--input={input}", f"--trans={trans}", f"--seed={seed}"),
        *(f"--model_name={method}",),
        *(f"--checkpoint_{side}={path}" for side, path in zip(("forward", "backward"), checkpoints, strict=True)),
    ]
    return find_chain(chain_parser("").parse_args(flags), [], Folder(folder))


def cycle_of(group: dict) -> tuple[Any, Any]:
    """The image and the cycle that error maps hold: the mean error is (A − m)² + v."""
    import torch

    from models.cycle import Cycle

    image, translation, reconstruction, variance = (
        torch.from_numpy(group[key]) for key in ("image", "translation", "reconstruction", "variance")
    )
    return image, Cycle((image - reconstruction) ** 2 + variance, translation, reconstruction, variance)


def accuracy(scores: dict[str, Any], maps: dict[str, dict], split: str) -> Row:
    """AUPRC, and Dice at the oracle's and the validation slices' threshold."""
    from evaluation.metrics import average_precision, best_threshold, cut_scores, overlap_at, ranked_scores

    cut = {key: cut_scores(scores[key], maps[key]["brainmask"]) for key in maps}
    truth = {key: maps[key]["truth"] for key in maps}
    threshold, _ = best_threshold(cut["val"], truth["val"])
    return {
        "auprc": average_precision(*ranked_scores(scores[split], truth[split], maps[split]["brainmask"])),
        "oracle_dice": best_threshold(cut[split], truth[split])[1],
        "validation_dice": float(overlap_at(cut[split], truth[split], threshold)["dice"].mean()),
    }


def show(rows: dict[Point, Row]) -> None:
    """Print a row for every setting: the mean over seeds and the range, validation slices first."""
    by_setting: dict[tuple, list[Row]] = {}
    for point, row in rows.items():
        by_setting.setdefault(point._replace(seed=0), []).append(row)
    lines = [
        [*(str(value) for value in (*point[:7], *point[8:])), f"{found[0]['passes']:,.0f}"]
        + [over_seeds([row[column] for row in found]) for column in COLUMNS[1:]]
        for point, found in sorted(by_setting.items(), key=lambda item: (item[0][1] != "val", item[0]))
    ]
    header = ["cohort", "slices", "input", "method", "width", "steps", "bands", "score", "smooth", "passes a slice"]
    print_table([*header, "AUPRC", "oracle Dice", "validation Dice"], lines)


if __name__ == "__main__":
    run(main)

"""Does MMCCD pay? Its scores against training, beside those of Cyclic UNet and of the bare intensity.

    python benchmarks/learning_curve.py --data_dir ./datasets/phantom200

For every seed it trains both translators and the masked diffusion with modality_cyclic_train.py, scores every saved EMA
on the validation slices (the diffusion with the last backward UNet) and the last ones on the test slices. Interrupted,
the same command goes on: training from its checkpoints, scoring from the CSV.
"""

import argparse
import csv
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.points import Row, read_points, run_training, write_points
from benchmarks.shared.timing import print_table
from scoring.chain import chain_parser, find_chain
from utils.cli import ArgumentParser, UserError, run
from utils.storage import open_folder

SCORES = ("auprc", "oracle_dice", "validation_dice")
METHODS = {  # what it is called, and its colour
    "intensity": ("input's intensity", "0.5"),
    "cyclic_unet": ("Cyclic UNet", "#7570b3"),
    "mmccd": ("MMCCD, fast", "#d95f02"),
    "mmccd_errors": ("MMCCD, the paper's score of the same draws", "#e6ab02"),
}
METHODS_OF = {"unet": ("cyclic_unet", "intensity"), "diffusion": ("mmccd", "mmccd_errors")}


class Training(NamedTuple):
    """One of the three of a seed, and the folder of its experiment."""

    seed: int
    model_name: str
    process: str
    folder: Path


class Point(NamedTuple):
    """A method, after so many steps of its forward translator; 0 for the intensity."""

    split: str
    method: str
    seed: int
    steps: int


# Seconds of training, and every score with the ends of its interval.
COLUMNS = ("seconds", *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")))


def main() -> None:
    args = parse_args()

    import config as configs
    from utils.experiment import experiment_name

    data = configs.get_config(args.dataset).data
    trainings = [
        Training(
            seed,
            *kind,
            args.logdir / f"seed{seed}" / experiment_name(*kind, args.dataset, data.trans, data.input),
        )
        for seed in args.seeds
        for kind in (("diffusion", "forward"), ("unet", "forward"), ("unet", "backward"))
    ]
    train(args, trainings)

    rows = read_points(args.csv, Point, COLUMNS)
    measure(args, trainings, rows)
    draw(rows, args.figure)
    show(rows)
    print(f"\n{args.csv}\n{args.figure}")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--dataset",
        default="phantom",
        help="whose config is used: phantom (the demo's size) or brats (the paper's)",
    )
    add("--data_dir", default="./datasets/phantom", help="folder of preprocessed slices")
    add("--gpu_id", default="0", help="number of the CUDA device, or cpu")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2],
        help="of weights, data order and noise; one run each",
    )
    add("--unet_iterations", type=int, default=3600, help="training steps of either UNet")
    add("--diffusion_iterations", type=int, default=7200, help="training steps of the masked diffusion")
    add("--saves", type=int, default=6, help="checkpoints of each training, evenly spaced, all of them scored")
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="trainings at a time, with one thread each if several",
    )
    add(
        "--logdir",
        type=Path,
        default=Path("experiments/learning_curve"),
        help="folder of all these trainings",
    )
    add("--csv", type=Path, default=Path("experiments/learning_curve.csv"), help="points measured")
    add("--figure", type=Path, default=Path("experiments/learning_curve.png"), help="figure to draw")
    args = parser.parse_args()
    for flag in ("unet_iterations", "diffusion_iterations", "saves", "workers"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    for flag in ("unet_iterations", "diffusion_iterations"):
        if getattr(args, flag) % args.saves:
            raise UserError(f"--{flag} {getattr(args, flag)} cannot be divided into {args.saves} --saves")
    return args


# ----------------------------------------------------------------------------------------------------------
# Training


def train(args: argparse.Namespace, trainings: list[Training]) -> None:
    """Bring every training to its end; what has ended already is left as it is."""
    from tqdm import tqdm

    with ThreadPoolExecutor(args.workers) as pool:
        done = pool.map(lambda training: train_one(args, training), trainings)
        list(tqdm(done, total=len(trainings), desc="training", unit="network"))


def train_one(args: argparse.Namespace, training: Training) -> None:
    iterations = args.diffusion_iterations if training.model_name == "diffusion" else args.unet_iterations
    flags = [
        *(f"--{flag}={getattr(args, flag)}" for flag in ("dataset", "data_dir", "gpu_id")),
        *(f"--model_name={training.model_name}", f"--training_process={training.process}"),
        *(f"--seed={training.seed}", f"--logdir={training.folder.parent}"),
        f"--config.score_model.training.iterations={iterations}",
        f"--config.score_model.training.save_interval={iterations // args.saves}",
    ]
    run_training(f"{training.folder.name} of seed {training.seed}", *flags, one_thread=args.workers > 1)


# ----------------------------------------------------------------------------------------------------------
# Scoring


def measure(args: argparse.Namespace, trainings: list[Training], rows: dict[Point, Row]) -> None:
    """Score every checkpoint that is not among the rows; they are written after each."""
    from utils.device import pick_device

    device, slices = pick_device(args.gpu_id), {}
    forwards = [training for training in trainings if training.process == "forward"]
    backwards = {training.seed: training for training in trainings if training.process == "backward"}
    for forward in forwards:
        backward = backwards[forward.seed]
        emas, backward_emas = (ema_checkpoints(training.folder) for training in (forward, backward))
        for steps in sorted(emas):
            last = steps == max(emas)
            backward_steps = steps if forward.model_name == "unet" else max(backward_emas)
            wanted = [
                Point(split, method, forward.seed, 0 if method == "intensity" else steps)
                for split in (("val", "test") if last else ("val",))
                for method in METHODS_OF[forward.model_name]
            ]
            wanted = [point for point in wanted if point not in rows]
            if not wanted:
                continue
            checkpoints = emas[steps], backward_emas[backward_steps]
            scored = anomaly_scores(args, forward, *checkpoints, last, slices, device)
            seconds = seconds_of(forward.folder, steps) + seconds_of(backward.folder, backward_steps)
            for point in wanted:
                val = scored["val"][point.method] if point.split == "test" else None
                of_training = seconds if point.steps else 0.0
                rows[point] = summarise(scored[point.split][point.method], val, of_training)
            write_points(args.csv, Point, COLUMNS, rows)


def ema_checkpoints(directory: Path) -> dict[int, Path]:
    """The EMA weights of an experiment, by training step."""
    from guided_diffusion.checkpoint import step_of

    return {step_of(path.name): path for path in directory.glob("ema_*.pt")}


def seconds_of(directory: Path, steps: int) -> float:
    """What so many steps take at the speed of the training's best tenth, which other work hardly slows."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))["config"]
    with (directory / "progress.csv").open(newline="", encoding="utf-8") as file:
        rates = sorted(float(row["images_per_second"]) for row in csv.DictReader(file))
    images_per_second = rates[len(rates) * 9 // 10]
    return steps * config["score_model"]["training"]["batch_size"] / images_per_second


def anomaly_scores(
    args: argparse.Namespace,
    forward: Training,
    checkpoint_forward: Path,
    checkpoint_backward: Path,
    last: bool,
    slices: dict[str, dict],
    device: Any,
) -> dict[str, dict[str, tuple]]:
    """By split and method, what `evaluate` takes: scores, truth and brain mask, [N, H, W] each.

    Test slices are scored with the last checkpoints only. `slices` keeps those of a split that have been read.
    """
    from evaluation.scores import smooth_scores
    from scoring.scorer import Scorer, create_maps, load_slices

    flags = [
        *(f"--dataset={args.dataset}", f"--data_dir={args.data_dir}", f"--seed={forward.seed}"),
        *(f"--model_name={forward.model_name}", "--sampling=fast"),
        *(f"--checkpoint_forward={checkpoint_forward}", f"--checkpoint_backward={checkpoint_backward}"),
    ]
    with open_folder(str(args.logdir)) as experiments:
        chain = find_chain(chain_parser("").parse_args(flags), [], experiments)
    chain.config.precision = "auto"
    splits = ("val", "test") if last else ("val",)
    for split in splits:
        slices[split] = slices.get(split) or load_slices(chain, split)
    if slices["val"] is None:
        raise UserError(f"{args.data_dir} has no validation slices: preprocess some")
    maps, _ = create_maps(Scorer(chain, device), {split: slices[split] for split in splits})
    scored = {}
    for split, group in maps.items():
        found = (group["scores"], group["image"])
        if forward.model_name == "diffusion":  # one sweep serves both scores
            smooth = chain.config.score_model.sampling.smooth
            errors = (group["image"] - group["reconstruction"]) ** 2 + group["variance"]
            found = smooth_scores(group["scores"], smooth), errors
        scored[split] = {
            method: (scores, group["truth"], group["brainmask"])
            for method, scores in zip(METHODS_OF[forward.model_name], found, strict=True)
        }
    return scored


def summarise(scored: tuple, val: tuple | None, seconds: float) -> Row:
    """The row of a point, with 95 % intervals over slices; without validation slices there is one Dice only."""
    from evaluation.metrics import evaluate

    summary = evaluate(*scored, val=val).summary
    row = {"seconds": seconds, "auprc": summary["auprc"]}
    row["auprc_low"], row["auprc_high"] = summary["auprc_interval"]
    for choice in ("oracle", "validation"):
        block = summary[choice] or {"dice": None, "dice_interval": (None, None)}
        row[f"{choice}_dice"] = block["dice"]
        row[f"{choice}_dice_low"], row[f"{choice}_dice_high"] = block["dice_interval"]
    return row


# ----------------------------------------------------------------------------------------------------------
# What is shown


def draw(rows: dict[Point, Row], path: Path) -> None:
    """AUPRC and oracle Dice on validation slices against steps and seconds: the mean over seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for line, (score, name) in zip(axes, (("auprc", "AUPRC"), ("oracle_dice", "oracle Dice")), strict=True):
        for ax, xlabel in zip(line, ("training steps, forward", "seconds, both translators"), strict=True):
            for method, (label, color) in METHODS.items():
                points = {point: row for point, row in rows.items() if point[:2] == ("val", method)}
                by_steps = {steps: [] for steps in sorted({point.steps for point in points})}
                for point, row in points.items():
                    by_steps[point.steps].append(row)
                if method == "intensity":
                    ax.axhline(by_steps[0][0][score], color=color, linestyle="--", label=label)
                    continue
                x = [
                    mean(row["seconds"] for row in group) if "seconds" in xlabel else steps
                    for steps, group in by_steps.items()
                ]
                scores = [[row[score] for row in group] for group in by_steps.values()]
                ax.plot(x, [mean(group) for group in scores], ".-", color=color, label=label)
                ax.fill_between(x, *([end(group) for group in scores] for end in (min, max)), color=color, alpha=0.2)
            ax.set(xlabel=xlabel, ylabel=f"{name}, validation slices")
            ax.grid(color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def show(rows: dict[Point, Row]) -> None:
    """Print the scores of the test slices, a row for each method and seed."""
    from evaluation.tables import with_interval

    lines = []
    for method, (label, _) in METHODS.items():
        for point, row in rows.items():
            if point[:2] == ("test", method):
                cells = (with_interval(row[s], (row[f"{s}_low"], row[f"{s}_high"])) for s in SCORES)
                trained = (
                    [str(point.seed), f"{point.steps:,}", f"{row['seconds']:,.0f}"] if point.steps else ["none"] * 3
                )
                lines.append((label, *trained, *cells))
    print_table(
        ["test slices", "seed", "steps", "seconds", "AUPRC", "oracle Dice", "validation Dice"],
        list(dict.fromkeys(lines)),
    )


if __name__ == "__main__":
    run(main)

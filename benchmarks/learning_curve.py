"""Is MMCCD worth its cost? Its scores against training, beside those of Cyclic UNet and of the input's intensity.

    python benchmarks/learning_curve.py --data_dir ./datasets/phantom200

For every seed, trains both UNets and the masked diffusion with modality_cyclic_train.py, scores every saved EMA on the
validation slices (the diffusion with the last backward UNet) and the last ones on the test slices. An interrupted run
resumes with the same command: training from its checkpoints, scoring from the CSV.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import plan
from benchmarks.shared.plan import Test, Training
from benchmarks.shared.points import Row, read_points, write_points
from benchmarks.shared.script import print_table, require_at_least, save_figure
from utils.cli import UserError, run

SCORES = {"auprc": "AUPRC", "oracle_dice": "oracle Dice", "validation_dice": "validation Dice"}
# Seconds of training, and every score with the ends of its interval.
COLUMNS = ("seconds", *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")))
CURVES = {  # title, colour, and the method whose error maps it is computed from
    "intensity": ("input's intensity", "0.5", "cyclic_unet"),
    "cyclic_unet": ("Cyclic UNet", "#7570b3", "cyclic_unet"),
    "mmccd": ("MMCCD, fast", "#d95f02", "mmccd"),
    "mmccd_errors": ("MMCCD, the paper's score of the same draws", "#e6ab02", "mmccd"),
}


class Point(NamedTuple):
    """A score after so many steps of the forward translator; 0 for the intensity."""

    split: str
    method: str
    seed: int
    steps: int


def main() -> None:
    args = parse_args()

    import config as configs

    data = configs.get_config(args.dataset).data
    args.cycles = [(data.input, data.trans)]
    methods = dict.fromkeys(method for *_, method in CURVES.values())
    tests = [Test(data.input, data.trans, method, seed) for seed in args.seeds for method in methods]

    def settings(training: Training) -> dict[str, int]:
        iterations = args.diffusion_iterations if plan.ENTRIES[training.model_name].backward else args.unet_iterations
        return {"iterations": iterations, "save_interval": iterations // args.saves}

    plan.train_all(args, plan.list_trainings(args, tests), settings)
    rows = read_points(args.csv, Point, COLUMNS)
    for test in tests:
        measure(args, test, rows)
    draw(rows, args.figure)
    show(rows)
    print(f"\n{args.csv}\n{args.figure}")


def parse_args() -> argparse.Namespace:
    args = plan.experiment_parser(
        __doc__,
        unet_iterations=(3600, "training steps of either UNet"),
        diffusion_iterations=(7200, "training steps of the masked diffusion"),
        saves=(6, "checkpoints of each training, evenly spaced, all of them scored"),
        logdir=Path("experiments/learning_curve"),
        csv=Path("experiments/learning_curve.csv"),
        figure=Path("experiments/learning_curve.png"),
    ).parse_args()
    require_at_least(args, unet_iterations=1, diffusion_iterations=1, saves=1, workers=1)
    for flag in ("unet_iterations", "diffusion_iterations"):
        if getattr(args, flag) % args.saves:
            raise UserError(f"--{flag} {getattr(args, flag)} cannot be divided into {args.saves} --saves")
    return args


# ----------------------------------------------------------------------------------------------------------
# Scoring


def measure(args: argparse.Namespace, test: Test, rows: dict[Point, Row]) -> None:
    """Score every checkpoint of a method that is missing in the rows, and write them after each."""
    from guided_diffusion.checkpoint import EMA_PREFIX, list_checkpoints

    forward, backward = (plan.folder_of(args, training) for training in plan.trainings_of(args, test))
    emas, backward_emas = (list_checkpoints(folder, EMA_PREFIX) for folder in (forward, backward))
    chain, slices = plan.chain_of(args, test), {}
    chain.config.precision = "auto"
    for steps, checkpoint in emas.items():
        backward_steps = max(backward_emas) if plan.ENTRIES[chain.model_name].backward else steps
        splits = ("val", "test") if steps == max(emas) else ("val",)
        wanted = [
            Point(split, name, test.seed, 0 if name == "intensity" else steps)
            for split in splits
            for name, (*_, method) in CURVES.items()
            if method == test.method
        ]
        wanted = [point for point in wanted if point not in rows]
        if not wanted:
            continue
        slices = slices or plan.load_cohorts(chain, {"test": args.data_dir})
        pair = chain._replace(
            forward=chain.forward._replace(checkpoint=forward / checkpoint),
            backward=chain.backward._replace(checkpoint=backward / backward_emas[backward_steps]),
        )
        scored = anomaly_scores(args, pair, {split: slices[split] for split in splits})
        seconds = seconds_of(forward, steps) + seconds_of(backward, backward_steps)
        for point in wanted:
            val = scored["val"][point.method] if point.split == "test" else None
            rows[point] = summarise(scored[point.split][point.method], val, seconds if point.steps else 0.0)
        write_points(args.csv, Point, COLUMNS, rows)


def seconds_of(directory: Path, steps: int) -> float:
    """Estimate the duration of training from the speed of its fastest tenth, which other processes hardly slow down."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))["config"]
    with (directory / "progress.csv").open(newline="", encoding="utf-8") as file:
        rates = sorted(float(row["images_per_second"]) for row in csv.DictReader(file))
    images_per_second = rates[len(rates) * 9 // 10]
    return steps * config["score_model"]["training"]["batch_size"] / images_per_second


def anomaly_scores(args: argparse.Namespace, chain: Any, slices: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scored slices, as for `evaluate_parts`, by split and curve."""
    from evaluation.report import score_functions, scored
    from scoring.scorer import Scorer, maps_in_memory
    from utils.device import pick_device

    maps, _ = maps_in_memory(Scorer(chain, pick_device(args.gpu_id)), slices)
    published = score_functions(chain.config.score_model.sampling.smooth, 1, {})
    functions = {
        "intensity": published["intensity"],
        chain.method: published["scores"],
        f"{chain.method}_errors": lambda part: (part["image"] - part["reconstruction"]) ** 2 + part["variance"],
    }
    return {split: {name: scored(parts, score) for name, score in functions.items()} for split, parts in maps.items()}


def summarise(scored: Any, val: Any | None, seconds: float) -> Row:
    """Return the row of a point, with 95 % intervals over subjects; without `val` there is no validation Dice."""
    from evaluation.evaluate import evaluate_parts

    summary = evaluate_parts(scored, val).summary
    row = {"seconds": seconds, "auprc": summary["auprc"]}
    row["auprc_low"], row["auprc_high"] = summary["auprc_interval"]
    for choice in ("oracle", "validation"):
        block = summary[choice] or {"dice": None, "dice_interval": (None, None)}
        row[f"{choice}_dice"] = block["dice"]
        row[f"{choice}_dice_low"], row[f"{choice}_dice_high"] = block["dice_interval"]
    return row


# ----------------------------------------------------------------------------------------------------------
# Figure and table


def draw(rows: dict[Point, Row], path: Path) -> None:
    """Draw AUPRC and oracle Dice on validation slices against steps and seconds: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharey="row")
    for line, score in zip(axes, ("auprc", "oracle_dice"), strict=True):
        for ax, xlabel in zip(line, ("training steps, forward", "seconds, both translators"), strict=True):
            for method, (label, color, _) in CURVES.items():
                points = sorted((point for point in rows if point[:2] == ("val", method)), key=lambda one: one.steps)
                by_steps: dict[int, list[Row]] = {}
                for point in points:
                    by_steps.setdefault(point.steps, []).append(rows[point])
                if method == "intensity":
                    ax.axhline(by_steps[0][0][score], color=color, linestyle="--", label=label)
                    continue
                seconds = [mean(row["seconds"] for row in group) for group in by_steps.values()]
                x = seconds if "seconds" in xlabel else list(by_steps)
                scores = [[row[score] for row in group] for group in by_steps.values()]
                ax.plot(x, [mean(group) for group in scores], ".-", color=color, label=label)
                ax.fill_between(x, *([end(group) for group in scores] for end in (min, max)), color=color, alpha=0.2)
            ax.set(xlabel=xlabel, ylabel=f"{SCORES[score]}, validation slices")
            ax.grid(color="0.9")
    save_figure(figure, path, ncols=4)


def show(rows: dict[Point, Row]) -> None:
    """Print the scores of the test slices, a row for each curve and seed."""
    from evaluation.tables import with_interval

    lines: dict[tuple, None] = {}  # the intensity's are the same for every seed
    for method, (label, *_) in CURVES.items():
        for point, row in rows.items():
            if point[:2] == ("test", method):
                cells = (with_interval(row[s], (row[f"{s}_low"], row[f"{s}_high"])) for s in SCORES)
                trained = (str(point.seed), f"{point.steps:,}", f"{row['seconds']:,.0f}")
                lines[(label, *(trained if point.steps else ["none"] * 3), *cells)] = None
    print_table(["test slices", "seed", "steps", "seconds", *SCORES.values()], list(lines))


if __name__ == "__main__":
    run(main)

"""What MMCCD's scores lose by fewer network passes: AUPRC and Dice against sampling steps and bands.

On validation slices it measures a grid of both, the preset `paper`, and how much this and `fast` vary with the seed
of the noise; on test slices it confirms the two. Points go into a CSV one by one: a second run adds what is missing.
"""

import argparse
import csv
import sys
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modality_cyclic_test import Scorer, Translator, chain_parser, find_translators, load_slices
from utils.cli import UserError, parse_run_args, run
from utils.storage import open_folder

STEPS = (1, 2, 3, 5, 10)
BANDS_A_WIDTH = (1, 2, 4, 8)
LONG = ((20, 2), (50, 2), (100, 2))  # how it goes on with more steps
SEEDS = (0, 1, 2)
COLUMNS = ("split", "steps", "bands_a_width", "seed", "passes_a_slice", "auprc", "dice")


def main() -> None:
    args, overrides = parse_args()

    from config import SAMPLING
    from utils.device import pick_device

    with open_folder(args.logdir) as experiments:
        forward, backward = find_translators(args, overrides, experiments)
        device = pick_device(args.gpu_id)
        (paper, fast), seed = (SAMPLING["paper"], SAMPLING["fast"]), forward.config.seed
        grid = [(steps, bands) for bands in BANDS_A_WIDTH for steps in STEPS]
        wanted = [("val", *point, seed) for point in (*grid, *LONG, paper)]
        wanted += [("test", *point, s) for point, seeds in ((fast, SEEDS), (paper, [seed])) for s in seeds]
        wanted += [("val", *point, s) for point in (fast, paper) for s in SEEDS if s != seed]

        rows = read_rows(args.csv)
        for point in wanted:
            if point not in rows:
                rows[point] = measure(forward, backward, device, *point)
                write_rows(args.csv, rows)
        draw(rows, paper, fast, seed, args.figure)
        print(table(rows, wanted))
        print(f"\n{args.csv}\n{args.figure}")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(__doc__.splitlines()[0])
    parser.set_defaults(model_name="diffusion", dataset="phantom")
    parser.add_argument("--csv", type=Path, default=Path("experiments/tradeoff.csv"), help="points measured")
    parser.add_argument("--figure", type=Path, default=Path("docs/tradeoff.png"), help="figure to draw")
    args, overrides = parse_run_args(parser)
    if args.model_name != "diffusion":
        raise UserError("the Cyclic UNet has nothing to trade: leave --model_name out")
    return args, overrides


def measure(
    forward: Translator,
    backward: Translator,
    device: Any,
    split: str,
    steps: int,
    bands_a_width: int,
    seed: int,
) -> tuple[float, float, float]:
    """Network passes a slice, AUPRC and oracle Dice of one way to sample, on the slices of a split."""
    from tqdm import tqdm

    from utils.metrics import average_precision, best_threshold, cut_scores, ranked_scores

    config = forward.config.copy_and_resolve_references()
    config.seed = seed
    config.score_model.sampling.timestep_respacing = str(steps)
    config.score_model.sampling.stride = max(config.score_model.mask.width // bands_a_width, 1)
    scorer = Scorer("diffusion", forward._replace(config=config), backward, device)
    slices = load_slices(config, split)
    if slices is None:
        raise UserError("the trade-off is measured on validation slices")
    passes = sum(scorer.samples(slices["brainmask"])) * scorer.passes_a_sample
    name = f"{split}: {steps} steps, {bands_a_width} bands a width, seed {seed}"
    with tqdm(total=passes, desc=name, unit="pass", unit_scale=True, dynamic_ncols=True) as bar:
        cycle = scorer.score(slices[config.data.input], slices["brainmask"], bar.update)
    scores, truth, brainmask = (
        array[:, 0].numpy() for array in (cycle.score, slices["seg"], slices["brainmask"])
    )
    auprc = average_precision(*ranked_scores(scores, truth, brainmask))
    _, dice = best_threshold(cut_scores(scores, brainmask), truth)
    return passes / len(scores), auprc, dice


def read_rows(path: Path) -> dict[tuple, tuple[float, float, float]]:
    """What was measured before, by point."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (row["split"], *(int(row[key]) for key in COLUMNS[1:4])): tuple(
                float(row[key]) for key in COLUMNS[4:]
            )
            for row in csv.DictReader(file)
        }


def write_rows(path: Path, rows: dict[tuple, tuple[float, float, float]]) -> None:
    """All points, one a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(
            (*point, f"{passes:.1f}", f"{auprc:.5f}", f"{dice:.5f}")
            for point, (passes, auprc, dice) in rows.items()
        )


def table(rows: dict[tuple, tuple[float, float, float]], wanted: list[tuple]) -> str:
    """Every setting, validation slices first, fewest passes first; over several seeds mean (lowest … highest)."""
    by_setting: dict[tuple, list[tuple[float, float, float]]] = {}
    for point in wanted:
        by_setting.setdefault(point[:3], []).append(rows[point])
    lines = ["slices  steps  bands a width  passes a slice  AUPRC                   oracle Dice"]
    for (split, steps, bands), measured in sorted(
        by_setting.items(), key=lambda item: (item[0][0] != "val", item[1][0][0])
    ):
        passes, auprc, dice = zip(*measured, strict=True)
        cells = f"{split:6s}  {steps:5d}  {bands:13d}  {passes[0]:14,.0f}"
        lines.append(f"{cells}  {over_seeds(auprc):22s}  {over_seeds(dice)}")
    return "\n".join(lines)


def over_seeds(values: tuple[float, ...]) -> str:
    """The mean, and the range where there is more than one."""
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} … {max(values):.3f})"


def draw(
    rows: dict[tuple, tuple[float, float, float]], paper: tuple, fast: tuple, seed: int, path: Path
) -> None:
    """AUPRC and Dice of validation slices against passes a slice: a line for each density of bands, and the presets."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for column, (ax, name) in enumerate(zip(axes, ("AUPRC", "oracle Dice"), strict=True), 1):
        for bands, shade in zip(BANDS_A_WIDTH, ("#9ecae1", "#6baed6", "#3182bd", "#08519c"), strict=True):
            points = [(steps, bands) for steps in STEPS] + [point for point in LONG if point[1] == bands]
            passes, scores = zip(
                *((rows["val", *p, seed][0], rows["val", *p, seed][column]) for p in points), strict=True
            )
            ax.plot(passes, scores, ".-", color=shade, label=f"bands a width {bands}, steps from 1 on")
        for name_of_preset, point, marker in (("fast", fast, "o"), ("paper", paper, "s")):
            shown = [rows["val", *point, s] for s in SEEDS if ("val", *point, s) in rows]
            label = f"{name_of_preset}: steps {point[0]}, bands a width {point[1]}, seeds {len(shown)}"
            style = {"color": "#d95f02", "markersize": 9, "fillstyle": "none", "linestyle": "none"}
            ax.plot([row[0] for row in shown], [row[column] for row in shown], marker, label=label, **style)
        ax.set(xscale="log", xlabel="network passes a slice", ylabel=f"{name}, validation slices")
        ax.grid(color="0.9")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)

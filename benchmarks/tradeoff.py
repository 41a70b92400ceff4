"""What MMCCD's scores lose by fewer network passes: AUPRC and Dice against sampling steps and bands.

On validation slices it measures a grid of both, with either average over the bands, the presets, and how much these
vary with the seed of the noise; on test slices it tries the presets. Points go into a CSV as they come: a second run
adds what is missing.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.points import Row, read_points, write_points
from benchmarks.timing import print_table
from scoring.chain import Chain, chain_parser, find_chain, require_same_preprocessing
from utils.cli import UserError, parse_run_args, run
from utils.storage import open_folder

STEPS = (1, 2, 3, 5, 10)
BANDS_A_WIDTH = (1, 2, 4, 8)
SEEDS = (0, 1, 2)
COLUMNS = ("passes_a_slice", "auprc", "dice")


class Point(NamedTuple):
    """One way to sample, on the slices of a split."""

    split: str
    timesteps: str  # as --timestep_respacing takes them
    bands_a_width: int
    average: str
    seed: int


def main() -> None:
    args, overrides = parse_args()

    from config import AVERAGES, SAMPLING
    from utils.device import pick_device

    with open_folder(args.logdir) as experiments:
        chain = find_chain(args, overrides, experiments)
        require_same_preprocessing(chain, Path(chain.config.data.data_dir))
        device = pick_device(args.gpu_id)
        presets, seed = SAMPLING, chain.config.seed
        grid = [(steps, bands) for bands in BANDS_A_WIDTH for steps in STEPS]
        wanted = [("val", *preset, s) for preset in presets.values() for s in SEEDS]
        wanted += [("val", f"trailing{steps}", bands, average, seed) for steps, bands in grid for average in AVERAGES]
        wanted += [("val", *presets["paper"][:2], "reconstructions", s) for s in SEEDS]
        wanted += [("test", *presets["fast"], s) for s in SEEDS] + [("test", *presets["paper"], seed)]

        rows = read_points(args.csv, Point, COLUMNS)
        for point in wanted:
            if point not in rows:
                rows |= measure(chain, device, *point)
                write_points(args.csv, Point, COLUMNS, rows)
        draw(rows, seed, args.figure)
        show(rows, wanted)
        print(f"\n{args.csv}\n{args.figure}")


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(__doc__.splitlines()[0])
    parser.set_defaults(model_name="diffusion", dataset="phantom")
    parser.add_argument("--csv", type=Path, default=Path("experiments/tradeoff.csv"), help="points measured")
    parser.add_argument("--figure", type=Path, default=Path("experiments/tradeoff.png"), help="figure to draw")
    args, overrides = parse_run_args(parser)
    if args.model_name != "diffusion":
        raise UserError("the Cyclic UNet has nothing to trade: leave --model_name out")
    return args, overrides


def measure(
    chain: Chain,
    device: Any,
    split: str,
    timesteps: str,
    bands_a_width: int,
    average: str,
    seed: int,
) -> dict[Point, Row]:
    """Network passes a slice, AUPRC and oracle Dice of one way to sample, on the slices of a split.

    One sweep serves both averages, that of the errors and that of the reconstructions.
    """
    from config import sampling_keys
    from scoring.scorer import Scorer, load_slices

    config = chain.config.copy_and_resolve_references()
    config.seed = seed
    keys = sampling_keys(timesteps, bands_a_width, "errors", config.score_model.mask.width)
    config.update_from_flattened_dict(keys)
    scorer = Scorer(chain._replace(forward=chain.forward._replace(config=config)), device)
    slices = load_slices(config, split)
    if slices is None:
        raise UserError("the trade-off is measured on validation slices")
    image = slices[config.data.input]
    name = f"{split}: steps {timesteps}, {bands_a_width} bands a width, seed {seed}"
    cycle = scorer.score(image, slices["brainmask"], name)
    scores = {"errors": cycle.score, "reconstructions": (image - cycle.reconstruction).square()}
    rows = {}
    for average, score in scores.items():
        measured = (scorer.passes(slices["brainmask"]) / len(image), *accuracy(score, slices))
        point = Point(split, timesteps, bands_a_width, average, seed)
        rows[point] = dict(zip(COLUMNS, measured, strict=True))
    return rows


def accuracy(score: Any, slices: dict) -> tuple[float, float]:
    """AUPRC and oracle Dice of scores [N, 1, H, W]."""
    from evaluation.metrics import average_precision, best_threshold, cut_scores, ranked_scores

    scores, truth, brainmask = (a[:, 0].numpy() for a in (score, slices["seg"], slices["brainmask"]))
    auprc = average_precision(*ranked_scores(scores, truth, brainmask))
    return auprc, best_threshold(cut_scores(scores, brainmask), truth)[1]


def show(rows: dict[Point, Row], wanted: list[tuple]) -> None:
    """Print every setting, validation slices first, fewest passes first; over seeds the mean and the range."""
    by_setting: dict[tuple, list[Row]] = {}
    for point in dict.fromkeys(wanted):
        by_setting.setdefault(point[:-1], []).append(rows[point])
    lines = []
    for setting, measured in by_setting.items():
        passes, auprc, dice = ([row[column] for row in measured] for column in COLUMNS)
        lines.append([*map(str, setting), f"{passes[0]:,.0f}", over_seeds(auprc), over_seeds(dice)])
    lines.sort(key=lambda line: (line[0] != "val", int(line[4].replace(",", ""))))
    header = ["slices", "steps", "bands a width", "average of", "passes a slice", "AUPRC", "oracle Dice"]
    print_table(header, lines)


def over_seeds(values: list[float]) -> str:
    """The mean, and the range where there is more than one."""
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} … {max(values):.3f})"


def draw(rows: dict[Point, Row], seed: int, path: Path) -> None:
    """AUPRC and Dice of validation slices against passes a slice: a line for each density of bands, and the presets."""
    from matplotlib.figure import Figure

    from config import AVERAGES, SAMPLING

    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    for average, line_of_axes in zip(AVERAGES, axes, strict=True):
        for column, metric, ax in zip(COLUMNS[1:], ("AUPRC", "oracle Dice"), line_of_axes, strict=True):
            for bands, shade in zip(BANDS_A_WIDTH, ("#9ecae1", "#6baed6", "#3182bd", "#08519c"), strict=True):
                line = [rows["val", f"trailing{n}", bands, average, seed] for n in STEPS]
                label = f"bands a width {bands}, steps from 1 on"
                passes = [row[COLUMNS[0]] for row in line]
                ax.plot(passes, [row[column] for row in line], ".-", color=shade, label=label)
            for (name, (timesteps, bands, own)), marker in zip(SAMPLING.items(), "so", strict=True):
                points = [("val", timesteps, bands, average, s) for s in SEEDS]
                shown = [rows[point] for point in points if point in rows]
                style = {"marker": marker, "markersize": 9, "fillstyle": "none", "linestyle": "none"}
                style["color"] = "#d95f02" if own == average else "0.6"
                label = f"{name}, {len(shown)} seeds" if own == average else "a preset with the other average"
                passes = [row[COLUMNS[0]] for row in shown]
                ax.plot(passes, [row[column] for row in shown], label=label, **style)
            ax.set(xscale="log", ylabel=metric, title=f"average of {average}")
            ax.grid(color="0.9")
            ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("network passes a slice, validation slices", fontsize="medium")
    shown = [ax.get_legend_handles_labels() for ax in axes[:, 0]]
    handles = {label: handle for pair in shown for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)

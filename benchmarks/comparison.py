"""Which method pays on which modality: every method, for several inputs and training seeds, in one table and figure.

    python benchmarks/comparison.py --data_dir ./datasets/phantom
    python benchmarks/comparison.py --dataset brats --data_dir ./datasets/data

Every training is an ordinary experiment of modality_cyclic_train.py, of as many steps as the config says for all
methods. Validation slices choose which of its checkpoints is tested. Every score is shown as it is and under the same
median filter. Interrupted, the same command resumes: training from its checkpoints, testing from the CSV.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.plan import (
    DEFAULT_METHODS,
    METHODS,
    Training,
    chain_of,
    cycle,
    ended,
    grid_of,
    needed,
    train,
    translates,
)
from benchmarks.shared.points import Row, over_seeds, read_points, write_points
from benchmarks.shared.timing import print_table
from utils.cli import ArgumentParser, UserError, run

WORDS = {"none": "as it is", "median5": "under median5", "chosen": "chosen"}
REFERENCE = "cyclic_unet"
SMOOTH = ("none", "median5", "chosen")  # the published score as it is and filtered, and the one chosen on validation
SCORES = {"auprc": "AUPRC", "oracle_dice": "oracle Dice", "validation_dice": "validation Dice"}


class Point(NamedTuple):
    """One method's score of all test slices of a cohort."""

    cohort: str
    input: str
    trans: str
    method: str
    seed: int
    smooth: str


class Slice(NamedTuple):
    """One method's score of one test slice."""

    cohort: str
    input: str
    trans: str
    method: str
    seed: int
    smooth: str
    name: str


def main() -> None:
    args = parse_args()
    trainings = list(dict.fromkeys(training for test in tests(args) for training in needed(args, *test)))
    announce_plan(args, trainings)

    from tqdm import tqdm

    with ThreadPoolExecutor(args.workers) as pool, tqdm(total=len(trainings), desc="training", unit="network") as bar:
        for _ in pool.map(lambda training: train(args, training), trainings):
            bar.update()
    slices_csv = args.csv.with_name(f"{args.csv.stem}_slices.csv")
    rows, slices = read_points(args.csv, Point, tuple(SCORES)), read_points(slices_csv, Slice, ("auprc",))
    for test in tqdm(list(tests(args)), desc="testing", unit="run"):
        if all(Point(cohort.name, *test, SMOOTH[0]) in rows for cohort in cohorts(args)):
            continue
        for point, row, of_slices in measure(args, *test):
            rows[point] = row
            slices |= of_slices
        write_points(slices_csv, Slice, ("auprc",), slices)
        write_points(args.csv, Point, tuple(SCORES), rows)
    show(rows, slices)
    draw(rows, args.figure)
    print(f"\n{args.csv}\n{slices_csv}\n{args.figure}")


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", default="phantom", help="whose config is used: phantom (the demo's size) or brats (the paper's)")
    add("--data_dir", type=Path, default=Path("datasets/phantom"), help="preprocessed slices to train and choose on")
    add("--test", type=Path, nargs="*", default=[], help="other folders of slices to test on, all of them together")
    add("--gpu_id", default="0", help="number of the CUDA device, or cpu")
    cycles = "modalities at hand and translated to, as INPUT:TRANS; a baseline takes each input once"
    add("--cycles", type=cycle, nargs="+", default=[("flair", "t2"), ("t2", "flair"), ("t1", "t2")], help=cycles)
    add("--methods", nargs="+", default=DEFAULT_METHODS, choices=METHODS, help="what is compared")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, data order and noise; one run each")
    add("--iterations", type=int, help="training steps of each network (default: the config's)")
    select = "checkpoints to test: of all saved the best on the validation slices, or the newest EMA"
    add("--select", default="validation", choices=["validation", "newest"], help=select)
    workers = "trainings and tests at a time, with one thread each if several"
    add("--workers", type=int, default=os.cpu_count() or 1, help=workers)
    add("--logdir", type=Path, default=Path("experiments/comparison"), help="folder of all these experiments")
    add("--csv", type=Path, default=Path("experiments/comparison.csv"), help="scores; those of slices lie beside them")
    add("--figure", type=Path, default=Path("experiments/comparison.png"), help="figure to draw")
    args = parser.parse_args()
    if args.workers < 1 or (args.iterations is not None and args.iterations < 1):
        raise UserError("--iterations and --workers must be at least 1")
    return args


# ----------------------------------------------------------------------------------------------------------
# The plan


def tests(args: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Every input, trans, method and seed."""
    for seed, method in product(args.seeds, args.methods):
        if not translates(method):
            yield from ((input, input, method, seed) for input in dict.fromkeys(input for input, _ in args.cycles))
        else:
            yield from ((*cycle, method, seed) for cycle in args.cycles)


def cohorts(args: argparse.Namespace) -> list[Path]:
    """The folders whose test slices are scored."""
    return args.test or [args.data_dir]


def announce_plan(args: argparse.Namespace, trainings: list[Training]) -> None:
    """Say what is to be done, and how long its trainings will take at the speed of one step of each network."""
    import config as configs
    from models import load_method
    from models.training import seconds_a_step
    from utils.device import pick_device

    config = configs.get_config(args.dataset)
    iterations = args.iterations or config.score_model.training.iterations
    open_ones = [one for one in trainings if not ended(args, one, iterations)]
    device = pick_device(args.gpu_id)
    names = {one.model_name for one in open_ones if load_method(one.model_name).fit is None}
    seconds = {name: seconds_a_step(load_method(name), config, device) for name in names}
    total = sum(seconds.get(one.model_name, 0.0) * iterations for one in open_ones)
    n_tests = sum(1 for _ in tests(args))
    print(
        f"{len(trainings)} trainings, {len(open_ones)} of them to be done, {iterations:,} steps each; {n_tests} tests"
    )
    for name, cost in sorted(seconds.items()):
        n = sum(one.model_name == name for one in open_ones)
        print(f"  {n} × {name}: about {iterations * cost / 60:,.0f} minutes each")
    print(f"about {total / 3600:,.1f} hours of training on one worker, shared by {args.workers}; the tests come after")


# ----------------------------------------------------------------------------------------------------------
# Training and testing


def measure(
    args: argparse.Namespace, input: str, trans: str, method: str, seed: int
) -> Iterator[tuple[Point, Row, dict[Slice, Row]]]:
    """The scores of a method on the test slices of every cohort, as they are, under a median filter, and chosen.

    The validation slices of `--data_dir` choose its checkpoints, its score and its threshold.
    """
    from evaluation.metrics import RIM, evaluate
    from evaluation.report import better_sign, choose_scores, labelled
    from evaluation.scores import smooth_scores
    from scoring.scorer import Scorer, create_maps, load_slices
    from scoring.selection import best_on_validation
    from utils.device import pick_device
    from utils.storage import Folder

    device = pick_device(args.gpu_id)
    chain = chain_of(args, input, trans, method, seed)
    slices = {"val": load_slices(chain, "val")}
    if slices["val"] is None:
        raise UserError(f"{args.data_dir} has no validation slices: preprocess some")
    if args.select == "validation":
        chain = best_on_validation(chain, Folder(args.logdir / f"seed{seed}"), slices["val"], device)
    for cohort in cohorts(args):
        chain.config.data.data_dir = str(cohort)
        slices[cohort.name] = load_slices(chain, "test")
    maps, _ = create_maps(Scorer(chain, device), slices)
    sign = better_sign(maps["val"])
    run = {"method": chain.method, "input": input, "trans": trans}
    choices, chosen = choose_scores(run, maps, grid_of(args), sign)
    for cohort, smooth in product(cohorts(args), SMOOTH):
        sets = {split: maps[split] for split in ("val", cohort.name)}
        keys = {method: "chosen"} | ({"intensity": "chosen_intensity"} if method == REFERENCE else {})
        for name, key in keys.items():
            if smooth == "chosen":
                rim, scores = choices[key].settings.rim, {split: chosen[split][key] for split in sets}
            else:
                rim, plain = RIM, {split: group["scores"] for split, group in sets.items()}
                if name == "intensity":
                    plain = {split: sign * group["image"] for split, group in sets.items()}
                scores = {split: smooth_scores(values, smooth) for split, values in plain.items()}
            val, test = (labelled(maps[split] | {"scores": scores[split]}, "scores") for split in sets)
            summary, per_slice = evaluate(*test, val=val, rim=rim)
            point = Point(cohort.name, input, trans, name, seed, smooth)
            row = {
                "auprc": summary["auprc"],
                **{f"{one}_dice": summary[one]["dice"] for one in ("oracle", "validation")},
            }
            named = zip(maps[cohort.name]["names"], per_slice["auprc"], strict=True)
            yield point, row, {Slice(*point, str(one)): {"auprc": float(value)} for one, value in named}


# ----------------------------------------------------------------------------------------------------------
# What is shown


def show(rows: Mapping[Point, Row], slices: Mapping[Slice, Row]) -> None:
    """Print a row for every method: mean and range over seeds, and the paired bootstrap against Cyclic UNet."""
    for key, methods in settings(rows).items():
        input, trans, smooth = key
        lines = []
        for method, found in methods.items():
            cells = [over_seeds([row[score] for row in found]) for score in SCORES]
            lines.append([label(method, input), *cells, difference(slices, key, method)])
        print(f"\n{input} → {trans} → {input}, {WORDS[smooth]}")
        print_table([input, *SCORES.values(), "mean AUPRC of a slice − Cyclic UNet's"], lines)
    print("mean (range) over seeds and cohorts; [95 % interval of a paired bootstrap over slices, of means over seeds]")


def settings(rows: Mapping[Point, Row]) -> dict[tuple[str, str, str], dict[str, list[Row]]]:
    """The rows of every method, by input, trans and smoothing; baselines stand in every cycle of their input."""
    cycles = list(dict.fromkeys((point.input, point.trans) for point in rows if point.input != point.trans))
    found: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for (input, trans), smooth in product(cycles, SMOOTH):
        for point, row in rows.items():
            if point.smooth == smooth and point.input == input and point.trans in (input, trans):
                found.setdefault((input, trans, smooth), {}).setdefault(point.method, []).append(row)
    return found


def label(method: str, input: str) -> str:
    from evaluation.results import TITLES

    return TITLES.get(method, f"intensity ({input})")


def difference(slices: Mapping[Slice, Row], key: tuple[str, str, str], method: str) -> str:
    """How much higher the AUPRC of a slice is than Cyclic UNet's, in the mean over slices, with its interval."""
    from evaluation.metrics import paired_bootstrap

    input, trans, smooth = key
    by_slice: dict[str, dict[tuple[str, str], list[float]]] = {method: {}, REFERENCE: {}}
    for point, row in slices.items():
        fits = point.input == input and point.trans in (input, trans) and point.smooth == smooth
        if fits and point.method in by_slice and row["auprc"] is not None:
            by_slice[point.method].setdefault((point.cohort, point.name), []).append(row["auprc"])
    shared = sorted(set(by_slice[method]) & set(by_slice[REFERENCE]))
    if method == REFERENCE or not shared:
        return "—"
    means = ([mean(by_slice[name][one]) for one in shared] for name in (method, REFERENCE))
    found, (low, high) = paired_bootstrap(*means)
    return f"{found:+.3f} [{low:+.3f}, {high:+.3f}]"


def draw(rows: Mapping[Point, Row], path: Path) -> None:
    """AUPRC of every method, a panel for each cycle: the mean over seeds, a dot for each, by score."""
    from matplotlib.figure import Figure

    found = settings(rows)
    cycles = list(dict.fromkeys((input, trans) for input, trans, _ in found))
    figure = Figure(figsize=(4.2 * len(cycles) + 1, 4.6), layout="constrained")
    axes = figure.subplots(1, len(cycles), sharex=True, squeeze=False)[0]
    colours = {"none": "#56b4e9", "median5": "#0072b2", "chosen": "#d55e00"}
    for ax, (input, trans) in zip(axes, cycles, strict=True):
        methods = list(found[input, trans, SMOOTH[0]])
        for i, smooth in enumerate(SMOOTH):
            values = [[row["auprc"] for row in found[input, trans, smooth][method]] for method in methods]
            places = [k + 0.28 * (i - 1) for k in range(len(methods))]
            means = [mean(group) for group in values]
            ax.barh(places, means, 0.26, color=colours[smooth], label=WORDS[smooth])
            for place, group in zip(places, values, strict=True):
                ax.plot(group, [place] * len(group), ".", color="black", markersize=4)
        ax.set_yticks(range(len(methods)), [label(method, input) for method in methods])
        ax.invert_yaxis()
        ax.set(title=f"{input} → {trans} → {input}", xlabel="AUPRC, test slices", xlim=(0, 1))
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)

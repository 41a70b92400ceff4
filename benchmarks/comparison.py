"""Which method to choose for which modality: all methods, several inputs and training seeds, in one table and figure.

    python benchmarks/comparison.py --data_dir ./datasets/phantom
    python benchmarks/comparison.py --dataset brats --data_dir ./datasets/data

Every network is trained by modality_cyclic_train.py for the same number of steps; validation slices choose the
checkpoint that is tested. Every score is shown as published, median filtered, and chosen on validation slices. The
last three columns need test data of whole subjects, healthy ones included. An interrupted run resumes with the same
command: training from its checkpoints, testing from the CSV.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import plan
from benchmarks.shared.plan import Test, Training
from benchmarks.shared.points import Row, read_points, write_points
from benchmarks.shared.script import over_seeds, paired_difference, print_table, require_at_least, save_figure
from utils.cli import run

REFERENCE = "cyclic_unet"  # the other methods are compared with it
INTENSITY = "intensity"
FILTERS = ("none", "median5")  # of the published score
SMOOTH = (*FILTERS, "chosen")
WORDS = {"none": "as it is", "median5": "under median5", "chosen": "chosen"}
COLOURS = {"none": "#56b4e9", "median5": "#0072b2", "chosen": "#d55e00"}
SCORES = {
    "auprc": "AUPRC",
    "oracle_dice": "oracle Dice",
    "validation_dice": "validation Dice",
    # At the threshold that healthy validation pixels give, of whole subjects.
    "subject_dice": "subject Dice",
    "false_positives": "FP/healthy scan",
    "detection": "detection AUROC",
}


class Point(NamedTuple):
    """One method's score on the test slices of a cohort."""

    cohort: str
    input: str
    trans: str
    method: str
    seed: int
    smooth: str


Subject = NamedTuple("Subject", [*Point.__annotations__.items(), ("name", str)])  # the score on one test subject


def main() -> None:
    args = parse_args()
    tests = plan.list_tests(args)
    trainings = plan.list_trainings(args, tests)
    print_plan(args, tests, trainings)
    plan.train_all(
        args, left_of(args, trainings), lambda one: {"iterations": args.iterations} if args.iterations else {}
    )

    from tqdm import tqdm

    subjects_csv = args.csv.with_name(f"{args.csv.stem}_subjects.csv")
    rows, subjects = read_points(args.csv, Point, tuple(SCORES)), read_points(subjects_csv, Subject, ("auprc",))
    cohorts = {folder.name: folder for folder in args.test or [args.data_dir]}
    for test in tqdm(tests, desc="testing", unit="run"):
        if all(Point(cohort, *test, SMOOTH[0]) in rows for cohort in cohorts):
            continue
        for point, row, of_subjects in measure(args, test, cohorts):
            rows[point] = row
            subjects |= of_subjects
        write_points(subjects_csv, Subject, ("auprc",), subjects)
        write_points(args.csv, Point, tuple(SCORES), rows)
    show(rows, subjects)
    draw(rows, args.figure)
    print(f"\n{args.csv}\n{subjects_csv}\n{args.figure}")


def parse_args() -> argparse.Namespace:
    parser = plan.experiment_parser(
        __doc__,
        logdir=Path("experiments/comparison"),
        csv=(
            Path("experiments/comparison.csv"),
            "file of the scores; those of subjects go to *_subjects.csv beside it",
        ),
        figure=Path("experiments/comparison.png"),
    )
    plan.add_methods(parser, list(plan.METHODS), [*plan.SINGLE_INPUT, next(iter(plan.ONE_WAY))])
    add = parser.add_argument
    add("--test", type=Path, nargs="*", default=[], help="other folders of slices to test on, all of them together")
    add("--iterations", type=int, help="training steps of each network (default: the config's)")
    select = "checkpoints to test: of all saved the best on the validation slices, or the newest EMA"
    add("--select", default="validation", choices=["validation", "newest"], help=select)
    return require_at_least(parser.parse_args(), workers=1, iterations=1)


def left_of(args: argparse.Namespace, trainings: Sequence[Training]) -> list[Training]:
    """Return the trainings that have not ended."""
    import config as configs

    iterations = args.iterations or configs.get_config(args.dataset).score_model.training.iterations
    return [one for one in trainings if not plan.ended(args, one, iterations)]


def print_plan(args: argparse.Namespace, tests: Sequence[Test], trainings: Sequence[Training]) -> None:
    """Print the trainings and tests to run, with an estimate of the training time from one step of each network."""
    import config as configs
    from models import load_method
    from models.training import seconds_a_step
    from utils.device import pick_device

    config = configs.get_config(args.dataset)
    iterations = args.iterations or config.score_model.training.iterations
    left = [one.model_name for one in left_of(args, trainings)]
    device = pick_device(args.gpu_id)
    print(f"{len(trainings)} trainings, {len(left)} of them to be done, {iterations:,} steps each; {len(tests)} tests")
    total = 0.0
    for name in sorted(set(left)):
        method = load_method(name)
        if method.fit is None:
            seconds = iterations * seconds_a_step(method, config, device)
            total += left.count(name) * seconds
            print(f"  {left.count(name)} × {name}: about {seconds / 60:,.0f} minutes each")
    print(f"about {total / 3600:,.1f} hours of training in total, shared by {args.workers} workers; then the tests")


def measure(
    args: argparse.Namespace, test: Test, cohorts: Mapping[str, Path]
) -> Iterator[tuple[Point, Row, dict[Subject, Row]]]:
    """Score the test slices of every cohort: the published score with every filter, and the chosen one.

    The validation slices of `--data_dir` choose the checkpoint, the score and its thresholds.
    """
    from evaluation.choice import slices_to_choose_on
    from evaluation.evaluate import evaluate_parts
    from evaluation.metrics import RIM
    from evaluation.report import better_sign, choose_scores, score_functions, scored
    from evaluation.subjects import subject_of
    from scoring.scorer import Scorer, maps_in_memory
    from scoring.selection import best_on_validation
    from utils.device import pick_device
    from utils.storage import Folder

    device = pick_device(args.gpu_id)
    chain = plan.chain_of(args, test)
    slices = plan.load_cohorts(chain, cohorts)
    if args.select == "validation":
        chain = best_on_validation(chain, Folder(args.logdir / f"seed{test.seed}"), slices["val"], device)
    maps, _ = maps_in_memory(Scorer(chain, device), slices)
    sign = better_sign(slices_to_choose_on(maps["val"]))
    choices = choose_scores(test._asdict(), maps, plan.grid_of(args), sign)
    of_score = score_functions("none", sign, choices)
    keys = {test.method: ("scores", "chosen")}
    if test.method == REFERENCE:  # the intensity is the same for every method
        keys[INTENSITY] = "intensity", "chosen_intensity"
    functions = {}
    for name, (published, chosen) in keys.items():
        for smooth in FILTERS:
            functions[name, smooth] = partial(filtered, of_score[published], smooth), RIM
        functions[name, "chosen"] = of_score[chosen], choices[chosen].settings.rim
    for cohort, ((name, smooth), (score, rim)) in product(cohorts, functions.items()):
        found = evaluate_parts(scored(maps[cohort], score), scored(maps["val"], score), rim)
        point = Point(cohort, test.input, test.trans, name, test.seed, smooth)
        row = dict.fromkeys(SCORES) | {"auprc": found.summary["auprc"]}
        row |= {f"{choice}_dice": found.summary[choice]["dice"] for choice in ("oracle", "validation")}
        subjects = [subject_of(one) for part in maps[cohort] for one in part["names"]]
        if whole := found.summary["by_subject"]:
            row["subject_dice"] = whole["healthy"]["dice"]
            row["false_positives"] = whole["healthy"]["healthy"]["false_positives"]
            row["detection"] = whole["detection"]["subject"]["auroc"]
            subjects = found.per_subject["subject"].tolist()
        auprc = (found.per_subject or found.per_slice)["auprc"]
        named = zip(subjects, auprc, strict=True)
        yield point, row, {Subject(*point, subject): {"auprc": float(value)} for subject, value in named}


def filtered(score: Callable[[Mapping], Any], smooth: str, part: Mapping) -> Any:
    """Return the scores of a part under a median filter."""
    from evaluation.scores import smooth_scores

    return smooth_scores(score(part), smooth)


# ----------------------------------------------------------------------------------------------------------
# Table and figure


def show(rows: Mapping[Point, Row], subjects: Mapping[Subject, Row]) -> None:
    """Print a row for every method: mean and range over seeds, and the paired bootstrap against Cyclic UNet."""
    for key, methods in by_cycle(rows).items():
        input, trans, smooth = key
        lines = []
        for method, found in methods.items():
            values = [[row[score] for row in found] for score in SCORES]
            cells = ["—" if None in of_seeds else over_seeds(of_seeds) for of_seeds in values]
            lines.append([label(method, input), *cells, difference(subjects, key, method)])
        print(f"\n{input} → {trans} → {input}, {WORDS[smooth]}")
        print_table([input, *SCORES.values(), "mean AUPRC of a subject − Cyclic UNet's"], lines)
    print(
        "mean (range) over seeds and cohorts; [95 % interval of a paired bootstrap over subjects, of means over seeds]"
    )


def by_cycle(rows: Mapping[Point, Row]) -> dict[tuple[str, str, str], dict[str, list[Row]]]:
    """Group rows by input, trans and smoothing, then by method; baselines appear in every cycle of their input."""
    cycles = list(dict.fromkeys((point.input, point.trans) for point in rows if point.input != point.trans))
    found: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for (input, trans), smooth in product(cycles, SMOOTH):
        for point, row in rows.items():
            if point.smooth == smooth and point.input == input and point.trans in (input, trans):
                found.setdefault((input, trans, smooth), {}).setdefault(point.method, []).append(row)
    return found


def label(method: str, input: str) -> str:
    """Return a method's title."""
    from evaluation.results import TITLES

    return TITLES.get(method, f"intensity ({input})")


def difference(subjects: Mapping[Subject, Row], key: tuple[str, str, str], method: str) -> str:
    """Return the mean difference of a subject's AUPRC, averaged over seeds, to Cyclic UNet's, with its interval."""
    input, trans, smooth = key
    by_subject: dict[str, dict[tuple[str, str], list[float]]] = {method: {}, REFERENCE: {}}
    for point, row in subjects.items():
        fits = point.input == input and point.trans in (input, trans) and point.smooth == smooth
        if fits and point.method in by_subject and row["auprc"] is not None and not isnan(row["auprc"]):
            by_subject[point.method].setdefault((point.cohort, point.name), []).append(row["auprc"])
    shared = sorted(set(by_subject[method]) & set(by_subject[REFERENCE]))
    if method == REFERENCE or not shared:
        return "—"
    return paired_difference(*([mean(by_subject[name][one]) for one in shared] for name in (method, REFERENCE)))


def draw(rows: Mapping[Point, Row], path: Path) -> None:
    """Draw AUPRC, a panel for each cycle: a bar for the mean over seeds of every method and score, a dot for each."""
    from matplotlib.figure import Figure

    found = by_cycle(rows)
    cycles = list(dict.fromkeys((input, trans) for input, trans, _ in found))
    figure = Figure(figsize=(4.2 * len(cycles) + 1, 4.6), layout="constrained")
    axes = figure.subplots(1, len(cycles), sharex=True, squeeze=False)[0]
    for ax, (input, trans) in zip(axes, cycles, strict=True):
        methods = list(found[input, trans, SMOOTH[0]])
        for i, smooth in enumerate(SMOOTH):
            values = [[row["auprc"] for row in found[input, trans, smooth][method]] for method in methods]
            places = [k + 0.28 * (i - 1) for k in range(len(methods))]
            ax.barh(places, list(map(mean, values)), 0.26, color=COLOURS[smooth], label=WORDS[smooth])
            for place, group in zip(places, values, strict=True):
                ax.plot(group, [place] * len(group), ".", color="black", markersize=4)
        ax.set_yticks(range(len(methods)), [label(method, input) for method in methods])
        ax.invert_yaxis()
        ax.set(title=f"{input} → {trans} → {input}", xlabel="AUPRC, test slices", xlim=(0, 1))
    save_figure(figure, path, ncols=3)


if __name__ == "__main__":
    run(main)

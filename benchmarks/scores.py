"""The gain of the chosen score: on fresh cohorts, by parts, on rescaled scans, combined, with few slices to choose on.

    python benchmarks/scores.py --data_dir ./datasets/phantom --test ./datasets/fresh201 ./datasets/fresh202

Scores are chosen on the validation slices of `--data_dir` and judged on the test slices of the other cohorts. The
networks are those of benchmarks/comparison.py; missing ones are trained. Error maps are kept, so an interrupted run
resumes with the same command.
"""

import argparse
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared import plan
from benchmarks.shared.plan import Test
from benchmarks.shared.script import over_seeds, paired_difference, print_table, require_at_least, with_range
from utils.cli import run

Groups = dict[str, dict[str, Any]]  # error maps by cohort; `val` and `test` are those of --data_dir
INTENSITY = "intensity"
MATCHES = ("none", "scan", "affine")

# The five parts of the robust score, by the settings that leave them out.
PARTS = {
    "sign": {"sign": "both"},
    "calibration": {"calibration": "none"},
    "match": {"match": "none"},
    "absolute, Gaussian": {"norm": "squared", "smoothing": "median", "width": 2 / 64},
    "rim": {"rim": 4.0},
}


class Score(NamedTuple):
    """Scores [N, H, W] by cohort, the rim of the brain mask that is cut, and the settings they were computed with."""

    maps: Mapping[str, Any]
    rim: float
    settings: Any = None


class Study(NamedTuple):
    """Error maps and chosen scores by (input, method, seed); the intensity is one of the methods."""

    args: argparse.Namespace
    runs: dict[tuple[str, str, int], Groups]
    chosen: dict[tuple[str, str, int], Score]

    def methods(self, *others: str) -> list[tuple[str, str]]:
        """Return every input with every method, after the `others`."""
        inputs = dict.fromkeys(input for input, *_ in self.runs)
        return list(product(inputs, (*others, *self.args.methods)))

    def seeds(self, input: str, method: str) -> list[tuple[Groups, Score]]:
        """Return error maps and chosen score of every seed."""
        return [(self.runs[input, method, seed], self.chosen[input, method, seed]) for seed in self.args.seeds]


def main() -> None:
    args = parse_args()
    tests = plan.list_tests(args)
    missing = [one for one in plan.list_trainings(args, tests) if not plan.ended(args, one, args.iterations)]
    plan.train_all(args, missing, lambda training: {"iterations": args.iterations})

    from tqdm import tqdm

    from evaluation.report import better_sign, choose_scores, score_functions

    study, grid = Study(args, {}, {}), plan.grid_of(args)
    for test in tqdm(tests, desc="choosing", unit="run"):
        groups = maps_of(args, test)
        scored = {name: group for name, group in groups.items() if name != "test"}
        sign = better_sign(groups["val"])
        choices = choose_scores(test._asdict(), {name: [group] for name, group in scored.items()}, grid, sign)
        functions = score_functions("none", sign, choices)
        for method, key in ((test.method, "chosen"), (INTENSITY, "chosen_intensity")):
            place, settings = (test.input, method, test.seed), choices[key].settings
            study.runs.setdefault(place, groups)
            maps = {name: functions[key](group) for name, group in scored.items()}
            study.chosen.setdefault(place, Score(maps, settings.rim, settings))
    for show in (show_chosen, show_parts, show_rescaled, show_combined, show_draws):
        print(f"\n{show.__doc__}")
        show(study)


def parse_args() -> argparse.Namespace:
    parser = plan.experiment_parser(
        __doc__,
        iterations=(1200, "training steps of each network"),
        draws=(20, "draws of validation slices, of 8, 16 and 32 each"),
        logdir=Path("experiments/comparison"),
        maps=(Path("experiments/scores"), "folder of the error maps"),
    )
    plan.add_methods(parser, list(plan.SINGLE_INPUT), list(plan.SINGLE_INPUT))
    test = "other folders of slices, whose test slices the scores are judged on"
    parser.add_argument("--test", type=Path, nargs="+", required=True, help=test)
    return require_at_least(parser.parse_args(), iterations=1, workers=1, draws=0)


def maps_of(args: argparse.Namespace, test: Test) -> Groups:
    """Return the error maps of a run, from `--maps` if they are there."""
    import numpy as np

    from scoring.scorer import Scorer, maps_in_memory
    from utils.device import pick_device

    path = args.maps / f"{test.method}_{test.input}_{test.seed}.npz"
    cohorts = {"test": args.data_dir} | {folder.name: folder for folder in args.test}
    if not path.is_file():
        chain = plan.chain_of(args, test)
        maps, _ = maps_in_memory(Scorer(chain, pick_device(args.gpu_id)), plan.load_cohorts(chain, cohorts))
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{name}/{key}": value for name, (group,) in maps.items() for key, value in group.items()}
        np.savez_compressed(path, **arrays)
    groups: Groups = {name: {} for name in ("val", *cohorts)}
    with np.load(path) as file:
        for cohort, key in (name.split("/") for name in file.files):
            if cohort in groups:
                groups[cohort][key] = file[f"{cohort}/{key}"]
    return groups


# ----------------------------------------------------------------------------------------------------------
# Scores and their evaluation


def published(groups: Groups, method: str) -> Score:
    """Compute the published score under the median filter of `fast`; the intensity with the better sign on `val`."""
    from evaluation.metrics import RIM
    from evaluation.report import better_sign
    from evaluation.scores import smooth_scores

    sign, key = (better_sign(groups["val"]), "image") if method == INTENSITY else (1, "scores")
    maps = {name: smooth_scores(sign * group[key], "median5") for name, group in cohorts_of(groups).items()}
    return Score(maps, RIM)


def fitted(groups: Groups, settings: Any) -> Score:
    """Compute a score with constants fitted on validation slices."""
    from evaluation.scores import anomaly_map, fit_constants

    constants = fit_constants(groups["val"], settings)
    maps = {name: anomaly_map(group, settings, constants) for name, group in cohorts_of(groups).items()}
    return Score(maps, settings.rim, settings)


def robust(input: str) -> Any:
    """Return the settings used where nothing can be chosen."""
    from evaluation.scores import BRIGHT_LESIONS, ScoreSettings

    return ScoreSettings("bright" if input in BRIGHT_LESIONS else "dark")


def cohorts_of(groups: Groups) -> Groups:
    """Return the maps that scores are judged on."""
    return {name: group for name, group in groups.items() if name not in ("val", "test")}


def judge(groups: Groups, score: Score) -> tuple[float, Any]:
    """Return the pooled AUPRC, averaged over cohorts, and the AUPRC of every subject of all of them."""
    import numpy as np

    from evaluation.metrics import average_precision, ranked_scores

    values, of_subjects = [], []
    for name, group in cohorts_of(groups).items():
        arrays = score.maps[name], group["truth"], group["brainmask"]
        values.append(average_precision(*ranked_scores(*arrays, score.rim)))
        slices = ([array[None] for array in of_slice] for of_slice in zip(*arrays, strict=True))
        of_subjects += [average_precision(*ranked_scores(*one, score.rim)) for one in slices]
    return mean(values), np.array(of_subjects)


def pooled(judged: list) -> str:
    """Return the mean and range over seeds of the pooled AUPRC; `judged` has a result of `judge` for each seed."""
    return over_seeds([value for value, _ in judged])


def interval(a: list, b: list) -> str:
    """Return the difference of subjects' AUPRC, averaged over seeds, with its interval; a and b as in `pooled`."""
    return paired_difference(*(sum(one for _, one in side) / len(side) for side in (a, b)))


# ----------------------------------------------------------------------------------------------------------
# Tables


def show_chosen(study: Study) -> None:
    """The chosen score against the published one, the robust one, and the intensity's chosen score."""
    from evaluation.tables import describe_score

    lines, words, intensity = [], [], {}
    for input, method in study.methods(INTENSITY):
        median5, chosen, default = [], [], []
        for seed, (groups, score) in zip(study.args.seeds, study.seeds(input, method), strict=True):
            median5.append(judge(groups, published(groups, method)))
            chosen.append(judge(groups, score))
            if method != INTENSITY:
                default.append(judge(groups, fitted(groups, robust(input))))
            words.append(f"{input}, {method}, seed {seed}: {describe_score(score.settings._asdict())}")
        intensity.setdefault(input, chosen)
        cells = [pooled(values) if values else "" for values in (median5, chosen, default)]
        lines.append([input, method, *cells, interval(chosen, median5), interval(chosen, intensity[input])])
    print_table(["input", "method", "median5", "chosen", "robust", "chosen − median5", "− intensity, chosen"], lines)
    print(*words, sep="\n")


def show_parts(study: Study) -> None:
    """Each of the five parts alone, added to a score that has none, and left out of the one that has all."""
    lines = []
    for input, method in study.methods():
        everything = robust(input)
        nothing = everything._replace(**{key: value for part in PARTS.values() for key, value in part.items()})
        kinds = {"none of them": nothing, "all of them": everything}
        for part, without in PARTS.items():
            kinds[f"{part} alone"] = nothing._replace(**{key: getattr(everything, key) for key in without})
            kinds[f"without {part}"] = everything._replace(**without)
        seeds = study.seeds(input, method)
        found = {kind: [judge(groups, fitted(groups, one)) for groups, _ in seeds] for kind, one in kinds.items()}
        for kind, values in found.items():
            against = found["all of them" if kind.startswith("without") else "none of them"]
            lines.append([input, method, kind, pooled(values), interval(values, against)])
    print_table(["input", "method", "score", "AUPRC", "difference to none, or to all"], lines)


def show_rescaled(study: Study) -> None:
    """The chosen score, under every match, of scans that are scaled by 0.5 … 2 and shifted at random."""
    lines = []
    for input, method in study.methods():
        cells = []
        for match in MATCHES:
            plain, changed = [], []
            for groups, score in study.seeds(input, method):
                settings = score.settings._replace(match=match)
                plain.append(judge(groups, fitted(groups, settings)))
                groups = groups | {name: rescale(group) for name, group in cohorts_of(groups).items()}
                changed.append(judge(groups, fitted(groups, settings)))
            cells += [pooled(plain), pooled(changed)]
        lines.append([input, method, *cells])
    header = [f"{match}, {kind}" for match in MATCHES for kind in ("as they are", "rescaled")]
    print_table(["input", "method", *header], lines)


def rescale(group: Mapping[str, Any]) -> dict[str, Any]:
    """Scale each scan's intensities by 0.5 … 2, uniformly in the logarithm, and shift them by −1 … 1."""
    import numpy as np

    from evaluation.scores import split_names

    scans, _ = split_names(group["names"])
    rng, n = np.random.default_rng(0), scans.max() + 1
    scale, shift = (values[scans][:, None, None] for values in (2 ** rng.uniform(-1, 1, n), rng.uniform(-1, 1, n)))
    image = np.where(group["brainmask"], scale * group["image"] + shift, group["image"])
    return {**group, "image": image.astype(np.float32)}


def show_combined(study: Study) -> None:
    """The sum of those runs that together have the highest validation AUPRC, against each of them alone."""
    from evaluation.combination import best_combination, standard_weight

    lines, methods = [], (INTENSITY, *study.args.methods)
    for input in dict.fromkeys(input for input, *_ in study.runs):
        found: dict[str, list] = {method: [] for method in ("combined", *methods)}
        taken = []
        for seed in study.args.seeds:
            groups, weighted = study.runs[input, INTENSITY, seed], []
            for method in methods:
                score = study.chosen[input, method, seed]
                found[method].append(judge(groups, score))
                weight = standard_weight(score.maps["val"], groups["val"])
                weighted.append({name: weight * maps for name, maps in score.maps.items()})
            networks = [method != INTENSITY for method in methods]
            best = best_combination(groups["val"], [one["val"] for one in weighted], networks)
            taken.append(" + ".join(methods[i] for i in best))
            sums = {name: sum(weighted[i][name] for i in best) for name in weighted[0]}
            found["combined"].append(judge(groups, Score(sums, 0.0)))
        lines.append([input, "combined", pooled(found["combined"]), "; ".join(taken)])
        for method in methods:
            lines.append([input, method, pooled(found[method]), interval(found["combined"], found[method])])
    print_table(["input", "score", "AUPRC", "combined − this"], lines)


def show_draws(study: Study) -> None:
    """The cost of choosing on few slices of the first seed, against the best of all scores on the judged slices."""
    import numpy as np
    from tqdm import tqdm

    from evaluation.choice import applicable, choose, grid_auprc

    lines, rng = [], np.random.default_rng(0)
    for input, method in study.methods() if study.args.draws else ():
        groups, _ = study.seeds(input, method)[0]
        pool = {key: np.concatenate([groups["val"][key], groups["test"][key]]) for key in groups["val"]}
        grid, before = applicable(pool, plan.grid_of(study.args)), judge(groups, published(groups, method))[0]
        # With constants fitted on the judged slices themselves, so slightly optimistic.
        judged = cohorts_of(groups).values()
        each = [dict(grid_auprc(group, grid, np.ones((1, len(group["names"])), int))) for group in judged]
        best = max(mean(float(of_cohort[one][0]) for of_cohort in each) for one in grid)
        for n in (8, 16, 32):
            found = []
            for _ in tqdm(range(study.args.draws), desc=f"{input}, {method}, {n} slices", leave=False):
                rows = rng.choice(len(pool["names"]), n, replace=False)
                drawn = groups | {"val": {key: values[rows] for key, values in pool.items()}}
                found.append(judge(groups, fitted(drawn, choose(drawn["val"], grid, input).settings))[0])
            worse = mean(value < before for value in found)
            cells = [f"{before:.3f}", with_range(found, digits=3), f"{best:.3f}"]
            lines.append([input, method, str(n), *cells, f"{best - mean(found):.3f}", f"{100 * worse:.0f} %"])
    header = ["input", "method", "slices", "median5", "chosen", "best on test", "cost", "worse than median5"]
    print_table(header, lines)


if __name__ == "__main__":
    run(main)

"""What the chosen score is worth: on fresh cohorts, by parts, on rescaled scans, and with few slices to choose on.

    python benchmarks/scores.py --data_dir ./datasets/phantom --test ./datasets/fresh201 ./datasets/fresh202

Every score is chosen on the validation slices of `--data_dir` and judged on the test slices of the other cohorts. The
networks are those of benchmarks/comparison.py, trained where they are missing; their error maps are kept. Interrupted,
the same command resumes.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.plan import METHODS, chain_of, cycle, ended, grid_of, needed, train, translates
from benchmarks.shared.points import over_seeds
from benchmarks.shared.timing import print_table
from utils.cli import ArgumentParser, UserError, run

Groups = dict[str, dict[str, Any]]  # error maps by cohort; `val` and `pool` are of the one that is chosen on
INTENSITY = "intensity"
MATCHES = ("none", "scan", "affine")

# What each of the five brings: it alone, added to today's score, and left out of the robust one.
PARTS = {
    "sign": {"sign": "both"},
    "calibration": {"calibration": "none"},
    "match": {"match": "none"},
    "absolute, Gaussian": {"norm": "squared", "smoothing": "median", "width": 2 / 64},
    "rim": {"rim": 4.0},
}


def main() -> None:
    args = parse_args()
    plan = [
        (input, trans if translates(method) else input, method, seed)
        for seed, method, (input, trans) in product(args.seeds, args.methods, args.cycles)
    ]
    trainings = list(dict.fromkeys(training for one in plan for training in needed(args, *one)))
    with ThreadPoolExecutor(args.workers) as pool:
        from tqdm import tqdm

        missing = [one for one in trainings if not ended(args, one, args.iterations)]
        list(tqdm(pool.map(lambda one: train(args, one), missing), total=len(missing), desc="training", unit="network"))
    runs = {(input, method, seed): maps_of(args, input, trans, method, seed) for input, trans, method, seed in plan}
    grid = grid_of(args)
    keys = [(input, method, seed) for input, method in by_method(args, runs) for seed in args.seeds]
    choices = {
        (input, method, seed): chosen(of(runs, args, input, method, seed)["val"], input, method, grid)
        for input, method, seed in tqdm(keys, desc="choosing", unit="score")
    }
    for show in (show_chosen, show_parts, show_rescaled, show_combined, show_draws):
        print(f"\n{show.__doc__.splitlines()[0]}")
        show(args, runs, choices)


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dataset", default="phantom", help="whose config is used: phantom (the demo's size) or brats (the paper's)")
    add("--data_dir", type=Path, default=Path("datasets/phantom"), help="preprocessed slices to train and choose on")
    add("--test", type=Path, nargs="+", required=True, help="other folders of slices, whose test slices are judged on")
    add("--gpu_id", default="0", help="number of the CUDA device, or cpu")
    cycles = "modalities at hand and translated to, as INPUT:TRANS"
    add("--cycles", type=cycle, nargs="+", default=[("flair", "t2"), ("t2", "flair"), ("t1", "t2")], help=cycles)
    methods = [method for method in METHODS if not method.startswith("one_way")]
    add("--methods", nargs="+", default=methods, choices=methods, help="whose scores are chosen")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, data order and noise; one run each")
    add("--iterations", type=int, default=1200, help="training steps of each network")
    add("--draws", type=int, default=20, help="of validation slices, of 8, 16 and 32 each")
    workers = "trainings at a time, with one thread each if several"
    add("--workers", type=int, default=os.cpu_count() or 1, help=workers)
    add("--logdir", type=Path, default=Path("experiments/comparison"), help="folder of all trainings")
    add("--maps", type=Path, default=Path("experiments/scores"), help="folder of their error maps")
    args = parser.parse_args()
    if args.iterations < 1 or args.workers < 1 or args.draws < 0:
        raise UserError("--iterations and --workers must be at least 1, and --draws at least 0")
    return args


def maps_of(args: argparse.Namespace, input: str, trans: str, method: str, seed: int) -> Groups:
    """The error maps of a run: `val`, `pool` (validation and test slices of --data_dir) and each other cohort."""
    import numpy as np

    from scoring.scorer import Scorer, create_maps, load_slices
    from utils.device import pick_device

    path = args.maps / f"{method}_{input}_{seed}.npz"
    if not path.is_file():
        chain = chain_of(args, input, trans, method, seed)
        slices = {split: load_slices(chain, split) for split in ("val", "test")}
        if slices["val"] is None:
            raise UserError(f"{args.data_dir} has no validation slices: preprocess some")
        for cohort in args.test:
            chain.config.data.data_dir = str(cohort)
            slices[cohort.name] = load_slices(chain, "test")
        maps, _ = create_maps(Scorer(chain, pick_device(args.gpu_id)), slices)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"{name}/{key}": value for name, group in maps.items() for key, value in group.items()}
        np.savez_compressed(path, **arrays)
    groups: Groups = {}
    with np.load(path) as file:
        for name in file.files:
            if "/" in name:
                cohort, key = name.split("/")
                groups.setdefault(cohort, {})[key] = file[name]
    groups["pool"] = {key: np.concatenate([groups["val"][key], groups["test"][key]]) for key in groups["val"]}
    return {name: groups[name] for name in ("val", "pool", *(one.name for one in args.test))}


# ----------------------------------------------------------------------------------------------------------
# Scores, and how they are judged

Score = Callable[[Mapping[str, Any]], tuple[Any, float]]  # of a group of maps: scores [N, H, W], and their rim


def published(method: str) -> Score:
    """Today's score: as `fast` has it for MMCCD, and under the same median filter for all others."""
    from evaluation.metrics import RIM
    from evaluation.scores import smooth_scores

    return lambda group: (smooth_scores(group["image" if method == INTENSITY else "scores"], "median5"), RIM)


def fitted(val: Mapping[str, Any], settings: Any) -> Score:
    """A score whose constants are those of validation slices."""
    from evaluation.scores import anomaly_map, fit_constants

    constants = fit_constants(val, settings)
    return lambda group: (anomaly_map(group, settings, constants), settings.rim)


def chosen(val: Mapping[str, Any], input: str, method: str, grid: list) -> tuple[Score, Any]:
    """The score that is chosen on validation slices, and its settings; of the intensity likewise."""
    from evaluation.choice import choose, intensity_grid
    from evaluation.report import better_sign
    from evaluation.scores import anomaly_map, intensity_maps

    if method != INTENSITY:
        found = choose(val, grid, input)
        return lambda group: (anomaly_map(group, *found[:2]), found.settings.rim), found.settings
    sign, options = intensity_grid(grid, "bright" if better_sign(val) > 0 else "dark")
    found = choose(intensity_maps(val, sign), options, input)
    return lambda group: (anomaly_map(intensity_maps(group, sign), *found[:2]), found.settings.rim), found.settings


def auprc(group: Mapping[str, Any], score: Score) -> tuple[float, Any]:
    """The AUPRC of all pixels together, and of each slice [N], which is a subject."""
    import numpy as np

    from evaluation.metrics import average_precision, ranked_scores

    scores, rim = score(group)
    of_slices = [
        average_precision(*ranked_scores(*(one[None] for one in of_slice), rim))
        for of_slice in zip(scores, group["truth"], group["brainmask"], strict=True)
    ]
    return average_precision(*ranked_scores(scores, group["truth"], group["brainmask"], rim)), np.array(of_slices)


def by_method(args: argparse.Namespace, runs: Mapping) -> Iterator[tuple[str, str]]:
    """Every input and method, the intensity first."""
    for input in dict.fromkeys(input for input, *_ in runs):
        yield from ((input, method) for method in (INTENSITY, *args.methods))


def of(runs: Mapping, args: argparse.Namespace, input: str, method: str, seed: int) -> Groups:
    """The error maps of a run; for the intensity those of any."""
    return runs[input, args.methods[0] if method == INTENSITY else method, seed]


def cohorts(groups: Groups) -> dict[str, dict[str, Any]]:
    """The maps that are judged on."""
    return {name: group for name, group in groups.items() if name not in ("val", "pool")}


def interval(a: list, b: list) -> str:
    """How much higher the AUPRC of a subject is: a paired bootstrap of means over seeds; a and b as from `judged`."""
    import numpy as np

    from evaluation.metrics import paired_bootstrap

    difference, (low, high) = paired_bootstrap(*(np.mean([one for _, one in side], axis=0) for side in (a, b)))
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def judged(groups: Groups, score: Score) -> tuple[float, Any]:
    """The mean over cohorts of the pooled AUPRC, and the AUPRC of every subject of all of them."""
    import numpy as np

    pooled, of_subjects = zip(*(auprc(group, score) for group in cohorts(groups).values()), strict=True)
    return mean(pooled), np.concatenate(of_subjects)


# ----------------------------------------------------------------------------------------------------------
# What is shown


def show_chosen(args: argparse.Namespace, runs: Mapping, choices: Mapping) -> None:
    """The chosen score against today's, the robust one, and the intensity that was treated alike."""
    from evaluation.tables import score_words

    lines, words, intensity = [], [], {}
    for input, method in by_method(args, runs):
        found: dict[str, list] = {"median5": [], "chosen": [], "robust": []}
        for seed in args.seeds:
            groups, (score, settings) = of(runs, args, input, method, seed), choices[input, method, seed]
            found["median5"].append(judged(groups, oriented(published(method), groups, method)))
            found["chosen"].append(judged(groups, score))
            if method != INTENSITY:
                found["robust"].append(judged(groups, fitted(groups["val"], robust(input))))
            words.append(f"{input}, {method}, seed {seed}: {score_words(settings._asdict())}")
        if method == INTENSITY:
            intensity[input] = found["chosen"]
        cells = [over_seeds([value for value, _ in values]) if values else "" for values in found.values()]
        differences = interval(found["chosen"], found["median5"]), interval(found["chosen"], intensity[input])
        lines.append([input, method, *cells, *differences])
    print_table(["input", "method", "median5", "chosen", "robust", "chosen − median5", "− intensity, chosen"], lines)
    print(*words, sep="\n")


def robust(input: str) -> Any:
    """The settings that are taken where nothing can be chosen."""
    from evaluation.scores import BRIGHT_LESIONS, ScoreSettings

    return ScoreSettings("bright" if input in BRIGHT_LESIONS else "dark")


def oriented(score: Score, groups: Groups, method: str) -> Score:
    """The intensity's score with the sign that finds more on validation slices."""
    from evaluation.report import better_sign

    sign = better_sign(groups["val"]) if method == INTENSITY else 1
    return lambda group: (sign * score(group)[0], score(group)[1])


def show_parts(args: argparse.Namespace, runs: Mapping, choices: Mapping) -> None:
    """Each of the five parts alone, added to a score that has none, and left out of the one that has all."""
    lines = []
    for input, method in by_method(args, runs):
        if method == INTENSITY:
            continue
        everything = robust(input)
        nothing = everything._replace(**{key: value for part in PARTS.values() for key, value in part.items()})
        kinds = {"none of them": nothing, "all of them": everything}
        for part, without in PARTS.items():
            kinds[f"{part} alone"] = nothing._replace(**{key: getattr(everything, key) for key in without})
            kinds[f"without {part}"] = everything._replace(**without)
        seeds = [of(runs, args, input, method, seed) for seed in args.seeds]
        found = {kind: [judged(groups, fitted(groups["val"], one)) for groups in seeds] for kind, one in kinds.items()}
        for kind, values in found.items():
            against = found["all of them" if kind.startswith("without") else "none of them"]
            lines.append([input, method, kind, over_seeds([value for value, _ in values]), interval(values, against)])
    print_table(["input", "method", "score", "AUPRC", "difference to none, or to all"], lines)


def show_rescaled(args: argparse.Namespace, runs: Mapping, choices: Mapping) -> None:
    """The chosen score, under every match, of scans that are scaled by 0.5 … 2 and shifted at random."""
    lines = []
    for input, method in by_method(args, runs):
        if method == INTENSITY:
            continue
        cells = []
        for match in MATCHES:
            found: dict[str, list[float]] = {"as they are": [], "rescaled": []}
            for seed in args.seeds:
                groups, (_, settings) = of(runs, args, input, method, seed), choices[input, method, seed]
                score = fitted(groups["val"], settings._replace(match=match))
                found["as they are"].append(judged(groups, score)[0])
                found["rescaled"].append(judged({key: rescaled(one) for key, one in cohorts(groups).items()}, score)[0])
            cells += [over_seeds(values) for values in found.values()]
        lines.append([input, method, *cells])
    header = [f"{match}, {kind}" for match in MATCHES for kind in ("as they are", "rescaled")]
    print_table(["input", "method", *header], lines)


def rescaled(group: Mapping[str, Any]) -> dict[str, Any]:
    """The maps with each scan's intensities scaled by 0.5 … 2, evenly in the logarithm, and shifted by −1 … 1."""
    import numpy as np

    from evaluation.scores import scans_of

    scans, _ = scans_of(group["names"])
    rng, n = np.random.default_rng(0), scans.max() + 1
    scale, shift = (values[scans][:, None, None] for values in (2 ** rng.uniform(-1, 1, n), rng.uniform(-1, 1, n)))
    image = np.where(group["brainmask"], scale * group["image"] + shift, group["image"])
    return {**group, "image": image.astype(np.float32)}


def show_combined(args: argparse.Namespace, runs: Mapping, choices: Mapping) -> None:
    """The sum of those runs that have the highest validation AUPRC together, against each of them alone."""
    from evaluation.combination import best_of, standard_weight

    lines = []
    for input in dict.fromkeys(input for input, *_ in runs):
        methods, taken = (INTENSITY, *args.methods), []
        found: dict[str, list] = {method: [] for method in ("combined", *methods)}
        for seed in args.seeds:
            groups = of(runs, args, input, INTENSITY, seed)
            maps = {
                method: {key: choices[input, method, seed][0](group)[0] for key, group in of_method.items()}
                for method in methods
                for of_method in [of(runs, args, input, method, seed)]
            }
            weights = {method: standard_weight(of_method["val"], groups["val"]) for method, of_method in maps.items()}
            weighted = [weights[method] * maps[method]["val"] for method in methods]
            names = [methods[i] for i in best_of(groups["val"], weighted, [one != INTENSITY for one in methods])]
            taken.append(" + ".join(names))
            sums = {key: sum(weights[one] * maps[one][key] for one in names) for key in groups}
            place = {id(group): key for key, group in groups.items()}
            found["combined"].append(judged(groups, lambda group, sums=sums, at=place: (sums[at[id(group)]], 0.0)))
            for method in methods:
                found[method].append(judged(of(runs, args, input, method, seed), choices[input, method, seed][0]))
        for method, values in found.items():
            value = over_seeds([value for value, _ in values])
            lines.append([input, method, value, interval(found["combined"], values) if method != "combined" else ""])
        lines[-len(found)][-1] = "; ".join(taken)
    print_table(["input", "score", "AUPRC", "combined − this"], lines)


def show_draws(args: argparse.Namespace, runs: Mapping, choices: Mapping) -> None:
    """The cost of choosing on few slices of the first seed, against the best of all scores on the judged slices."""
    import numpy as np
    from tqdm import tqdm

    from evaluation.choice import auprc_of_each, possible

    lines, rng = [], np.random.default_rng(0)
    for input, method in by_method(args, runs):
        if method == INTENSITY or not args.draws:
            continue
        groups = of(runs, args, input, method, args.seeds[0])
        grid, before = possible(groups["pool"], grid_of(args)), judged(groups, published(method))[0]
        # With constants of the judged slices themselves, which is a little too good.
        each = [
            dict(auprc_of_each(one, grid, np.ones((1, len(one["names"])), int))) for one in cohorts(groups).values()
        ]
        best = max(mean(float(of_cohort[one][0]) for of_cohort in each) for one in grid)
        for n in (8, 16, 32):
            found = []
            for _ in tqdm(range(args.draws), desc=f"{input}, {method}, {n} slices", leave=False):
                rows = rng.choice(len(groups["pool"]["names"]), n, replace=False)
                some = {key: values[rows] for key, values in groups["pool"].items()}
                found.append(judged(groups, chosen(some, input, method, grid)[0])[0])
            worse = mean(value < before for value in found)
            cells = [f"{before:.3f}", f"{mean(found):.3f} ({min(found):.3f} … {max(found):.3f})", f"{best:.3f}"]
            lines.append([input, method, str(n), *cells, f"{best - mean(found):.3f}", f"{100 * worse:.0f} %"])
    header = ["input", "method", "slices", "median5", "chosen", "best on test", "cost", "worse than median5"]
    print_table(header, lines)


if __name__ == "__main__":
    run(main)

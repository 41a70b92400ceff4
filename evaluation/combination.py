"""Combination of test runs: sums of chosen scores that are standardised on healthy validation pixels."""

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError

from .choice import MAX_THRESHOLDS, slices_to_choose_on
from .metrics import ranked_pixels, scored_region, weighted_auprc, within
from .results import ERROR_MAPS, HEALTHY, MAPS, Maps, Part, Parts, changed_kinds, chosen_score, read_maps, read_metrics
from .scores import anomaly_map, intensity_maps, reference_maps

INTENSITY = "intensity"  # in place of a run: the input intensity of the first run
MAX_RUNS = 10  # all their combinations are evaluated


def combine(runs: Sequence[str]) -> tuple[str, dict[str, Any], Maps]:
    """Sum the chosen scores of test runs, keeping the subset of runs with the highest validation AUPRC.

    Each score is first divided by the distance from its median to its 95th percentile in healthy validation pixels.

    Args:
        runs: folders of test runs, optionally with `INTENSITY`.

    Returns:
        The combined run's name, and its header and error maps for `write_maps`.

    Raises:
        UserError: if a folder holds no test run with a chosen score, or the runs differ in input, slices or image size.
    """
    folders = [Path(run) for run in runs if run != INTENSITY]
    if not folders or not 2 <= len(runs) <= MAX_RUNS or len(set(runs)) < len(runs):
        raise UserError(f"--combine takes 2 to {MAX_RUNS} different runs: result folders, optionally with {INTENSITY}")
    headers, maps = zip(*(read_maps(folder / ERROR_MAPS) for folder in folders), strict=True)
    metrics = [read_metrics(folder) for folder in folders]
    for folder, header, of_run in zip(folders[1:], headers[1:], maps[1:], strict=True):
        require_same_slices(folders[0], headers[0], maps[0], folder, header, of_run)
    if any(header["method"].startswith(("one_way", "combined")) for header in headers):
        raise UserError("--combine does not take one-way or combined runs: leave them out")
    if "val" not in maps[0]:
        raise UserError(f"{folders[0]} has no validation slices to weight scores on: preprocess some and test again")
    sources = [0 if run == INTENSITY else folders.index(Path(run)) for run in runs]
    # Weights and members are chosen on slices that fit into memory.
    val = [slices_to_choose_on(of_run["val"]) for of_run in maps]
    members, scores = [], []
    for run, i in zip(runs, sources, strict=True):
        member = describe_member(run, metrics[i])
        unweighted = member_scores(member, val[i])
        member["weight"] = standard_weight(unweighted, val[i])
        members.append(member)
        scores.append((member["weight"] * unweighted).astype(np.float32))
    methods = "+".join(member["method"] for member in members)
    digest = sha256(" ".join(Path(run).name for run in runs).encode()).hexdigest()[:6]
    best = best_combination(val[0], scores, [run != INTENSITY for run in runs])
    members, sources = [members[i] for i in best], [sources[i] for i in best]

    def summed_part(split: str, i: int) -> Part:
        parts = [maps[source][split][i] for source in sources]
        weighted = (
            (member["weight"] * member_scores(member, part)).astype(np.float32)
            for member, part in zip(members, parts, strict=True)
        )
        return {key: parts[0][key] for key in ("names", HEALTHY, *MAPS)} | {"scores": sum(weighted)}

    summed = {split: Parts(partial(summed_part, split), len(maps[0][split])) for split in ("test", "val")}
    steps = {member["run"]: member["trained_steps"].get("forward") for member in members if member["trained_steps"]}
    header = {
        **{key: headers[0][key] for key in ("input", "image_size", "test_set") if key in headers[0]},
        "trans": headers[0]["input"],
        "method": "combined",
        "score": "combined",
        "sampling_settings": {"smooth": "none"},
        "usual_error": 1.0,
        "checkpoints": {},
        "trained_steps": steps,
        "rim": min(member["settings"]["rim"] for member in members),
        "members": members,
    }
    return f"combined__{methods}__{digest}", header, summed


def require_same_slices(
    first: Path, header: Mapping[str, Any], maps: Maps, other: Path, other_header: Mapping[str, Any], other_maps: Maps
) -> None:
    """Check that two runs scored the same pixels.

    Raises:
        UserError: if their inputs, splits, slices, lesions, brain masks or image sizes differ.
    """
    if header["input"] != other_header["input"]:
        raise UserError(f"{first} and {other} have different inputs, {header['input']} and {other_header['input']}")
    if kinds := changed_kinds(header, other_header):
        raise UserError(f"{first} and {other} differ in their {' and '.join(kinds)} slices: test both on the same data")
    for split in ("test", "val"):
        if (split in maps) != (split in other_maps):
            raise UserError(f"only one of {first} and {other} has {split} slices: test both on the same data")
        for part, other_part in zip_longest(maps.get(split, ()), other_maps.get(split, ()), fillvalue={}):
            for key in ("names", "truth", "brainmask"):
                if not np.array_equal(part.get(key), other_part.get(key)):
                    raise UserError(
                        f"{first} and {other} differ in the {key} of their {split} slices: test both on the same data, "
                        "at the same image size"
                    )


def describe_member(run: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of a combined run's member for metrics.json, without its weight.

    Raises:
        UserError: if the run has no chosen score.
    """
    is_intensity = run == INTENSITY
    block = metrics["baseline_intensity"].get("chosen") if is_intensity else metrics.get("chosen")
    if not block:
        raise UserError(f"{run} has no chosen score: score it again with --rescore")
    chosen_score(block)
    return {
        "run": run,
        "method": INTENSITY if is_intensity else metrics["method"],
        **{key: metrics[key] for key in ("input", "trans", "sampling_settings", "image_size")},
        "checkpoints": {} if is_intensity else metrics["checkpoints"],
        "trained_steps": {} if is_intensity else metrics["trained_steps"],
        **{key: metrics[key] for key in ("weights", "precision") if key in metrics and not is_intensity},
        **{key: block[key] for key in ("settings", "constants")},
    }


def member_scores(member: Mapping[str, Any], part: Part) -> np.ndarray:
    """Return the chosen score of a member, float32 [n, H, W], 0 outside its scored region."""
    settings, constants = chosen_score(member)
    maps = intensity_maps(part, settings.sign) if member["method"] == INTENSITY else reference_maps(part)
    return np.where(scored_region(maps["brainmask"], settings.rim), anomaly_map(maps, settings, constants), 0)


def standard_weight(scores: np.ndarray, val: Mapping[str, Any]) -> float:
    """Return 1 / (95th percentile − median) of the scores of healthy validation pixels."""
    healthy = scores[val["brainmask"] & ~val["truth"]]
    median, high = np.quantile(healthy, [0.5, 0.95]) if healthy.size else (0.0, 1.0)
    return 1 / max(float(high - median), 1e-6)


def best_combination(val: Mapping[str, Any], scores: Sequence[np.ndarray], networks: Sequence[bool]) -> list[int]:
    """Return the indices of the runs whose summed validation scores have the highest AUPRC; all if there is no lesion.

    `networks` marks the runs with networks; at least one of these is included.
    """
    indices = list(range(len(scores)))
    if not val["truth"].any():
        print("no lesions in the validation slices: combining all runs")
        return indices
    ranked, once = ranked_pixels(val["truth"], val["brainmask"]), np.ones((1, len(val["truth"])), dtype=int)
    truth = within(val["truth"], ranked)
    auprc = {}
    for n in range(1, len(scores) + 1):
        for subset in (subset for subset in combinations(indices, n) if any(networks[i] for i in subset)):
            total = np.where(val["brainmask"], sum(scores[i] for i in subset), -np.inf)
            auprc[subset] = float(weighted_auprc(within(total, ranked), truth, once, MAX_THRESHOLDS)[0])
    best = max(auprc, key=auprc.get)
    print(f"chose the best of {len(auprc)} combinations: validation AUPRC {auprc[best]:.3f}")
    return list(best)

"""Several test runs as one: their chosen scores, standardised on healthy validation pixels and summed."""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import UserError

from .choice import THRESHOLDS
from .metrics import ranked_pixels, scored_region, weighted_auprc
from .results import ERROR_MAPS, MAPS, Maps, chosen_score, read_maps, read_metrics
from .scores import anomaly_map, compared, intensity_maps

INTENSITY = "intensity"  # stands for the bare intensity of the first run among the runs
MOST = 10  # runs, of which every combination is tried


def combine(runs: Sequence[str]) -> tuple[str, dict[str, Any], Maps]:
    """Sum the scores of test runs; return the combined run's name, header and error maps for `write_maps`.

    Each run's chosen score is divided by the distance of the median to the 95th percentile in healthy validation
    pixels, and the scores are summed: those of the runs that together have the highest validation AUPRC.

    Args:
        runs: folders of test runs, and `INTENSITY`.

    Raises:
        UserError: if a folder is no test run with a chosen score, or its slices, lesions, size or input are others.
    """
    folders = [Path(one) for one in runs if one != INTENSITY]
    if not folders or not 2 <= len(runs) <= MOST or len(set(runs)) < len(runs):
        raise UserError(f"--combine takes 2 to {MOST} different runs: folders of test runs, and the word {INTENSITY}")
    headers, maps = zip(*(read_maps(folder / ERROR_MAPS) for folder in folders), strict=True)
    metrics = [read_metrics(folder) for folder in folders]
    for folder, header, of_run in zip(folders[1:], headers[1:], maps[1:], strict=True):
        require_same_slices(folders[0], headers[0], maps[0], folder, header, of_run)
    if any(header["method"].startswith(("one_way", "combined")) for header in headers):
        raise UserError("--combine takes runs that need a single modality, and none that is combined already")
    if "val" not in maps[0]:
        raise UserError(
            f"{folders[0]} has no validation slices, which say how scores compare: preprocess some, and test"
        )
    members, scores = [], []
    for run in runs:
        place = folders.index(Path(run)) if run != INTENSITY else 0
        member, found = member_scores(run, metrics[place], maps[place])
        members.append(member)
        scores.append(found)
    methods = "+".join(member["method"] for member in members)
    digest = sha256(" ".join(Path(run).name for run in runs).encode()).hexdigest()[:6]
    taken = best_of(maps[0]["val"], [one["val"] for one in scores], [run != INTENSITY for run in runs])
    members, scores = [members[i] for i in taken], [scores[i] for i in taken]
    first = next((one for one, run in zip(maps, folders, strict=True) if str(run) == members[0]["run"]), maps[0])
    summed = {
        split: {key: first[split][key] for key in ("names", *MAPS)} | {"scores": sum(one[split] for one in scores)}
        for split in ("test", "val")
    }
    steps = {member["run"]: member["trained_steps"].get("forward") for member in members if member["trained_steps"]}
    header = {
        **{key: headers[0][key] for key in ("input", "image_size")},
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
    """Refuse runs whose pixels are not the same.

    Raises:
        UserError: if the input, the splits, or a split's slices, lesions, masks or size differ.
    """
    if header["input"] != other_header["input"]:
        raise UserError(f"{first} and {other} have different inputs, {header['input']} and {other_header['input']}")
    for split in ("test", "val"):
        if (split in maps) != (split in other_maps):
            raise UserError(f"only one of {first} and {other} has {split} slices: test both on the same data")
        for key in ("names", "truth", "brainmask") if split in maps else ():
            if not np.array_equal(maps[split][key], other_maps[split][key]):
                raise UserError(
                    f"{first} and {other} differ in the {key} of their {split} slices: test both on the same data, at "
                    "the same image size"
                )


def member_scores(run: str, metrics: Mapping[str, Any], maps: Maps) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the record of a member for metrics.json, and its weighted scores [N, H, W] by split.

    Raises:
        UserError: if the run has no chosen score.
    """
    is_intensity = run == INTENSITY
    block = metrics["baseline_intensity"].get("chosen") if is_intensity else metrics.get("chosen")
    if not block:
        raise UserError(f"{run} has no chosen score: score it again with --rescore")
    settings, constants = chosen_score(block)
    member = {
        "run": run,
        "method": INTENSITY if is_intensity else metrics["method"],
        **{key: metrics[key] for key in ("input", "trans", "sampling_settings", "image_size")},
        "checkpoints": {} if is_intensity else metrics["checkpoints"],
        "trained_steps": {} if is_intensity else metrics["trained_steps"],
        **{key: block[key] for key in ("settings", "constants")},
    }
    found = {}
    for split in ("test", "val"):
        group = intensity_maps(maps[split], settings.sign) if is_intensity else compared(maps[split])
        region = scored_region(group["brainmask"], settings.rim)
        found[split] = np.where(region, anomaly_map(group, settings, constants), 0)
    member["weight"] = standard_weight(found["val"], maps["val"])
    return member, {split: (member["weight"] * scores).astype(np.float32) for split, scores in found.items()}


def standard_weight(scores: np.ndarray, val: Mapping[str, Any]) -> float:
    """Return one over the distance from the median to the 95th percentile of scores in healthy validation pixels.

    So weighted, scores are standardised but for a constant, which no threshold and no order depends on.
    """
    healthy = scores[val["brainmask"] & ~val["truth"]]
    middle, high = np.quantile(healthy, [0.5, 0.95]) if healthy.size else (0.0, 1.0)
    return 1 / max(float(high - middle), 1e-6)


def best_of(val: Mapping[str, Any], scores: Sequence[np.ndarray], networks: Sequence[bool]) -> list[int]:
    """Return the runs whose summed validation scores have the highest AUPRC, at least one of them from `networks`.

    Without any lesion, all of them.
    """
    everyone = list(range(len(scores)))
    if not val["truth"].any():
        print("no lesion in the validation slices: all runs are taken")
        return everyone
    ranked, once = ranked_pixels(val["truth"], val["brainmask"]), np.ones((1, len(val["truth"])), dtype=int)
    found = {}
    for n in range(1, len(scores) + 1):
        for chosen in (one for one in combinations(everyone, n) if any(networks[i] for i in one)):
            total = np.where(val["brainmask"], sum(scores[i] for i in chosen), -np.inf)
            found[chosen] = float(weighted_auprc(total, val["truth"], ranked, once, THRESHOLDS)[0])
    best = max(found, key=found.get)
    print(f"of {len(found)} combinations, the one with the highest validation AUPRC, {found[best]:.3f}, is taken")
    return list(best)

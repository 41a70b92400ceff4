"""All metrics of a test set, part by part, so that whole scans of many subjects fit into memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .metrics import (
    RIM,
    BoolArray,
    FloatArray,
    auprc_bootstrap_interval,
    auroc,
    average_precision,
    best_threshold,
    bootstrap_interval,
    dice_curve,
    healthy_threshold,
    highest_dice,
    mask_scores,
    mean_over_slices,
    number,
    numbers,
    overlap_at,
    precision_recall,
    ranked_pixels,
    ratio,
    rows_by_code,
    scored_region,
    subject_codes,
    surface_distances_at,
    within,
)
from .scores import split_names
from .subjects import (
    Volume,
    detection,
    find_marks,
    froc_thresholds,
    highest_scores,
    lesion_peaks,
    needs_subject_scores,
    score_volume,
    subject_of,
    summarise_subjects,
)

HEALTHY_SHARE = 0.01  # of the healthy validation pixels, marked at the threshold `healthy`


class ScoredSlices(NamedTuple):
    """Slices [n, H, W] with their scores; a subject's slices are all in the same part of a split."""

    scores: FloatArray  # higher is more anomalous
    truth: BoolArray
    brainmask: BoolArray
    names: Sequence[str]  # [n] "{subject}_{slice}"
    healthy: BoolArray  # [n] whether the slice's subject has no lesion anywhere


class Evaluation(NamedTuple):
    """Result of `evaluate`."""

    summary: dict[str, Any]  # JSON-serialisable
    per_slice: dict[str, np.ndarray]  # columns of N values
    per_subject: dict[str, np.ndarray]  # columns of S values, `subject` first; empty if each subject has one slice
    curves: dict[str, tuple[FloatArray, FloatArray]]  # `precision_recall` and `dice`, as in metrics.py


class Pixels:
    """Masked scores and truth of the ranked pixels of a split, and counts over its slices."""

    def __init__(self, parts: Sequence[ScoredSlices], rim: float):
        scores: list[FloatArray] = []
        truth: list[BoolArray] = []
        self.names: list[str] = []
        self.n_lesion = self.n_lost = self.n_nan = 0
        for part in parts:
            masked, region = masked_scores(part, rim), scored_region(part.brainmask, rim)
            lesions = np.asarray(part.truth, dtype=bool)
            ranked = ranked_pixels(lesions, part.brainmask)
            scores += within(masked, ranked)
            truth += within(lesions, ranked)
            self.names += map(str, part.names)
            self.n_lesion += np.count_nonzero(lesions)
            self.n_lost += np.count_nonzero(lesions & ~region)
            self.n_nan += np.count_nonzero(np.isnan(part.scores) & region)
        self.pooled = np.concatenate(scores), np.concatenate(truth)  # of all slices, [M] each
        ends = np.cumsum([len(of_slice) for of_slice in scores])[:-1]
        self.scores, self.truth = (np.split(pixels, ends) for pixels in self.pooled)  # views, by slice

    def healthy(self) -> FloatArray:
        """Return the scores of the healthy brain pixels."""
        scores, truth = self.pooled
        return scores[~truth]


def masked_scores(part: ScoredSlices, rim: float) -> FloatArray:
    """Return the scores of a part as from `mask_scores`, in their own precision."""
    scores = np.asarray(part.scores)
    masked = mask_scores(scores, part.brainmask, rim)
    if masked.shape != np.shape(part.truth):
        raise ValueError(f"truth has shape {np.shape(part.truth)}, expected {masked.shape}")
    return masked.astype(scores.dtype if scores.dtype.kind == "f" else np.float64)


def volumes(part: ScoredSlices, rim: float) -> Iterator[Volume]:
    """Yield the subjects of a part in order of appearance, with masked scores."""
    scores, slice_numbers = masked_scores(part, rim), split_names(part.names)[1]
    for rows in rows_by_code(subject_codes([subject_of(name) for name in part.names], len(part.names))):
        rows = rows[np.argsort(slice_numbers[rows], kind="stable")]
        masks = (np.asarray(mask, dtype=bool)[rows] for mask in (part.truth, part.brainmask))
        healthy = bool(part.healthy[rows[0]])
        yield Volume(subject_of(part.names[rows[0]]), scores[rows], *masks, slice_numbers[rows], healthy)


def evaluate_parts(
    parts: Sequence[ScoredSlices],
    val: Sequence[ScoredSlices] | None = None,
    rim: float = RIM,
    healthy_share: float = HEALTHY_SHARE,
    voxel_size: Sequence[float] | None = None,
    n_resamples: int = 1000,
    seed: int = 0,
    label: str = "evaluating",
) -> Evaluation:
    """Compute all metrics of the anomaly maps of a test set.

    Args:
        parts: the test slices.
        val: the validation slices, on which the thresholds `validation` and `healthy` are chosen; the oracle threshold
            is chosen on the test slices.
        rim: as in `scored_region`.
        healthy_share: as in `healthy_threshold`.
        voxel_size: of a slice stack in mm (slice axis, height, width), for the distances of whole subjects.
        n_resamples, seed: of the bootstrap over subjects, at fixed thresholds.
        label: of the progress bar, shown for more than one part.

    Returns:
        The summary: n_slices, auprc, auprc_interval, auprc_per_slice_mean, auprc_undefined (slices excluded from that
        mean), auroc, chance, lost_lesion_share, nan_scores (NaN pixels in the scored region), and `oracle`,
        `validation` and `healthy`, each with the threshold, the mean over slices and `*_interval` of every segmentation
        metric, and `undefined`, the number of slices excluded from each mean. `validation` is None without `val` or
        without lesions in its scored region, `healthy` without healthy pixels in it. by_subject: see
        `summarise_subjects`; also `detection` by slice and by subject, and `froc`; None if each subject has one slice,
        with a lesion. Undefined and infinite values are None. The columns per slice: lesion_area (px), auprc, oracle_*,
        validation_* and healthy_* of every segmentation metric. The columns per subject: those of `score_volume`.
    """
    pixels = Pixels(parts, rim)
    subjects = [subject_of(name) for name in pixels.names]
    options = {"n_resamples": n_resamples, "seed": seed, "subjects": subjects}
    auprc = np.array([average_precision(s, t) for s, t in zip(pixels.scores, pixels.truth, strict=True)])
    lesion_area = np.array([np.count_nonzero(lesion) for lesion in pixels.truth])
    pooled = pixels.pooled
    summary = {
        "n_slices": len(subjects),
        "auprc": number(average_precision(*pooled)),
        "auprc_interval": numbers(auprc_bootstrap_interval(pixels.scores, pixels.truth, **options)),
        "auprc_per_slice_mean": number(mean_over_slices(auprc)),
        "auprc_undefined": int(np.isnan(auprc).sum()),
        "auroc": number(auroc(*pooled)),
        "chance": number(ratio(pixels.n_lesion, len(pooled[1]))),
        "lost_lesion_share": number(ratio(pixels.n_lost, pixels.n_lesion)),
        "nan_scores": int(pixels.n_nan),
        "oracle": None,
        "validation": None,
        "healthy": None,
    }
    curves = {"precision_recall": precision_recall(*pooled), "dice": dice_curve(pixels.scores, pixels.truth)}
    thresholds = {"oracle": highest_dice(*curves["dice"])[0]}
    by_subject = needs_subject_scores(pixels.names, pixels.truth)
    del pooled, pixels  # hundreds of megabytes of whole scans
    thresholds |= validation_thresholds(Pixels(val, rim), healthy_share) if val else {}

    columns: dict[str, list[np.ndarray]] = {f"{choice}_{name}": [] for choice in thresholds for name in SEGMENTATION}
    rows: list[dict[str, Any]] = []
    peaks: list[FloatArray] = []
    highest: list[float] = []
    for part in progress(parts, label):
        masked = masked_scores(part, rim)
        for choice, threshold in thresholds.items():
            found = overlap_at(masked, part.truth, threshold) | surface_distances_at(masked, part.truth, threshold)
            for name, values in found.items():
                columns[f"{choice}_{name}"].append(values)
        if by_subject:
            highest += map(highest_scores, masked)
            for volume in volumes(part, rim):
                rows.append({"subject": volume.name, **score_volume(volume, thresholds, voxel_size)})
                peaks.append(lesion_peaks(volume))
    per_slice = {"lesion_area": lesion_area, "auprc": auprc}
    per_slice |= {name: np.concatenate(values) for name, values in columns.items()}
    for choice, threshold in thresholds.items():
        segmentation = {name: per_slice[f"{choice}_{name}"] for name in SEGMENTATION}
        summary[choice] = {"threshold": number(threshold)}
        for name, values in segmentation.items():
            summary[choice][name] = number(mean_over_slices(values))
            summary[choice][f"{name}_interval"] = numbers(bootstrap_interval(values, **options))
        summary[choice]["undefined"] = _count_undefined(segmentation)
    if summary["healthy"]:
        summary["healthy"]["share"] = healthy_share
    summary["by_subject"], per_subject = None, {}
    if by_subject:
        per_subject = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        resampling = {"n_resamples": n_resamples, "seed": seed}
        summary["by_subject"] = summarise_subjects(per_subject, list(thresholds), **resampling)
        with_lesion = per_subject["lesion_voxels"] > 0
        summary["by_subject"]["detection"] = {
            "slice": detection(highest, lesion_area > 0, subject_codes(subjects, len(subjects)), **resampling),
            "subject": detection(per_subject["highest"], with_lesion, np.arange(len(rows)), **resampling),
        }
        summary["by_subject"]["froc"] = froc(parts, rim, np.concatenate(peaks), f"{label}, FROC")
    return Evaluation(summary, per_slice, per_subject, curves)


SEGMENTATION = ("dice", "jaccard", "sensitivity", "precision", "assd", "hd95")  # metrics at a threshold


def validation_thresholds(val: Pixels, healthy_share: float) -> dict[str, float]:
    """Return the thresholds of validation slices: `validation`, if a lesion has a score to reach, and `healthy`."""
    thresholds, healthy, (scores, truth) = {}, val.healthy(), val.pooled
    if (scores[truth] > -np.inf).any():
        thresholds["validation"] = best_threshold(val.scores, val.truth)[0]
    if healthy.size:
        thresholds["healthy"] = healthy_threshold(healthy, healthy_share)
    return thresholds


def froc(parts: Sequence[ScoredSlices], rim: float, peaks: FloatArray, label: str) -> dict[str, list[float]] | None:
    """Compute the FROC curve over all subjects of a test set.

    Args:
        parts, rim, label: as in `evaluate_parts`.
        peaks: highest score of every lesion.

    Returns:
        thresholds, ascending, and at each the false_positives per scan and the sensitivity, the share of the lesions
        that are found; None if no lesion has a score.
    """
    thresholds = froc_thresholds(peaks)
    if not thresholds.size:
        return None
    counts = np.array(
        [
            [find_marks(volume, threshold).false_positives for threshold in thresholds]
            for part in progress(parts, label)
            for volume in volumes(part, rim)
        ]
    )
    return {
        "thresholds": thresholds.tolist(),
        "false_positives": counts.mean(axis=0).tolist(),
        "sensitivity": [float(np.mean(peaks >= threshold)) for threshold in thresholds],
    }


def progress(parts: Sequence[ScoredSlices], label: str) -> tqdm:
    """Iterate over parts, with a progress bar if there are several."""
    return tqdm(parts, desc=label, unit="part", disable=len(parts) < 2, leave=False)


def by_lesion_size(per_slice: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Compute means over slices for small, medium and large lesions: thirds of the test slices by lesion area.

    Args:
        per_slice: the columns of an `Evaluation`, [N] each. Slices without lesions are excluded.

    Returns:
        For `small`, `medium` and `large`: n_slices, area_bounds (smallest and largest lesion in px), the mean of every
        other column, and `undefined`, the number of slices excluded from each mean. Lesions of equal area are in the
        same third, so thirds can differ in size; the means of an empty one are None.
    """
    area = np.asarray(per_slice["lesion_area"])
    with_lesion = area[area > 0]
    small, medium = np.quantile(with_lesion, [1 / 3, 2 / 3]) if with_lesion.size else (0, 0)
    thirds = {}
    for name, above, up_to in (("small", 0, small), ("medium", small, medium), ("large", medium, np.inf)):
        members = (area > above) & (area <= up_to)
        columns = {key: values[members] for key, values in per_slice.items() if key != "lesion_area"}
        thirds[name] = {
            "n_slices": int(members.sum()),
            "area_bounds": [int(area[members].min()), int(area[members].max())] if members.any() else None,
            **{key: number(mean_over_slices(values)) for key, values in columns.items()},
            "undefined": _count_undefined(columns),
        }
    return thirds


def _count_undefined(columns: Mapping[str, FloatArray]) -> dict[str, int]:
    return {name: int(np.isnan(values).sum()) for name, values in columns.items()}

"""Scores of whole subjects: voxels pooled over slices, lesions one by one, false positives, and detection.

A subject's slices form a volume [D, H, W]. Lesions and marks are connected components of it, with 26 neighbours. A
lesion is found if any voxel of it is marked; a false positive is a marked component without a voxel in any lesion.
Slices whose numbers are not consecutive are not connected.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label

from .metrics import (
    BoolArray,
    FloatArray,
    auroc,
    average_precision,
    bootstrap_interval,
    lesion_quantiles,
    mean_over_slices,
    number,
    numbers,
    ratio,
    rows_by_code,
    surface_distances,
    weighted_auprc,
    weighted_auroc,
)

NEIGHBOURS = np.ones((3, 3, 3), dtype=bool)
HIGHEST = 0.01  # share of the scores whose mean tells lesions from health
FROC_THRESHOLDS = 32
# Metrics at a threshold, by the subjects that they are averaged over.
OF_PATIENTS = ("dice", "sensitivity", "precision", "assd_mm", "hd95_mm")
OF_HEALTHY = ("marked_share", "false_positives")


class Volume(NamedTuple):
    """One subject's slices, [D, H, W] each, in the order of their numbers."""

    name: str
    scores: FloatArray  # -inf outside the scored region
    truth: BoolArray
    brainmask: BoolArray
    numbers: NDArray[np.integer]  # of the slices [D]
    healthy: bool  # has no lesion anywhere, outside these slices either

    @property
    def ranked(self) -> BoolArray:
        return self.truth | self.brainmask


def needs_subject_scores(names: Sequence[str], truth: Sequence[BoolArray]) -> bool:
    """Whether a split has more than one slice of a subject, or a subject without a lesion in its slices."""
    subjects = [subject_of(name) for name in names]
    with_lesion = {subject for subject, lesion in zip(subjects, truth, strict=True) if np.any(lesion)}
    return len(with_lesion) < len(subjects)


def subject_of(name: str) -> str:
    """Return the subject of a slice's name, "{subject}_{slice}"."""
    return str(name).rpartition("_")[0]


def highest_scores(scores: FloatArray) -> float:
    """Return the mean of the highest 1 % of the scores above -inf, at least one; -inf if there is none."""
    scored = scores[scores > -np.inf]
    n = int(np.ceil(HIGHEST * scored.size))
    return float(np.partition(scored, -n)[-n:].mean(dtype=np.float64)) if n else -np.inf


def components(mask: BoolArray, numbers: NDArray[np.integer]) -> tuple[NDArray[np.integer], int]:
    """Label the connected components of a mask [D, H, W]; return the labels, from 1, and their number.

    Args:
        mask: one entry per slice.
        numbers: of the slices [D], ascending.
    """
    place = np.concatenate([[0], np.cumsum(np.where(np.diff(numbers) == 1, 1, 2))])  # leaves gaps between runs
    spread = np.zeros((place[-1] + 1, *mask.shape[1:]), dtype=bool)
    spread[place] = mask
    labels, n = label(spread, NEIGHBOURS)
    return labels[place], n


def lesion_peaks(volume: Volume) -> FloatArray:
    """Return the highest score of every lesion: a lesion is found at each threshold up to it."""
    labels, n = components(volume.truth, volume.numbers)
    peaks = np.full(n, -np.inf)
    np.maximum.at(peaks, labels[volume.truth] - 1, volume.scores[volume.truth])
    return peaks


class Marks(NamedTuple):
    """Marked components of a volume: the labels of its voxels, and which labels are in a lesion."""

    labels: NDArray[np.integer]
    n: int
    in_lesion: NDArray[np.integer]

    @property
    def false_positives(self) -> int:
        return self.n - len(self.in_lesion)

    def false_positives_in(self, slices: BoolArray) -> int:
        """Count the false positives that reach into any of these slices, [D] bool."""
        return len(np.setdiff1d(np.unique(self.labels[slices]), [0, *self.in_lesion]))


def find_marks(volume: Volume, threshold: float) -> Marks:
    """Find the components of `scores >= threshold`."""
    labels, n = components(volume.scores >= threshold, volume.numbers)
    found = np.unique(labels[volume.truth])
    return Marks(labels, n, found[found > 0])


def score_volume(
    volume: Volume, thresholds: Mapping[str, float], voxel_size: Sequence[float] | None
) -> dict[str, float]:
    """Score one subject.

    Args:
        volume: its slices.
        thresholds: by name.
        voxel_size: in mm along the slice axis, the height and the width; None: unknown.

    Returns:
        healthy, n_slices, lesion_voxels, n_lesions, auprc, highest (see `highest_scores`), and for each threshold with
        its name as a prefix: dice, sensitivity, precision; assd_mm and hd95_mm, in 3-D, if there are several,
        consecutive slices and the voxel size is known; lesions_found; false_positives; marked_share of the brain; for
        patients with lesion-free slices lesion_free_marked_share and lesion_free_false_positives. Undefined values are
        NaN.
    """
    ranked, n_lesion = volume.ranked, np.count_nonzero(volume.truth)
    peaks = lesion_peaks(volume)
    row = {
        "healthy": float(volume.healthy),
        "n_slices": len(volume.numbers),
        "lesion_voxels": n_lesion,
        "n_lesions": len(peaks),
        "auprc": average_precision(volume.scores[ranked], volume.truth[ranked]),
        "highest": highest_scores(volume.scores),
    }
    lesion_free = ~volume.truth.any(axis=(1, 2)) & (not volume.healthy)
    in_3d = voxel_size is not None and len(volume.numbers) > 1 and bool((np.diff(volume.numbers) == 1).all())
    for name, threshold in thresholds.items():
        marked, marks = volume.scores >= threshold, find_marks(volume, threshold)
        hits, predicted = np.count_nonzero(marked & volume.truth), np.count_nonzero(marked)
        found = {
            "dice": ratio(2 * hits, predicted + n_lesion),
            "sensitivity": ratio(hits, n_lesion),
            "precision": ratio(hits, predicted),
            "assd_mm": np.nan,
            "hd95_mm": np.nan,
            "lesions_found": np.count_nonzero(peaks >= threshold),
            "false_positives": marks.false_positives,
            "marked_share": ratio(predicted, np.count_nonzero(volume.brainmask)),
            "lesion_free_marked_share": np.nan,
            "lesion_free_false_positives": np.nan,
        }
        if in_3d and predicted and n_lesion:
            distances = surface_distances(marked[None], volume.truth[None], voxel_size)
            found |= {f"{key}_mm": values[0] for key, values in distances.items()}
        if lesion_free.any():
            brain = np.count_nonzero(volume.brainmask[lesion_free])
            found["lesion_free_marked_share"] = ratio(np.count_nonzero(marked[lesion_free]), brain)
            found["lesion_free_false_positives"] = marks.false_positives_in(lesion_free)
        row |= {f"{name}_{key}": float(value) for key, value in found.items()}
    return row


def froc_thresholds(peaks: Sequence[float]) -> FloatArray:
    """Return the thresholds of the FROC curve, ascending: quantiles of the lesions' highest scores above -inf."""
    peaks = np.asarray(peaks, dtype=np.float64)
    return lesion_quantiles(peaks[np.isfinite(peaks)], FROC_THRESHOLDS)


def summarise_subjects(
    rows: Mapping[str, np.ndarray], thresholds: Sequence[str], n_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Average the columns of `score_volume` over subjects, with bootstrap intervals over subjects.

    Args:
        rows: columns [S].
        thresholds: names of the thresholds.
        n_resamples, seed: of the bootstrap.

    Returns:
        n_subjects, n_with_lesion, n_healthy; auprc, the mean over subjects with a lesion; and for each threshold:
        the means of `OF_PATIENTS` over subjects with a lesion, n_lesions, lesions_found (the share of all lesions),
        false_positives per scan, `healthy`: the means of `OF_HEALTHY` over healthy subjects, and `lesion_free_slices`:
        the same for patients' lesion-free slices. Means have an interval `*_interval` beside them.
    """
    with_lesion, healthy = rows["lesion_voxels"] > 0, rows["healthy"] > 0

    def means(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, values in columns.items():
            found[name] = number(mean_over_slices(values))
            found[f"{name}_interval"] = numbers(bootstrap_interval(values, n_resamples, seed))
        return found

    summary = {
        "n_subjects": len(healthy),
        "n_with_lesion": int(with_lesion.sum()),
        "n_healthy": int(healthy.sum()),
        **means({"auprc": rows["auprc"][with_lesion]}),
    }
    for threshold in thresholds:
        prefix = f"{threshold}_"
        of_threshold = {key.removeprefix(prefix): values for key, values in rows.items() if key.startswith(prefix)}
        n_lesions = rows["n_lesions"].sum()
        summary[threshold] = {
            **means({key: of_threshold[key][with_lesion] for key in OF_PATIENTS}),
            "n_lesions": int(n_lesions),
            "lesions_found": number(ratio(of_threshold["lesions_found"].sum(), n_lesions)),
            **means({"false_positives": of_threshold["false_positives"]}),
            "healthy": means({key: of_threshold[key][healthy] for key in OF_HEALTHY}),
            "lesion_free_slices": means({key: of_threshold[f"lesion_free_{key}"] for key in OF_HEALTHY}),
        }
    return summary


def detection(
    scores: ArrayLike, lesion: ArrayLike, codes: NDArray[np.intp], n_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Evaluate "is there a lesion" by the highest scores, with bootstrap intervals over subjects.

    Args:
        scores: of slices or subjects [M], as from `highest_scores`.
        lesion: whether they have a lesion [M].
        codes: number of each one's subject [M], from 0.
        n_resamples, seed: of the bootstrap.

    Returns:
        auroc, average_precision and their intervals, None where there are only slices with, or only without, a lesion.
    """
    scores, lesion = np.asarray(scores, dtype=np.float64), np.asarray(lesion, dtype=bool)
    rows = rows_by_code(codes)
    draws = np.random.default_rng(seed).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), n_resamples)
    groups = [scores[i] for i in rows], [lesion[i] for i in rows]
    found = {}
    for name, of_sample, of_resamples in (
        ("auroc", auroc, weighted_auroc),
        ("average_precision", average_precision, weighted_auprc),
    ):
        defined = lesion.any() and not lesion.all()
        found[name] = number(of_sample(scores, lesion)) if defined else None
        tails = np.nanquantile(of_resamples(*groups, draws), [0.025, 0.975]) if defined else (np.nan, np.nan)
        found[f"{name}_interval"] = numbers(tails)
    return found

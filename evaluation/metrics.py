"""Metrics of anomaly maps: pure functions of arrays.

Scored region: the brain mask eroded by a disk (`scored_region`). `mask_scores` sets every other pixel to -inf, so that
it is ranked last and never predicted. The truth is not masked: lesion pixels outside the region count as misses;
`lost_lesion_share` is their share.

Ranked pixels: AUPRC and AUROC rank the whole brain mask, including the eroded rim, and lesion pixels outside the brain
mask, if any (`ranked_pixels`), so that recall covers all lesion pixels.

Prediction: `score >= threshold`. Segmentation metrics are computed per slice and averaged over slices, not pooled over
pixels.

Undefined values are NaN; means exclude them, and the number of excluded slices is reported.

    ======  ==========  =============  ===========  =========  ==========
    truth   prediction  Dice, Jaccard  sensitivity  precision  ASSD, HD95
    ======  ==========  =============  ===========  =========  ==========
    lesion  empty       0              0            NaN        NaN
    empty   some        0              NaN          0          NaN
    empty   empty       NaN            NaN          NaN        NaN
    ======  ==========  =============  ===========  =========  ==========

AUPRC is NaN without lesion pixels, AUROC also without healthy ones. For constant scores, AUPRC is the share of lesion
pixels (`chance`) and AUROC is 0.5. NaN scores count as -inf, so that a broken map cannot score well by accident;
`evaluate` reports their number.
"""

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import bootstrap, rankdata
from skimage.morphology import isotropic_erosion
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

CONFIDENCE = 0.95
RIM = 4.0  # erosion of the brain mask in px, at an image size of 128, as in the published script
CHUNK = 1024  # thresholds per chunk in `weighted_auprc`; bounds its memory


class Evaluation(NamedTuple):
    """Result of `evaluate`: a JSON-serialisable summary, and columns with one value per slice."""

    summary: dict
    per_slice: dict[str, np.ndarray]


# Scored region and ranked pixels


def erosion_radius(height: int, width: int, rim: float = RIM) -> int:
    """Return the radius in px, at least 1, of the eroding disk: `rim` at 128 px, scaled with the shorter side."""
    return max(1, round(rim * min(height, width) / 128))


def scored_region(brainmask: ArrayLike, rim: float = RIM) -> BoolArray:
    """Erode the brain mask [N, H, W], to exclude the errors of skull stripping and partial volume at its rim.

    `rim` is the radius of the disk in px at an image size of 128; 0 returns the mask unchanged. Pixels beyond the image
    count as background.
    """
    mask = _as_slices("brainmask", brainmask, bool)
    if rim == 0:
        return mask
    radius = erosion_radius(*mask.shape[1:], rim)
    # isotropic_erosion does not erode from the image border, so pad with background.
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    return np.stack([isotropic_erosion(brain, radius)[1:-1, 1:-1] for brain in padded])


def mask_scores(scores: ArrayLike, brainmask: ArrayLike, rim: float = RIM) -> FloatArray:
    """Return scores [N, H, W] as float64, with -inf outside the scored region and in place of NaN."""
    scores = _as_slices("scores", scores, np.float64)
    region = scored_region(brainmask, rim)
    _require_same_shape("brainmask", region, scores)
    return np.where(region & ~np.isnan(scores), scores, -np.inf)


def ranked_pixels(truth: ArrayLike, brainmask: ArrayLike) -> BoolArray:
    """Return the pixels that AUPRC and AUROC rank, [N, H, W] bool: the union of brain mask and lesions."""
    return np.asarray(brainmask, dtype=bool) | np.asarray(truth, dtype=bool)


def ranked_scores(
    scores: ArrayLike, truth: ArrayLike, brainmask: ArrayLike, rim: float = RIM
) -> tuple[FloatArray, BoolArray]:
    """Return scores and truth [M] of the ranked pixels of all slices, with -inf outside the scored region."""
    ranked = ranked_pixels(truth, brainmask)
    return mask_scores(scores, brainmask, rim)[ranked], np.asarray(truth, dtype=bool)[ranked]


def lost_lesion_share(truth: ArrayLike, brainmask: ArrayLike, rim: float = RIM) -> float:
    """Return the share of lesion pixels outside the scored region, which cannot be detected; NaN if no lesion."""
    truth = np.asarray(truth, dtype=bool)
    return float(_ratio(np.count_nonzero(truth & ~scored_region(brainmask, rim)), np.count_nonzero(truth)))


def chance(truth: ArrayLike, brainmask: ArrayLike) -> float:
    """Return the share of lesion pixels among ranked pixels, the AUPRC of random scores; NaN if none is ranked."""
    return float(_ratio(np.count_nonzero(truth), np.count_nonzero(ranked_pixels(truth, brainmask))))


# Ranking metrics. Scores are floats of any shape, possibly infinite, with NaN ranked last; truth is bool


def average_precision(scores: ArrayLike, truth: ArrayLike) -> float:
    """Return the AUPRC (average precision) of the given pixels; NaN if no pixel is lesion, 1 if all are."""
    ranks, truth = _as_ranks(scores, truth)
    return float(average_precision_score(truth, ranks)) if truth.any() else float("nan")


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the ROC curve of the given pixels; NaN if no pixel or every pixel is lesion."""
    ranks, truth = _as_ranks(scores, truth)
    return float(roc_auc_score(truth, ranks)) if truth.any() and not truth.all() else float("nan")


def precision_recall(scores: ArrayLike, truth: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the step function whose area is the AUPRC: precision and recall [K], from the lowest threshold up.

    Each precision applies from its recall down to the next one. Without lesion pixels recall is NaN.
    """
    ranks, truth = _as_ranks(scores, truth)
    if not truth.any():
        return np.zeros(1), np.full(1, np.nan)
    precision, recall, _ = precision_recall_curve(truth, ranks, drop_intermediate=True)
    return precision, recall


def _as_ranks(scores: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, BoolArray]:
    """Return dense ranks of the scores, because scikit-learn rejects infinite scores, and the truth, both flat."""
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    _require_same_shape("truth", truth, scores)
    ranks = rankdata(np.where(np.isnan(scores), -np.inf, scores), method="dense", axis=None)
    return ranks, truth.ravel()


# Segmentation metrics at a threshold. Scores are [N, H, W] float, -inf outside the scored region; truth [N, H, W] bool


def overlap_at(scores: ArrayLike, truth: ArrayLike, threshold: float) -> dict[str, FloatArray]:
    """Compute `dice`, `jaccard`, `sensitivity` and `precision` of `scores >= threshold` for each slice.

    Returns:
        For each metric, [N] float64 in [0, 1], or NaN (see the table at the top).
    """
    prediction, truth = _predict(scores, truth, threshold)
    hits, predicted, lesion = (
        np.count_nonzero(pixels, axis=(1, 2)) for pixels in (prediction & truth, prediction, truth)
    )
    return {
        "dice": _ratio(2 * hits, predicted + lesion),
        "jaccard": _ratio(hits, predicted + lesion - hits),
        "sensitivity": _ratio(hits, lesion),
        "precision": _ratio(hits, predicted),
    }


def surface_distances_at(scores: ArrayLike, truth: ArrayLike, threshold: float) -> dict[str, FloatArray]:
    """Compute surface distances in px between `scores >= threshold` and the truth for each slice.

    The edge of a mask consists of its pixels with at least one of their four neighbours outside the mask or the image.
    Distances are from each edge pixel to the nearest edge pixel of the other mask.

    Returns:
        `assd`: the mean distance over the pixels of both edges. `hd95`: the 95th percentile of the distances from one
        edge to the other, in the direction where it is larger. [N] float64 each, NaN if either mask is empty.
    """
    # Imported here because MONAI takes seconds to load.
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    prediction, truth = _predict(scores, truth, threshold)
    defined = prediction.any(axis=(1, 2)) & truth.any(axis=(1, 2))
    masks = {
        "y_pred": torch.from_numpy(prediction[defined, None]),
        "y": torch.from_numpy(truth[defined, None]),
        "include_background": True,  # the only channel is the foreground
    }
    with warnings.catch_warnings():
        # MONAI passes a deprecated argument to its own function.
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        distances = {
            "assd": compute_average_surface_distance(**masks, symmetric=True),
            "hd95": compute_hausdorff_distance(**masks, percentile=95),
        }
    columns = {name: np.full(len(truth), np.nan) for name in distances}
    for name, values in distances.items():
        columns[name][defined] = values[:, 0].numpy()
    return columns


def best_threshold(scores: ArrayLike, truth: ArrayLike) -> tuple[float, float]:
    """Find the exact threshold for all slices that maximises the mean Dice over slices, ⌈Dice⌉.

    Returns:
        The threshold (the highest of equally good ones; inf if every score is -inf or NaN), and the mean Dice, as in
        `overlap_at`: slices without lesions count as soon as anything is predicted in them.
    """
    thresholds, mean_dice = dice_curve(scores, truth)
    threshold = np.inf
    if thresholds.size:  # the first within rounding error of the maximum; the running sum is not exact
        threshold = float(thresholds[np.argmax(mean_dice >= mean_dice.max() - 1e-12)])
    return threshold, mean_over_slices(overlap_at(scores, truth, threshold)["dice"])


def dice_curve(scores: ArrayLike, truth: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Compute the mean Dice over slices at every distinct score, in one pass over the sorted pixels.

    A pixel that crosses the threshold changes only the Dice of its own slice, so the sum over slices is a cumulative
    sum of such changes.

    Returns:
        The distinct scores above -inf in descending order, and the mean Dice at each, [K] float64 both.
    """
    scores, truth = _as_slices("scores", scores, np.float64), _as_slices("truth", truth, bool)
    _require_same_shape("truth", truth, scores)
    candidates = scores > -np.inf
    slice_of, _, _ = np.nonzero(candidates)
    values = scores[candidates]
    descending = np.argsort(values)[::-1]
    values, slice_of = values[descending], slice_of[descending]
    change, newly_defined = _dice_changes(truth[candidates][descending], slice_of, truth)
    n_defined = np.count_nonzero(truth.any(axis=(1, 2))) + np.cumsum(newly_defined)
    mean_dice = np.cumsum(change) / n_defined

    # Pixels with equal scores cross the threshold together, so only the state after the last of them is reachable.
    reachable = np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)])
    return values[reachable], mean_dice[reachable]


def _dice_changes(hit: BoolArray, slice_of: NDArray, truth: BoolArray) -> tuple[FloatArray, BoolArray]:
    """Compute how each pixel changes its slice's Dice when pixels are predicted one after another.

    Args:
        hit: [M] bool, whether the pixel is lesion, in the order of prediction.
        slice_of: [M] int, the pixel's slice.
        truth: [N, H, W] bool.

    Returns:
        The change of Dice, [M] float64, and whether the slice's Dice becomes defined with this pixel, [M] bool.
    """
    # NumPy's stable sort takes linear time for integers of up to 16 bits.
    by_slice = np.argsort(slice_of.astype(np.min_scalar_type(len(truth))), kind="stable")
    slice_of, hit = slice_of[by_slice], hit[by_slice]
    n_pixels = np.bincount(slice_of, minlength=len(truth))
    first = (np.cumsum(n_pixels) - n_pixels)[slice_of]  # position of the slice's first pixel
    hits_so_far = np.concatenate([[0], np.cumsum(hit)])
    hits = hits_so_far[1:] - hits_so_far[first]
    position = np.arange(len(hit))
    predicted = position - first + 1
    lesion = np.count_nonzero(truth, axis=(1, 2))[slice_of]

    dice = 2 * hits / (predicted + lesion)
    before = np.where(position == first, 0.0, np.roll(dice, 1))
    change, newly_defined = np.empty_like(dice), np.empty_like(hit)
    change[by_slice] = dice - before
    newly_defined[by_slice] = (position == first) & (lesion == 0)
    return change, newly_defined


def _predict(scores: ArrayLike, truth: ArrayLike, threshold: float) -> tuple[BoolArray, BoolArray]:
    scores, truth = _as_slices("scores", scores, np.float64), _as_slices("truth", truth, bool)
    _require_same_shape("truth", truth, scores)
    if not threshold > -np.inf:
        raise ValueError(f"threshold must be above -inf, got {threshold}")
    return scores >= threshold, truth


# Means over slices, with 95 % percentile bootstrap intervals over slices at fixed thresholds


def mean_over_slices(per_slice_values: ArrayLike) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    values = np.asarray(per_slice_values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def bootstrap_interval(per_slice_values: ArrayLike, n_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of values [N], without NaNs; (NaN, NaN) for fewer than two values."""
    values = np.asarray(per_slice_values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if defined.size < 2:
        return float("nan"), float("nan")
    options = {"n_resamples": n_resamples, "confidence_level": CONFIDENCE, "method": "percentile"}
    interval = bootstrap((defined,), np.mean, rng=np.random.default_rng(seed), **options).confidence_interval
    return float(interval.low), float(interval.high)


def paired_bootstrap(
    values_a: ArrayLike, values_b: ArrayLike, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return the mean of a - b over the slices where both are defined, and its paired bootstrap interval.

    Both are [N], with slices in the same order.
    """
    values_a, values_b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    _require_same_shape("values_b", values_b, values_a)
    difference = values_a - values_b
    return mean_over_slices(difference), bootstrap_interval(difference, n_resamples, seed)


def auprc_bootstrap_interval(
    scores: ArrayLike, truth: ArrayLike, ranked: ArrayLike, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the interval of the AUPRC of pooled pixels, with slices resampled; arguments are [N, H, W].

    Resamples without lesions are excluded. Returns (NaN, NaN) for fewer than two slices or no lesions.
    """
    truth = _as_slices("truth", truth, bool)
    n_slices = len(truth)
    if n_slices < 2 or not truth.any():
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).multinomial(n_slices, np.full(n_slices, 1 / n_slices), n_resamples)
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.nanquantile(weighted_auprc(scores, truth, ranked, draws), tails)
    return float(low), float(high)


def weighted_auprc(
    scores: ArrayLike, truth: ArrayLike, ranked: ArrayLike, draws: ArrayLike, max_thresholds: int | None = None
) -> FloatArray:
    """Compute the AUPRC of pooled pixels for many resamples of the slices at once, exactly, including ties.

    Recall changes only at the scores of lesion pixels, so average precision needs the counts of predicted pixels and
    of hits at these thresholds alone. For all resamples at once, they are the product of `draws` with each slice's
    counts.

    Args:
        scores, truth, ranked: [N, H, W], as in `auprc_bootstrap_interval`.
        draws: [R, N] int, how often slice n is drawn in resample r.
        max_thresholds: use at most this many quantiles of the lesion pixels' scores as thresholds, which
            underestimates the AUPRC by at most 1 / max_thresholds. None: use all.

    Returns:
        [R] float64; NaN for resamples without lesion pixels.
    """
    scores, truth = _as_slices("scores", scores, np.float64), _as_slices("truth", truth, bool)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ranked, draws = np.asarray(ranked, dtype=bool), np.asarray(draws, dtype=np.float64)
    pixels = [np.sort(s[r]) for s, r in zip(scores, ranked, strict=True)]
    lesions = [np.sort(s[r & t]) for s, r, t in zip(scores, ranked, truth, strict=True)]
    thresholds = np.sort(np.concatenate(lesions))
    if max_thresholds and len(thresholds) > max_thresholds:
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, max_thresholds).round().astype(int)]
    thresholds = np.unique(thresholds)[::-1]

    area, hits_before = np.zeros(len(draws)), np.zeros(len(draws))
    for start in range(0, len(thresholds), CHUNK):
        chunk = thresholds[start : start + CHUNK]
        hits = draws @ _counts_at_least(lesions, chunk)
        predicted = draws @ _counts_at_least(pixels, chunk)
        gained = np.diff(hits, prepend=hits_before[:, None])
        precision = hits / np.maximum(predicted, 1)  # without predictions, nothing is gained
        area += np.sum(gained * precision, axis=1)
        hits_before = hits[:, -1]
    return _ratio(area, hits_before)


def _counts_at_least(sorted_scores: list[FloatArray], thresholds: FloatArray) -> FloatArray:
    """Count each slice's scores, sorted ascending, that reach each of G thresholds; return [N, G] float64."""
    return np.array([len(s) - np.searchsorted(s, thresholds) for s in sorted_scores], dtype=np.float64)


# All metrics


def evaluate(
    scores: ArrayLike,
    truth: ArrayLike,
    brainmask: ArrayLike,
    val: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    rim: float = RIM,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Compute all metrics of the anomaly maps of a test set.

    Args:
        scores: [N, H, W] float, higher is more anomalous.
        truth: [N, H, W] bool, the lesions.
        brainmask: [N, H, W] bool.
        val: scores, truth and brain mask of the validation slices, [M, H, W] each, on which the validation threshold
            is chosen; the oracle threshold is chosen on the test slices.
        rim: as in `scored_region`.
        n_resamples, seed: of the bootstrap over slices, at fixed thresholds.

    Returns:
        The summary: n_slices, auprc, auprc_interval, auprc_per_slice_mean, auprc_undefined (slices excluded from that
        mean), auroc, chance, lost_lesion_share, nan_scores (NaN pixels in the scored region), and `oracle` and
        `validation`, each with the threshold, the mean over slices and `*_interval` of every segmentation metric, and
        `undefined`, the number of slices excluded from each mean; `validation` is None without `val` or without lesions
        in it. Undefined and infinite values are None.
        The columns: lesion_area (px), auprc, oracle_* and validation_* of every segmentation metric, [N] each.
    """
    truth = _as_slices("truth", truth, bool)
    masked = mask_scores(scores, brainmask, rim)
    _require_same_shape("truth", truth, masked)
    ranked = ranked_pixels(truth, brainmask)
    auprc = [average_precision(s[r], t[r]) for s, t, r in zip(masked, truth, ranked, strict=True)]
    columns = {"lesion_area": np.count_nonzero(truth, axis=(1, 2)), "auprc": np.array(auprc)}
    summary = {
        "n_slices": len(truth),
        "auprc": _number(average_precision(masked[ranked], truth[ranked])),
        "auprc_interval": _numbers(auprc_bootstrap_interval(masked, truth, ranked, n_resamples, seed)),
        "auprc_per_slice_mean": _number(mean_over_slices(auprc)),
        "auprc_undefined": int(np.isnan(auprc).sum()),
        "auroc": _number(auroc(masked[ranked], truth[ranked])),
        "chance": _number(chance(truth, brainmask)),
        "lost_lesion_share": _number(lost_lesion_share(truth, brainmask, rim)),
        "nan_scores": int(np.isnan(np.asarray(scores)[scored_region(brainmask, rim)]).sum()),
        "oracle": None,
        "validation": None,
    }
    thresholds = {"oracle": best_threshold(masked, truth)[0]}
    if val is not None and np.any(val[1]):
        val_scores, val_truth, val_brainmask = val
        thresholds["validation"] = best_threshold(mask_scores(val_scores, val_brainmask, rim), val_truth)[0]
    for choice, threshold in thresholds.items():
        segmentation = overlap_at(masked, truth, threshold) | surface_distances_at(masked, truth, threshold)
        columns |= {f"{choice}_{name}": values for name, values in segmentation.items()}
        summary[choice] = {"threshold": _number(threshold)}
        for name, values in segmentation.items():
            summary[choice][name] = _number(mean_over_slices(values))
            summary[choice][f"{name}_interval"] = _numbers(bootstrap_interval(values, n_resamples, seed))
        summary[choice]["undefined"] = _count_undefined(segmentation)
    return Evaluation(summary, columns)


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
            **{key: _number(mean_over_slices(values)) for key, values in columns.items()},
            "undefined": _count_undefined(columns),
        }
    return thirds


def _count_undefined(columns: Mapping[str, FloatArray]) -> dict[str, int]:
    return {name: int(np.isnan(values).sum()) for name, values in columns.items()}


def _as_slices(name: str, array: ArrayLike, dtype: type) -> np.ndarray:
    array = np.asarray(array, dtype=dtype)
    if array.ndim != 3 or len(array) == 0:
        raise ValueError(f"{name} must have shape [N, H, W] with at least one slice, got {array.shape}")
    return array


def _require_same_shape(name: str, array: np.ndarray, other: np.ndarray) -> None:
    if array.shape != other.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {other.shape}")


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> FloatArray:
    """Divide in float64, with NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _number(value: float) -> float | None:
    """Return a float, or None for NaN and infinity, which JSON cannot represent."""
    return float(value) if np.isfinite(value) else None


def _numbers(values: tuple[float, ...]) -> list[float | None]:
    return [_number(value) for value in values]

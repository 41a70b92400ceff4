"""Metrics of anomaly maps: pure functions of arrays.

Scored region: the brain mask eroded by a disk (`scored_region`). `mask_scores` sets every other pixel to -inf, so that
it is ranked last and never predicted. The truth is not masked: lesion pixels outside the region count as misses.

Ranked pixels: AUPRC and AUROC rank the whole brain mask, including the eroded rim, and lesion pixels outside the brain
mask, if any (`ranked_pixels`), so that recall covers all lesion pixels.

Prediction: `score >= threshold`. Segmentation metrics are computed per slice and averaged over slices, not pooled over
pixels (for those of whole subjects see subjects.py). Intervals resample subjects.

Undefined values are NaN; means exclude them, and the number of excluded slices is reported.

    ======  ==========  =============  ===========  =========  ==========
    truth   prediction  Dice, Jaccard  sensitivity  precision  ASSD, HD95
    ======  ==========  =============  ===========  =========  ==========
    lesion  empty       0              0            NaN        NaN
    empty   some        0              NaN          0          NaN
    empty   empty       NaN            NaN          NaN        NaN
    ======  ==========  =============  ===========  =========  ==========

AUPRC is NaN without lesion pixels, AUROC also without healthy ones. For constant scores, AUPRC is the share of lesion
pixels and AUROC is 0.5. NaN scores count as -inf, so that a broken map cannot score well by accident.

Large test sets: beyond MAX_RANKED pixels, curves are evaluated at MAX_THRESHOLDS quantiles of the lesion pixels' scores
instead of at every score. With K of them, the error of the AUPRC is at most (1 + (1 + ln K) / 4) / K, here 6e-5.
"""

import warnings
from collections.abc import Sequence

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
MAX_RANKED = 2**24  # pixels that are ranked exactly; sorting more would take gigabytes
MAX_THRESHOLDS = 2**16  # of the AUPRC of more pixels
MAX_DICE_THRESHOLDS = 2**12  # of their mean Dice, which takes one array of this length per slice


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


def within(slices: Sequence[np.ndarray], ranked: BoolArray) -> list[np.ndarray]:
    """Return the pixels of each slice that are ranked, as 1-D arrays."""
    return [of_slice[pixels] for of_slice, pixels in zip(slices, ranked, strict=True)]


def ranked_scores(
    scores: ArrayLike, truth: ArrayLike, brainmask: ArrayLike, rim: float = RIM
) -> tuple[FloatArray, BoolArray]:
    """Return scores and truth [M] of the ranked pixels of all slices, with -inf outside the scored region."""
    ranked = ranked_pixels(truth, brainmask)
    return mask_scores(scores, brainmask, rim)[ranked], np.asarray(truth, dtype=bool)[ranked]


# Ranking metrics. Scores are floats of any shape, possibly infinite, with NaN ranked last; truth is bool


def average_precision(scores: ArrayLike, truth: ArrayLike) -> float:
    """Return the AUPRC (average precision) of the given pixels; NaN if no pixel is lesion, 1 if all are."""
    if not np.any(truth):
        return float("nan")
    if np.size(scores) > MAX_RANKED:
        precision, recall = precision_recall(scores, truth)
        return float(-np.sum(np.diff(recall) * precision[:-1]))
    ranks, truth = _as_ranks(scores, truth)
    return float(average_precision_score(truth, ranks))


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Return the area under the ROC curve of the given pixels; NaN if no pixel or every pixel is lesion."""
    if not np.any(truth) or np.all(truth):
        return float("nan")
    if np.size(scores) > MAX_RANKED:
        _, hits, predicted = _curve_points(scores, truth)
        false_positives = np.concatenate([[0], predicted - hits, [np.size(truth) - hits[-1]]])
        area = np.trapezoid(np.concatenate([[0], hits, hits[-1:]]), false_positives)
        return float(area / (hits[-1] * false_positives[-1]))
    ranks, truth = _as_ranks(scores, truth)
    return float(roc_auc_score(truth, ranks))


def precision_recall(scores: ArrayLike, truth: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Return the step function whose area is the AUPRC: precision and recall [K], from the lowest threshold up.

    Each precision applies from its recall down to the next one. Without lesion pixels recall is NaN.
    """
    if not np.any(truth):
        return np.zeros(1), np.full(1, np.nan)
    if np.size(scores) > MAX_RANKED:
        _, hits, predicted = _curve_points(scores, truth)
        return np.append((hits / predicted)[::-1], 1), np.append((hits / hits[-1])[::-1], 0)
    ranks, truth = _as_ranks(scores, truth)
    precision, recall, _ = precision_recall_curve(truth, ranks, drop_intermediate=True)
    return precision, recall


def lesion_quantiles(lesion_scores: FloatArray, n_thresholds: int) -> FloatArray:
    """Return at most `n_thresholds` of the scores [L], evenly spaced in rank, ascending, without duplicates."""
    ordered = np.sort(lesion_scores)
    if len(ordered) > n_thresholds:
        ordered = ordered[np.linspace(0, len(ordered) - 1, n_thresholds).round().astype(int)]
    return np.unique(ordered)


def _curve_points(scores: ArrayLike, truth: ArrayLike) -> tuple[FloatArray, NDArray, NDArray]:
    """Return thresholds, descending, and at each the numbers of lesion pixels and of all pixels that reach it."""
    scores, truth = np.ravel(scores), np.ravel(truth)
    _require_same_shape("truth", truth, scores)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    thresholds = lesion_quantiles(scores[truth], MAX_THRESHOLDS)
    return thresholds[::-1], _count_reaching(scores[truth], thresholds), _count_reaching(scores, thresholds)


def _count_reaching(values: FloatArray, thresholds: FloatArray) -> NDArray:
    """Count the values that reach each threshold; thresholds are ascending, counts are for descending ones."""
    counts = np.zeros(len(thresholds) + 1, dtype=np.int64)
    for start in range(0, len(values), MAX_RANKED):  # in chunks, because searchsorted returns 8 bytes for each value
        places = np.searchsorted(thresholds, values[start : start + MAX_RANKED], side="right")
        counts += np.bincount(places, minlength=len(counts))
    return np.cumsum(counts[:0:-1])


def _as_ranks(scores: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, BoolArray]:
    """Return dense ranks of the scores, because scikit-learn rejects infinite scores, and the truth, both flat."""
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    _require_same_shape("truth", truth, scores)
    ranks = rankdata(np.where(np.isnan(scores), -np.inf, scores), method="dense", axis=None)
    return ranks, truth.ravel()


# Segmentation metrics at a threshold. Scores are [N, H, W] float, -inf outside the scored region; truth [N, H, W] bool.
# For a curve, each slice may be an array of any shape, such as its ranked pixels


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
        "dice": ratio(2 * hits, predicted + lesion),
        "jaccard": ratio(hits, predicted + lesion - hits),
        "sensitivity": ratio(hits, lesion),
        "precision": ratio(hits, predicted),
    }


def surface_distances_at(scores: ArrayLike, truth: ArrayLike, threshold: float) -> dict[str, FloatArray]:
    """Compute surface distances in px between `scores >= threshold` and the truth for each slice.

    Returns:
        `assd` and `hd95` as in `surface_distances`, [N] float64 each, NaN if either mask is empty.
    """
    return surface_distances(*_predict(scores, truth, threshold))


def surface_distances(
    prediction: BoolArray, truth: BoolArray, spacing: Sequence[float] | None = None
) -> dict[str, FloatArray]:
    """Compute surface distances between masks, [N, H, W] or [N, D, H, W].

    The edge of a mask consists of its pixels with at least one of their four neighbours (voxels: six) outside the mask
    or the image. Distances are from each edge pixel to the nearest edge pixel of the other mask.

    Args:
        prediction, truth: the masks.
        spacing: size of a pixel along each axis, in the unit of the distances; None: 1.

    Returns:
        `assd`: the mean distance over the pixels of both edges. `hd95`: the 95th percentile of the distances from one
        edge to the other, in the direction where it is larger. [N] float64 each, NaN if either mask is empty.
    """
    # Imported here because MONAI takes seconds to load.
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    inside = tuple(range(1, truth.ndim))
    defined = prediction.any(axis=inside) & truth.any(axis=inside)
    masks = {
        "y_pred": torch.from_numpy(prediction[defined, None]),
        "y": torch.from_numpy(truth[defined, None]),
        "include_background": True,  # the only channel is the foreground
        "spacing": None if spacing is None else [float(size) for size in spacing],
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


def best_threshold(scores: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> tuple[float, float]:
    """Find the threshold for all slices that maximises the mean Dice over slices, ⌈Dice⌉, as in `dice_curve`.

    Returns:
        The threshold (the highest of equally good ones; inf if every score is -inf or NaN), and the mean Dice, as in
        `overlap_at`: slices without lesions count as soon as anything is predicted in them.
    """
    threshold, mean_dice = highest_dice(*dice_curve(scores, truth))
    if threshold == np.inf and any(np.any(lesion) for lesion in truth):
        mean_dice = 0.0
    return threshold, mean_dice


def highest_dice(thresholds: FloatArray, mean_dice: FloatArray) -> tuple[float, float]:
    """Return the highest threshold with the highest mean Dice of a `dice_curve`, and this Dice; (inf, NaN) if empty."""
    if not thresholds.size:
        return np.inf, float("nan")
    # The first within rounding error of the maximum: the running sum is not exact.
    best = np.argmax(mean_dice >= mean_dice.max() - 1e-12)
    return float(thresholds[best]), float(mean_dice[best])


def dice_curve(scores: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> tuple[FloatArray, FloatArray]:
    """Compute the mean Dice over slices at every distinct score, in one pass over the sorted pixels.

    A pixel that crosses the threshold changes only the Dice of its own slice, so the sum over slices is a cumulative
    sum of such changes. Beyond MAX_RANKED pixels, the Dice is computed at MAX_DICE_THRESHOLDS quantiles of the lesion
    pixels' scores.

    Args:
        scores, truth: for each slice, arrays of equal shape. Pixels with a score of -inf or NaN are never predicted.

    Returns:
        The distinct scores above -inf in descending order, and the mean Dice at each, [K] float64 both.
    """
    if len(scores) == 0 or [np.shape(one) for one in scores] != [np.shape(one) for one in truth]:
        raise ValueError("scores and truth must be arrays of equal shapes for at least one slice")
    candidates = [np.asarray(of_slice) > -np.inf for of_slice in scores]
    lesion_area = np.array([np.count_nonzero(lesion) for lesion in truth])
    values = [of_slice[kept] for of_slice, kept in zip(scores, candidates, strict=True)]
    hit = [np.asarray(lesion, bool)[kept] for lesion, kept in zip(truth, candidates, strict=True)]
    sizes = [len(of_slice) for of_slice in values]
    if sum(sizes) > MAX_RANKED:
        return _dice_at_quantiles(values, hit, lesion_area)
    slice_of = np.repeat(np.arange(len(sizes)), sizes)
    values, hit = np.concatenate(values).astype(np.float64), np.concatenate(hit)
    descending = np.argsort(values)[::-1]
    values, slice_of = values[descending], slice_of[descending]
    change, newly_defined = _dice_changes(hit[descending], slice_of, lesion_area)
    n_defined = np.count_nonzero(lesion_area) + np.cumsum(newly_defined)
    mean_dice = np.cumsum(change) / n_defined

    # Pixels with equal scores cross the threshold together, so only the state after the last of them is reachable.
    reachable = np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)])
    return values[reachable], mean_dice[reachable]


def _dice_at_quantiles(
    values: Sequence[np.ndarray], hit: Sequence[np.ndarray], lesion_area: NDArray
) -> tuple[FloatArray, FloatArray]:
    """Compute `dice_curve` at quantiles of the lesion pixels' scores, slice by slice."""
    lesions = [of_slice[lesion] for of_slice, lesion in zip(values, hit, strict=True)]
    source = lesions if any(map(len, lesions)) else values
    thresholds = lesion_quantiles(np.concatenate(source), MAX_DICE_THRESHOLDS)
    total, n_defined = np.zeros(len(thresholds)), np.zeros(len(thresholds))
    for of_slice, of_lesion, area in zip(values, lesions, lesion_area, strict=True):
        predicted = _count_reaching(of_slice, thresholds) + area
        total += 2 * _count_reaching(of_lesion, thresholds) / np.maximum(predicted, 1)
        n_defined += predicted > 0
    return thresholds[::-1].astype(np.float64), total / np.maximum(n_defined, 1)


def _dice_changes(hit: BoolArray, slice_of: NDArray, lesion_area: NDArray) -> tuple[FloatArray, BoolArray]:
    """Compute how each pixel changes its slice's Dice when pixels are predicted one after another.

    Args:
        hit: [M] bool, whether the pixel is lesion, in the order of prediction.
        slice_of: [M] int, the pixel's slice.
        lesion_area: [N] int, lesion pixels of each slice, including those that are never predicted.

    Returns:
        The change of Dice, [M] float64, and whether the slice's Dice becomes defined with this pixel, [M] bool.
    """
    # NumPy's stable sort takes linear time for integers of up to 16 bits.
    by_slice = np.argsort(slice_of.astype(np.min_scalar_type(len(lesion_area))), kind="stable")
    slice_of, hit = slice_of[by_slice], hit[by_slice]
    n_pixels = np.bincount(slice_of, minlength=len(lesion_area))
    first = (np.cumsum(n_pixels) - n_pixels)[slice_of]  # position of the slice's first pixel
    hits_so_far = np.concatenate([[0], np.cumsum(hit)])
    hits = hits_so_far[1:] - hits_so_far[first]
    position = np.arange(len(hit))
    predicted = position - first + 1
    lesion = lesion_area[slice_of]

    dice = 2 * hits / (predicted + lesion)
    before = np.where(position == first, 0.0, np.roll(dice, 1))
    change, newly_defined = np.empty_like(dice), np.empty_like(hit)
    change[by_slice] = dice - before
    newly_defined[by_slice] = (position == first) & (lesion == 0)
    return change, newly_defined


def healthy_threshold(scores: FloatArray, share: float) -> float:
    """Return the lowest score [M] of healthy pixels at which at most a share of them is marked; it needs no lesion.

    If equal scores leave no such score, return the number that follows the highest; inf without a score above -inf.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    if not np.any(scores > -np.inf):
        return np.inf
    first_unmarked = len(scores) - int(share * len(scores) + 1e-9) - 1
    unmarked = np.partition(scores, first_unmarked)[first_unmarked]
    above = scores[scores > unmarked]
    return float(above.min() if above.size else np.nextafter(unmarked, scores.dtype.type(np.inf)))


def _predict(scores: ArrayLike, truth: ArrayLike, threshold: float) -> tuple[BoolArray, BoolArray]:
    scores, truth = _as_slices("scores", scores, np.float64), _as_slices("truth", truth, bool)
    _require_same_shape("truth", truth, scores)
    if not threshold > -np.inf:
        raise ValueError(f"threshold must be above -inf, got {threshold}")
    return scores >= threshold, truth


# Means over slices, with 95 % percentile bootstrap intervals at fixed thresholds. Subjects are resampled, with all of
# their slices, because slices of one subject are alike; without `subjects`, each slice counts as one


def mean_over_slices(per_slice_values: ArrayLike) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    values = np.asarray(per_slice_values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def subject_codes(subjects: ArrayLike | None, n_slices: int) -> NDArray[np.intp]:
    """Number subjects [N] in order of appearance; None: the slices themselves."""
    if subjects is None:
        return np.arange(n_slices)
    _, first, codes = np.unique(np.asarray(subjects), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[codes]


def bootstrap_interval(
    per_slice_values: ArrayLike, n_resamples: int = 1000, seed: int = 0, subjects: ArrayLike | None = None
) -> tuple[float, float]:
    """Return the bootstrap interval of the mean of values [N], without NaNs; (NaN, NaN) for fewer than two subjects.

    `subjects` [N] are the subjects of the values.
    """
    values = np.asarray(per_slice_values, dtype=np.float64)
    defined = ~np.isnan(values)
    codes = subject_codes(None if subjects is None else np.asarray(subjects)[defined], np.count_nonzero(defined))
    sums, counts = np.bincount(codes, values[defined]), np.bincount(codes).astype(np.float64)
    if sums.size < 2:
        return float("nan"), float("nan")

    def mean(sums: FloatArray, counts: FloatArray, axis: int) -> FloatArray:
        return np.sum(sums, axis=axis) / np.sum(counts, axis=axis)

    options = {"n_resamples": n_resamples, "confidence_level": CONFIDENCE, "method": "percentile", "paired": True}
    interval = bootstrap((sums, counts), mean, rng=np.random.default_rng(seed), **options).confidence_interval
    return float(interval.low), float(interval.high)


def paired_bootstrap(
    values_a: ArrayLike,
    values_b: ArrayLike,
    n_resamples: int = 1000,
    seed: int = 0,
    subjects: ArrayLike | None = None,
) -> tuple[float, tuple[float, float]]:
    """Return the mean of a - b over the slices where both are defined, and its paired bootstrap interval.

    All are [N], with slices in the same order.
    """
    values_a, values_b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    _require_same_shape("values_b", values_b, values_a)
    difference = values_a - values_b
    return mean_over_slices(difference), bootstrap_interval(difference, n_resamples, seed, subjects)


def auprc_bootstrap_interval(
    scores: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    n_resamples: int = 1000,
    seed: int = 0,
    subjects: ArrayLike | None = None,
) -> tuple[float, float]:
    """Return the interval of the AUPRC of pooled pixels.

    Resamples without lesions are excluded. Returns (NaN, NaN) for fewer than two subjects or no lesions.

    Args:
        scores, truth: the ranked pixels of each slice, N arrays of any shape.
        n_resamples, seed: of the bootstrap.
        subjects: [N].
    """
    codes = subject_codes(subjects, len(scores))
    n = codes.max() + 1
    if n < 2 or not any(np.any(lesion) for lesion in truth):
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples)
    limit = MAX_THRESHOLDS if sum(map(np.size, scores)) > MAX_RANKED else None
    scores, truth = (
        [np.concatenate([slices[i].ravel() for i in rows]) for rows in rows_by_code(codes)]
        for slices in (scores, truth)
    )
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = np.nanquantile(weighted_auprc(scores, truth, draws, limit), tails)
    return float(low), float(high)


def rows_by_code(codes: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Return the indices of each code's occurrences, in order."""
    return np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])


def weighted_auprc(
    scores: Sequence[np.ndarray], truth: Sequence[np.ndarray], draws: ArrayLike, max_thresholds: int | None = None
) -> FloatArray:
    """Compute the AUPRC of pooled pixels for many resamples of slices or subjects at once, exactly, including ties.

    Recall changes only at the scores of lesion pixels, so average precision needs the counts of predicted pixels and of
    hits at these thresholds alone. For all resamples at once, they are the product of `draws` with the counts of each
    slice or subject.

    Args:
        scores, truth: the ranked pixels of each slice or subject, N arrays of any shape.
        draws: [R, N] int, how often each is drawn in each resample.
        max_thresholds: use at most this many quantiles of the lesion pixels' scores as thresholds, with an error below
            the bound in this module's docstring. None: use all.

    Returns:
        [R] float64; NaN for resamples without lesion pixels.
    """
    draws = np.asarray(draws, dtype=np.float64)
    scores = [np.where(np.isnan(one), -np.inf, one) for one in scores]
    lesions = [np.sort(one[lesion]) for one, lesion in zip(scores, truth, strict=True)]
    pixels = [np.sort(one, axis=None) for one in scores]
    thresholds = np.concatenate(lesions)
    thresholds = lesion_quantiles(thresholds, max_thresholds or len(thresholds))[::-1]

    area, hits_before = np.zeros(len(draws)), np.zeros(len(draws))
    for start in range(0, len(thresholds), CHUNK):
        chunk = thresholds[start : start + CHUNK]
        hits = draws @ _counts_at_least(lesions, chunk)
        predicted = draws @ _counts_at_least(pixels, chunk)
        gained = np.diff(hits, prepend=hits_before[:, None])
        precision = hits / np.maximum(predicted, 1)  # without predictions, nothing is gained
        area += np.sum(gained * precision, axis=1)
        hits_before = hits[:, -1]
    return ratio(area, hits_before)


def weighted_auroc(scores: Sequence[np.ndarray], truth: Sequence[np.ndarray], draws: ArrayLike) -> FloatArray:
    """Compute the AUROC for many resamples at once; arguments and result as in `weighted_auprc`.

    It is the share of (lesion, healthy) pairs in which the lesion has the higher score, ties counting as a half. These
    pairs are counted once for each pair of slices or subjects, [N, N], and then weighted with how often both are drawn.
    """
    draws = np.asarray(draws, dtype=np.float64)
    lesions = [np.ravel(one)[np.ravel(lesion)] for one, lesion in zip(scores, truth, strict=True)]
    healthy = [np.sort(np.ravel(one)[~np.ravel(lesion)]) for one, lesion in zip(scores, truth, strict=True)]
    n_lesions, n_healthy = (np.array([len(one) for one in group], dtype=np.float64) for group in (lesions, healthy))
    owner, values = np.repeat(np.arange(len(lesions)), [len(one) for one in lesions]), np.concatenate(lesions)
    won = [(np.searchsorted(one, values, "left") + np.searchsorted(one, values, "right")) / 2 for one in healthy]
    won = np.array([np.bincount(owner, of_one, len(lesions)) for of_one in won])  # [healthy, lesions]
    return ratio(np.sum((draws @ won) * draws, axis=1), (draws @ n_lesions) * (draws @ n_healthy))


def _counts_at_least(sorted_scores: list[FloatArray], thresholds: FloatArray) -> FloatArray:
    """Count each slice's scores, sorted ascending, that reach each of G thresholds; return [N, G] float64."""
    return np.array([len(s) - np.searchsorted(s, thresholds) for s in sorted_scores], dtype=np.float64)


def _as_slices(name: str, array: ArrayLike, dtype: type) -> np.ndarray:
    array = np.asarray(array, dtype=dtype)
    if array.ndim != 3 or len(array) == 0:
        raise ValueError(f"{name} must have shape [N, H, W] with at least one slice, got {array.shape}")
    return array


def _require_same_shape(name: str, array: np.ndarray, other: np.ndarray) -> None:
    if array.shape != other.shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {other.shape}")


def ratio(numerator: ArrayLike, denominator: ArrayLike) -> FloatArray:
    """Divide in float64, with NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def number(value: float) -> float | None:
    """Return a float, or None for NaN and infinity, which JSON cannot represent."""
    return float(value) if np.isfinite(value) else None


def numbers(values: Sequence[float]) -> list[float | None]:
    """Return floats for JSON, with None for NaN and infinity."""
    return [number(value) for value in values]

"""How an anomaly map is scored: pure functions of arrays.

Where a score counts. Inside the brain mask eroded by a disk (`scored_region`). `cut_scores` puts every other
pixel at -inf, the lowest score there is, so that it is ranked last and no threshold predicts it. The truth is
never cut: a lesion pixel outside is a miss, and `lost_lesion_share` says how many there are.

Which pixels are ranked. AUPRC and AUROC rank the pixels of the whole brain mask, its eroded rim included, and
the lesion pixels outside the brain mask if there are any (`ranked_pixels`): none drops out of the recall.

What a prediction is. `score >= threshold`. Segmentation is measured slice by slice, and what is reported is the
mean over slices, not a figure pooled over pixels.

What is undefined. NaN means undefined: it is left out of the mean, and the number of slices left out is reported.

    ======  ==========  =============  ===========  =========  ==========
    truth   prediction  Dice, Jaccard  sensitivity  precision  ASSD, HD95
    ======  ==========  =============  ===========  =========  ==========
    lesion  empty       0              0            NaN        NaN
    empty   some        0              NaN          0          NaN
    empty   empty       NaN            NaN          NaN        NaN
    ======  ==========  =============  ===========  =========  ==========

AUPRC is NaN if no pixel is lesion, AUROC if none or all are. Constant scores are one large tie: AUPRC is then the
share of lesion pixels (`chance`) and AUROC 0.5. A NaN score counts as -inf, ranked last and never predicted, so that
a broken map scores badly rather than well by accident; `evaluate` counts them.
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
RIM = 4.0  # px at 128 that the brain mask is eroded by, as in the published script
CHUNK = 1024  # thresholds that `weighted_auprc` takes at once: bounds its memory


class Evaluation(NamedTuple):
    """What `evaluate` returns: a JSON-able summary, and columns of one value for each slice."""

    summary: dict
    per_slice: dict[str, np.ndarray]


# Where a score counts


def erosion_radius(height: int, width: int, rim: float = RIM) -> int:
    """Radius in px of the disk that erodes the brain mask: `rim` at 128 px, scaled with the shorter side, >= 1."""
    return max(1, round(rim * min(height, width) / 128))


def scored_region(brainmask: ArrayLike, rim: float = RIM) -> BoolArray:
    """The brain mask without its rim, where skull stripping and partial volume make any method err.

    `brainmask` is [N, H, W] bool, and so is the result: the mask eroded by a disk of `rim` px at 128, or as it is for a
    rim of 0. Pixels beyond the image count as background.
    """
    mask = _as_slices("brainmask", brainmask, bool)
    if rim == 0:
        return mask
    radius = erosion_radius(*mask.shape[1:], rim)
    # scikit-image would take a mask that touches the image border to go on beyond it: one pixel of background
    # around the image says that it does not.
    padded = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
    return np.stack([isotropic_erosion(one, radius)[1:-1, 1:-1] for one in padded])


def cut_scores(scores: ArrayLike, brainmask: ArrayLike, rim: float = RIM) -> FloatArray:
    """The scores with -inf, the lowest there is, outside the scored region and where a score is NaN.

    Args and result: scores [N, H, W] of any range, brain mask [N, H, W] bool, rim as in `scored_region`; float64
    [N, H, W].
    """
    scores = _as_slices("scores", scores, np.float64)
    region = scored_region(brainmask, rim)
    _require_same_shape("brainmask", region, scores)
    return np.where(region & ~np.isnan(scores), scores, -np.inf)


def ranked_pixels(truth: ArrayLike, brainmask: ArrayLike) -> BoolArray:
    """[N, H, W] bool: the pixels that are ranked, the brain mask and whatever lesion lies outside it."""
    return np.asarray(brainmask, dtype=bool) | np.asarray(truth, dtype=bool)


def ranked_scores(
    scores: ArrayLike, truth: ArrayLike, brainmask: ArrayLike, rim: float = RIM
) -> tuple[FloatArray, BoolArray]:
    """Scores and truth of the ranked pixels of all slices together, [M] each; arguments as in `cut_scores`."""
    ranked = ranked_pixels(truth, brainmask)
    return cut_scores(scores, brainmask, rim)[ranked], np.asarray(truth, dtype=bool)[ranked]


def lost_lesion_share(truth: ArrayLike, brainmask: ArrayLike, rim: float = RIM) -> float:
    """Share of the lesion pixels outside the scored region, which no method can find; NaN without any."""
    truth = np.asarray(truth, dtype=bool)
    return float(_ratio(np.count_nonzero(truth & ~scored_region(brainmask, rim)), np.count_nonzero(truth)))


def chance(truth: ArrayLike, brainmask: ArrayLike) -> float:
    """Share of lesion pixels among the ranked ones, the AUPRC of a random score; NaN if none is ranked."""
    return float(_ratio(np.count_nonzero(truth), np.count_nonzero(ranked_pixels(truth, brainmask))))


# Ranking: scores are floats of any shape and range, infinite ones included, NaN is ranked last; truth is bool


def average_precision(scores: ArrayLike, truth: ArrayLike) -> float:
    """AUPRC as average precision over all pixels given, in [0, 1]; NaN if no pixel is lesion, 1 if all are."""
    ranks, truth = _as_ranks(scores, truth)
    return float(average_precision_score(truth, ranks)) if truth.any() else float("nan")


def auroc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Area under the ROC curve over all pixels given, in [0, 1]; NaN if no pixel is lesion, or if all are."""
    ranks, truth = _as_ranks(scores, truth)
    return float(roc_auc_score(truth, ranks)) if truth.any() and not truth.all() else float("nan")


def precision_recall(scores: ArrayLike, truth: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """The curve that AUPRC is the area under: precision and recall, [K] each, from the lowest threshold up.

    A precision holds from its own recall down to the next. Without any lesion pixel recall is NaN.
    """
    ranks, truth = _as_ranks(scores, truth)
    if not truth.any():
        return np.zeros(1), np.full(1, np.nan)
    precision, recall, _ = precision_recall_curve(truth, ranks, drop_intermediate=True)
    return precision, recall


def _as_ranks(scores: ArrayLike, truth: ArrayLike) -> tuple[np.ndarray, BoolArray]:
    """Both flattened; dense ranks keep the order and the ties, where scikit-learn refuses infinite scores."""
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    _require_same_shape("truth", truth, scores)
    ranks = rankdata(np.where(np.isnan(scores), -np.inf, scores), method="dense", axis=None)
    return ranks, truth.ravel()


# Segmentation at a threshold: scores [N, H, W] float (-inf where they do not count), truth [N, H, W] bool


def overlap_at(scores: ArrayLike, truth: ArrayLike, threshold: float) -> dict[str, FloatArray]:
    """Overlap of `scores >= threshold` with the truth, for a threshold above -inf.

    Returns:
        `dice`, `jaccard`, `sensitivity`, `precision`: each [N] float64 in [0, 1], or NaN (table at the top).
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
    """Distances in px between the edges of `scores >= threshold` and of the truth, for each slice.

    The edge of a mask is those of its pixels with at least one of their four neighbours outside it; what lies
    beyond the image is outside. Every edge pixel has a distance to the nearest edge pixel of the other mask.

    Returns:
        `assd`: the mean of these distances over the pixels of both edges together. `hd95`: the 95th
        percentile of the distances of one edge's pixels, of the two edges the larger. Each [N] float64, NaN
        if either mask is empty.
    """
    # MONAI takes seconds to import, and only this function needs it.
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    prediction, truth = _predict(scores, truth, threshold)
    defined = prediction.any(axis=(1, 2)) & truth.any(axis=(1, 2))
    masks = {
        "y_pred": torch.from_numpy(prediction[defined, None]),
        "y": torch.from_numpy(truth[defined, None]),
        "include_background": True,  # one channel, and it is the foreground
    }
    with warnings.catch_warnings():
        # MONAI warns of an argument that MONAI itself passes.
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
    """⌈Dice⌉: the one threshold for all slices with the highest mean over slices of Dice, found exactly.

    Returns:
        The threshold (of equally good ones the highest; inf if every score is -inf or NaN), and the mean Dice
        there, which is that of `overlap_at`: slices with no lesion count once anything is predicted in them.
    """
    thresholds, mean_dice = dice_curve(scores, truth)
    threshold = np.inf
    if thresholds.size:  # the first that is as good as the best but for the rounding errors of the running sum
        threshold = float(thresholds[np.argmax(mean_dice >= mean_dice.max() - 1e-12)])
    return threshold, mean_over_slices(overlap_at(scores, truth, threshold)["dice"])


def dice_curve(scores: ArrayLike, truth: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """The mean over slices of Dice at every distinct score.

    It takes one pass down the sorted pixels: a pixel that crosses the threshold changes only its own slice's
    Dice, so the sum over slices is a running sum of such changes.

    Returns:
        The distinct scores above -inf, descending, and the mean Dice at each: [K] float64 both.
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

    # Pixels with equal scores cross together: a threshold reaches only the state after the last of them.
    reachable = np.flatnonzero(np.append(values[1:] != values[:-1], True)[: len(values)])
    return values[reachable], mean_dice[reachable]


def _dice_changes(hit: BoolArray, slice_of: NDArray, truth: BoolArray) -> tuple[FloatArray, BoolArray]:
    """What each pixel changes in its slice's Dice when the pixels are predicted one after another.

    Args:
        hit: [M] bool, whether the pixel is lesion, in the order of prediction.
        slice_of: [M] int, the pixel's slice.
        truth: [N, H, W] bool.

    Returns:
        [M] float64, the change of the slice's Dice; [M] bool, whether this pixel is what makes it defined.
    """
    # 16 bits where they do: numpy then sorts in linear time.
    by_slice = np.argsort(slice_of.astype(np.min_scalar_type(len(truth))), kind="stable")
    slice_of, hit = slice_of[by_slice], hit[by_slice]
    n_pixels = np.bincount(slice_of, minlength=len(truth))
    first = (np.cumsum(n_pixels) - n_pixels)[slice_of]  # where the pixel's slice begins
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


# Means over slices and their uncertainty: 95 % percentile intervals of the bootstrap over slices, thresholds frozen


def mean_over_slices(per_slice_values: ArrayLike) -> float:
    """The mean of the values that are not NaN; NaN if there is none."""
    values = np.asarray(per_slice_values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def bootstrap_interval(per_slice_values: ArrayLike, n_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of values [N] that are not NaN; both ends NaN for fewer than two of them."""
    values = np.asarray(per_slice_values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    if defined.size < 2:
        return float("nan"), float("nan")
    how = {"n_resamples": n_resamples, "confidence_level": CONFIDENCE, "method": "percentile"}
    interval = bootstrap((defined,), np.mean, rng=np.random.default_rng(seed), **how).confidence_interval
    return float(interval.low), float(interval.high)


def paired_bootstrap(
    values_a: ArrayLike, values_b: ArrayLike, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """How much better a is than b on the same slices: mean(a) - mean(b), and its interval.

    Both are [N], in the same order of slices. A slice that is NaN in either is left out. A resample takes the same
    slices of a and of b.
    """
    values_a, values_b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    _require_same_shape("values_b", values_b, values_a)
    difference = values_a - values_b
    return mean_over_slices(difference), bootstrap_interval(difference, n_resamples, seed)


def auprc_bootstrap_interval(
    scores: ArrayLike, truth: ArrayLike, ranked: ArrayLike, n_resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The interval of the pooled AUPRC: the slices are resampled, then their ranked pixels pooled; args [N, H, W].

    Resamples with no lesion are left out; both ends are NaN for fewer than two slices, and if no slice has a lesion.
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
    scores: ArrayLike, truth: ArrayLike, ranked: ArrayLike, draws: ArrayLike, most_thresholds: int | None = None
) -> FloatArray:
    """The pooled AUPRC of many resamples of the slices at once, exact, ties included.

    Average precision needs the counts of predicted pixels and of hits at the distinct scores of lesion pixels
    alone: recall does not move at the others. In a resample they are the slices' counts, weighted by how
    often each slice was drawn, which is one matrix product for all resamples.

    Args:
        scores, truth, ranked: [N, H, W], as in `auprc_bootstrap_interval`.
        draws: [R, N] int, how often resample r holds slice n.
        most_thresholds: that are taken, evenly over the lesion pixels' scores; the AUPRC is then too low by at most
            the reciprocal of this number. None: all.

    Returns:
        [R] float64; NaN for a resample with no lesion pixel.
    """
    scores, truth = _as_slices("scores", scores, np.float64), _as_slices("truth", truth, bool)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ranked, draws = np.asarray(ranked, dtype=bool), np.asarray(draws, dtype=np.float64)
    pixels = [np.sort(s[r]) for s, r in zip(scores, ranked, strict=True)]
    lesions = [np.sort(s[r & t]) for s, r, t in zip(scores, ranked, truth, strict=True)]
    thresholds = np.sort(np.concatenate(lesions))
    if most_thresholds and len(thresholds) > most_thresholds:
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, most_thresholds).round().astype(int)]
    thresholds = np.unique(thresholds)[::-1]

    area, hits_before = np.zeros(len(draws)), np.zeros(len(draws))
    for start in range(0, len(thresholds), CHUNK):
        chunk = thresholds[start : start + CHUNK]
        hits = draws @ _counts_at_least(lesions, chunk)
        predicted = draws @ _counts_at_least(pixels, chunk)
        gained = np.diff(hits, prepend=hits_before[:, None])
        precision = hits / np.maximum(predicted, 1)  # where nothing is predicted, nothing is gained either
        area += np.sum(gained * precision, axis=1)
        hits_before = hits[:, -1]
    return _ratio(area, hits_before)


def _counts_at_least(sorted_scores: list[FloatArray], thresholds: FloatArray) -> FloatArray:
    """[N, G] float64: of each slice's ascending scores, how many reach each of the G thresholds."""
    return np.array([len(one) - np.searchsorted(one, thresholds) for one in sorted_scores], dtype=np.float64)


# The whole table


def evaluate(
    scores: ArrayLike,
    truth: ArrayLike,
    brainmask: ArrayLike,
    val: tuple[ArrayLike, ArrayLike, ArrayLike] | None = None,
    rim: float = RIM,
    n_resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Score the anomaly maps of a test set.

    Args:
        scores: [N, H, W] float, higher is more anomalous.
        truth: [N, H, W] bool, the lesions.
        brainmask: [N, H, W] bool.
        val: scores, truth and brain mask of the validation slices, [M, H, W] each. They alone choose the
            validation threshold; the test set's slices choose the oracle's.
        rim: as in `scored_region`.
        n_resamples, seed: of the bootstrap over slices; the thresholds stay.

    Returns:
        The summary: n_slices, auprc, auprc_interval, auprc_per_slice_mean, auprc_undefined (slices left out
        of that mean), auroc, chance, lost_lesion_share, nan_scores (NaN pixels of the scored region), and
        `oracle` and `validation`, each with the threshold, the mean over slices and `*_interval` of every
        segmentation metric, and `undefined`, the number of slices left out of each mean; `validation` is None
        without `val` or a lesion in it. What is undefined (or not finite) is None.
        The columns: lesion_area (px), auprc, oracle_* and validation_* of every segmentation metric, [N] each.
    """
    truth = _as_slices("truth", truth, bool)
    cut = cut_scores(scores, brainmask, rim)
    _require_same_shape("truth", truth, cut)
    ranked = ranked_pixels(truth, brainmask)
    auprc = [average_precision(s[r], t[r]) for s, t, r in zip(cut, truth, ranked, strict=True)]
    columns = {"lesion_area": np.count_nonzero(truth, axis=(1, 2)), "auprc": np.array(auprc)}
    summary = {
        "n_slices": len(truth),
        "auprc": _number(average_precision(cut[ranked], truth[ranked])),
        "auprc_interval": _numbers(auprc_bootstrap_interval(cut, truth, ranked, n_resamples, seed)),
        "auprc_per_slice_mean": _number(mean_over_slices(auprc)),
        "auprc_undefined": int(np.isnan(auprc).sum()),
        "auroc": _number(auroc(cut[ranked], truth[ranked])),
        "chance": _number(chance(truth, brainmask)),
        "lost_lesion_share": _number(lost_lesion_share(truth, brainmask, rim)),
        "nan_scores": int(np.isnan(np.asarray(scores)[scored_region(brainmask, rim)]).sum()),
        "oracle": None,
        "validation": None,
    }
    thresholds = {"oracle": best_threshold(cut, truth)[0]}
    if val is not None and np.any(val[1]):
        val_scores, val_truth, val_brainmask = val
        thresholds["validation"] = best_threshold(cut_scores(val_scores, val_brainmask, rim), val_truth)[0]
    for choice, threshold in thresholds.items():
        segmentation = overlap_at(cut, truth, threshold) | surface_distances_at(cut, truth, threshold)
        columns |= {f"{choice}_{name}": values for name, values in segmentation.items()}
        summary[choice] = {"threshold": _number(threshold)}
        for name, values in segmentation.items():
            summary[choice][name] = _number(mean_over_slices(values))
            summary[choice][f"{name}_interval"] = _numbers(bootstrap_interval(values, n_resamples, seed))
        summary[choice]["undefined"] = _count_undefined(segmentation)
    return Evaluation(summary, columns)


def by_lesion_size(per_slice: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """The means over slices for small, medium and large lesions: the thirds of the test set by lesion area.

    Args:
        per_slice: the columns of an `Evaluation`, [N] each. Slices with no lesion are left out.

    Returns:
        For `small`, `medium` and `large`: n_slices, area_bounds (smallest and largest lesion in px), the mean
        of every other column, and `undefined`, the number of slices left out of each mean. Lesions of equal
        area stay together, so that thirds can differ in size and one can be empty; its means are None.
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
        raise ValueError(f"{name} must have the shape [N, H, W] with at least one slice, got {array.shape}")
    return array


def _require_same_shape(name: str, array: np.ndarray, other: np.ndarray) -> None:
    if array.shape != other.shape:
        raise ValueError(f"{name} has the shape {array.shape}, expected {other.shape}")


def _ratio(numerator: ArrayLike, denominator: ArrayLike) -> FloatArray:
    """The quotient in float64, NaN where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity: None stands for them."""
    return float(value) if np.isfinite(value) else None


def _numbers(values: tuple[float, ...]) -> list[float | None]:
    return [_number(value) for value in values]

"""Metrics against independent computations, and degenerate cases against the documented results."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.morphology import disk
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
    roc_auc_score,
)

from evaluation import metrics
from evaluation.evaluate import by_lesion_size
from evaluation.scores import smooth_scores
from tests.evaluation.conftest import evaluate

NAN = float("nan")


def random_case(seed: int, n: int = 5, size: int = 16, levels: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Return scores with many ties (`levels` distinct values), higher on lesions, and the truth: [n, size, size]."""
    rng = np.random.default_rng(seed)
    truth = rng.random((n, size, size)) < rng.uniform(0.05, 0.4, (n, 1, 1))
    scores = rng.integers(0, levels, truth.shape) + rng.integers(0, 4, truth.shape) * truth
    return scores.astype(np.float32) / 7, truth


def blobs(seed: int, n: int = 4, size: int = 24) -> np.ndarray:
    """Return smooth random masks, bool [n, size, size]; many touch the border, none is empty."""
    noise = np.random.default_rng(seed).normal(size=(n, size, size))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2))
    return smooth > np.quantile(smooth, 0.8, axis=(1, 2), keepdims=True)


def disk_mask(n: int = 3, size: int = 64, radius: float = 26) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size // 2
    return np.repeat((y**2 + x**2 <= radius**2)[None], n, axis=0)


# ------------------------------------------------------------------------------------------------------------
# Scored region


@pytest.mark.parametrize(
    ("shape", "radius"),
    [((128, 128), 4), ((64, 64), 2), ((32, 32), 1), ((16, 16), 1), ((240, 240), 8), ((256, 128), 4)],
)
def test_scored_region_is_erosion_by_a_disk_scaled_with_the_image(shape, radius):
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=shape), min(shape) / 12)
    mask = smooth > np.quantile(smooth, 0.4)
    mask[: shape[0] // 2] |= True  # touches three sides of the image
    expected = ndimage.binary_erosion(mask, disk(radius), border_value=0)
    assert expected.any()
    np.testing.assert_array_equal(metrics.scored_region(mask[None])[0], expected)


def test_scored_region_excludes_the_image_border_without_background():
    region = metrics.scored_region(np.ones((2, 128, 128), dtype=bool))
    expected = np.zeros_like(region)
    expected[:, 4:-4, 4:-4] = True
    np.testing.assert_array_equal(region, expected)


def test_scores_outside_the_scored_region_rank_lowest_and_are_never_predicted():
    brain = disk_mask()
    region = metrics.scored_region(brain)
    truth = np.zeros_like(brain)
    truth[:, 32, 32:60] = True  # from the centre across the rim to outside the brain
    scores = np.where(region, -5.0, 1000.0)
    cut = metrics.mask_scores(scores, brain)
    overlap = metrics.overlap_at(cut, truth, -5.0)
    np.testing.assert_allclose(overlap["sensitivity"], (truth & region).sum((1, 2)) / 28)
    np.testing.assert_allclose(overlap["precision"], (truth & region).sum((1, 2)) / region.sum((1, 2)))


def test_lesion_pixels_outside_the_brain_count_as_missed():
    brain = disk_mask()
    truth = np.zeros_like(brain)
    truth[:, 30:34, 30:34] = True
    scores = truth.astype(float)
    assert evaluate(scores, truth, brain).summary["auprc"] == 1
    truth[:, :2, :8] = True  # as many again outside the brain, with the same score
    summary = evaluate(truth.astype(float), truth, brain).summary
    assert summary["lost_lesion_share"] == 0.5
    assert summary["oracle"]["sensitivity"] == 0.5
    n_brain = int(brain[0].sum())
    assert summary["chance"] == pytest.approx(32 / (n_brain + 16))
    # Recall is 0.5 at precision 1; the rest is found only when every pixel is predicted.
    assert summary["auprc"] == pytest.approx(0.5 + 0.5 * 32 / (n_brain + 16))


def test_brain_rim_is_ranked_but_healthy_pixels_outside_the_brain_are_not():
    scores, truth = random_case(0, n=3, size=64)
    brain = disk_mask()
    truth &= brain
    cut = np.where(metrics.scored_region(brain), scores, scores.min() - 1)
    summary = evaluate(scores, truth, brain, n_resamples=10).summary
    assert summary["auprc"] == pytest.approx(average_precision_score(truth[brain], cut[brain]), abs=1e-12)
    assert summary["auroc"] == pytest.approx(roc_auc_score(truth[brain], cut[brain]), abs=1e-12)
    assert summary["chance"] == pytest.approx(truth[brain].mean())
    per_slice = [average_precision_score(t[b], c[b]) for t, b, c in zip(truth, brain, cut, strict=True)]
    assert summary["auprc_per_slice_mean"] == pytest.approx(np.mean(per_slice), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Ranking and overlap against scikit-learn


@pytest.mark.parametrize("seed", range(10))
def test_ranking_metrics_agree_with_scikit_learn(seed):
    scores, truth = random_case(seed)
    flat = truth.ravel(), scores.ravel()
    assert metrics.average_precision(scores, truth) == pytest.approx(average_precision_score(*flat), abs=1e-6)
    assert metrics.auroc(scores, truth) == pytest.approx(roc_auc_score(*flat), abs=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_overlap_agrees_with_scikit_learn(seed):
    scores, truth = random_case(seed)
    threshold = float(np.random.default_rng(seed).choice(scores.ravel()))
    references = {"dice": f1_score, "jaccard": jaccard_score, "sensitivity": recall_score, "precision": precision_score}
    for name, values in metrics.overlap_at(scores, truth, threshold).items():
        reference = references.pop(name)
        expected = [reference(t.ravel(), s.ravel() >= threshold) for t, s in zip(truth, scores, strict=True)]
        np.testing.assert_allclose(values, expected, atol=1e-6)
    assert not references


def test_threshold_is_not_rounded_to_the_scores_precision():
    scores = np.full((1, 16, 16), np.float32(0.1))  # a little above 0.1
    just_above = float(np.float32(0.1)) + 1e-12
    assert metrics.overlap_at(scores, scores > 0, just_above)["sensitivity"] == [0]
    assert metrics.overlap_at(scores, scores > 0, 0.1)["sensitivity"] == [1]


# ------------------------------------------------------------------------------------------------------------
# Surface distances against brute force


def edge_coordinates(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of the mask with a 4-neighbour outside the mask or the image."""
    return np.argwhere(mask & ~ndimage.binary_erosion(mask, border_value=0)).astype(np.float64)


def brute_force_distances(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    distances = cdist(edge_coordinates(prediction), edge_coordinates(truth))
    to_truth, to_prediction = distances.min(axis=1), distances.min(axis=0)
    assd = np.concatenate([to_truth, to_prediction]).mean()
    return assd, max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95))


@pytest.mark.parametrize("seed", range(8))
def test_surface_distances_agree_with_brute_force(seed):
    prediction, truth = blobs(seed), blobs(seed + 100)
    computed = metrics.surface_distances_at(prediction.astype(np.float32), truth, 0.5)
    expected = [brute_force_distances(p, t) for p, t in zip(prediction, truth, strict=True)]
    np.testing.assert_allclose(computed["assd"], [one[0] for one in expected], atol=1e-5)
    np.testing.assert_allclose(computed["hd95"], [one[1] for one in expected], atol=1e-5)


def test_surface_distances_of_masks_that_fill_the_image_or_one_pixel():
    prediction, truth = np.ones((2, 16, 16), dtype=bool), np.zeros((2, 16, 16), dtype=bool)
    truth[0, 8, 8] = truth[1, 0, 0] = True
    computed = metrics.surface_distances_at(prediction.astype(float), truth, 1.0)
    expected = [brute_force_distances(p, t) for p, t in zip(prediction, truth, strict=True)]
    np.testing.assert_allclose(np.stack([computed["assd"], computed["hd95"]], axis=1), expected, atol=1e-5)


def test_surface_distances_of_shifted_squares():
    scores, truth = np.zeros((1, 32, 32)), np.zeros((1, 32, 32), dtype=bool)
    truth[0, 10:13, 10:13] = True
    scores[0, 10:13, 20:23] = 1
    found = metrics.surface_distances_at(scores, truth, 1.0)
    # The columns of each square's 8 edge pixels are 8, 9 and 10 px from the other square's nearest column.
    assert found["assd"] == pytest.approx([(3 * 8 + 2 * 9 + 3 * 10) / 8])
    assert found["hd95"] == pytest.approx([10])
    assert metrics.surface_distances_at(truth.astype(float), truth, 1.0) == {"assd": [0], "hd95": [0]}


# ------------------------------------------------------------------------------------------------------------
# Degenerate cases: the table in the module's docstring


@pytest.mark.parametrize(
    ("lesion", "predicted", "expected"),
    [
        (True, False, {"dice": 0, "jaccard": 0, "sensitivity": 0, "precision": NAN, "assd": NAN, "hd95": NAN}),
        (False, True, {"dice": 0, "jaccard": 0, "sensitivity": NAN, "precision": 0, "assd": NAN, "hd95": NAN}),
        (False, False, dict.fromkeys(["dice", "jaccard", "sensitivity", "precision", "assd", "hd95"], NAN)),
    ],
)
def test_empty_truth_and_empty_prediction(lesion, predicted, expected):
    scores, truth = np.zeros((2, 16, 16)), np.zeros((2, 16, 16), dtype=bool)
    truth[0, 5:9, 5:9] = scores[0, 5:9, 5:9] = 1  # slice 0 is predicted perfectly
    truth[1, 2:4, 2:4] = lesion
    scores[1, 2:4, 2:4] = predicted
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = metrics.overlap_at(scores, truth, 1.0) | metrics.surface_distances_at(scores, truth, 1.0)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, [0 if name in ("assd", "hd95") else 1, expected[name]], name)


def test_undefined_slices_are_left_out_of_the_mean_and_counted():
    brain = np.ones((3, 16, 16), dtype=bool)
    truth = np.zeros_like(brain)
    truth[:2, 5:9, 5:9] = True  # the third slice has no lesion
    scores = truth * 1.0
    scores[1] = 0  # the second lesion is missed
    found = evaluate(scores, truth, brain, n_resamples=50)
    oracle = found.summary["oracle"]
    assert oracle["undefined"] == {"dice": 1, "jaccard": 1, "sensitivity": 1, "precision": 2, "assd": 2, "hd95": 2}
    assert (oracle["dice"], oracle["precision"], oracle["assd"]) == (0.5, 1, 0)
    assert oracle["precision_interval"] == [None, None]  # no interval from a single slice
    assert found.summary["auprc_undefined"] == 1
    np.testing.assert_array_equal(found.per_slice["oracle_dice"], [1, 0, NAN])


def test_ranking_without_lesion_or_without_healthy_pixels():
    scores = np.arange(16.0)
    assert np.isnan(metrics.average_precision(scores, np.zeros(16, bool)))
    assert np.isnan(metrics.auroc(scores, np.zeros(16, bool)))
    assert metrics.average_precision(scores, np.ones(16, bool)) == 1
    assert np.isnan(metrics.auroc(scores, np.ones(16, bool)))


def test_constant_scores_give_chance_level():
    _, truth = random_case(1)
    brain = np.ones_like(truth)
    summary = evaluate(np.full(truth.shape, 0.3, np.float32), truth, brain, n_resamples=10).summary
    region = metrics.scored_region(brain)
    assert summary["chance"] == pytest.approx(truth.mean())
    assert metrics.average_precision(np.full(truth.shape, 0.3), truth) == pytest.approx(truth.mean())
    assert metrics.auroc(np.full(truth.shape, 0.3), truth) == 0.5
    expected = 2 * (truth & region).sum((1, 2)) / (truth.sum((1, 2)) + region.sum((1, 2)))
    assert summary["oracle"]["threshold"] == pytest.approx(0.3)
    assert summary["oracle"]["dice"] == pytest.approx(expected.mean())


def test_nan_scores_rank_last_are_never_predicted_and_are_counted():
    scores, truth = random_case(2)
    brain = np.ones_like(truth)
    broken = scores.copy()
    broken[:, 6:9] = NAN
    lowest = np.where(np.isnan(broken), -1, broken)
    assert metrics.average_precision(broken, truth) == metrics.average_precision(lowest, truth)
    assert metrics.auroc(broken, truth) == metrics.auroc(lowest, truth)
    assert metrics.best_threshold(broken, truth) == metrics.best_threshold(np.where(lowest < 0, -np.inf, lowest), truth)
    summary = evaluate(broken, truth, brain, n_resamples=10).summary
    assert summary["nan_scores"] == 5 * 3 * 14  # the image border is outside the scored region


def test_an_all_nan_map_counts_as_no_detection():
    _, truth = random_case(3)
    found = evaluate(np.full(truth.shape, NAN), truth, np.ones_like(truth), n_resamples=10)
    assert found.summary["auprc"] == pytest.approx(found.summary["chance"])
    assert found.summary["auroc"] == 0.5
    assert found.summary["oracle"]["threshold"] is None
    assert found.summary["oracle"]["dice"] == 0
    json.dumps(found.summary, allow_nan=False)


def test_test_set_without_lesions():
    scores, truth = random_case(4)
    found = evaluate(scores, np.zeros_like(truth), np.ones_like(truth), n_resamples=10)
    for name in ("auprc", "auprc_per_slice_mean", "auroc", "lost_lesion_share"):
        assert found.summary[name] is None
    assert found.summary["auprc_interval"] == [None, None]
    assert found.summary["chance"] == 0
    assert found.summary["oracle"]["dice"] == 0
    json.dumps(found.summary, allow_nan=False)


@pytest.mark.parametrize("bad", [np.zeros((16, 16)), np.zeros((0, 16, 16)), np.zeros((2, 16, 8))])
def test_errors_on_wrong_shapes_name_the_argument(bad):
    good = np.ones((2, 16, 16), dtype=bool)
    for arguments in [(bad, good, good), (good, bad, good), (good, good, bad)]:
        with pytest.raises(ValueError, match=r"scores|truth|brainmask"):
            evaluate(*arguments)
    with pytest.raises(ValueError, match="truth"):
        metrics.best_threshold(good, bad)


@pytest.mark.parametrize("threshold", [-np.inf, NAN])
def test_thresholds_that_would_predict_outside_the_brain_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        metrics.overlap_at(*random_case(0), threshold)


# ------------------------------------------------------------------------------------------------------------
# Best threshold


def brute_force_best(scores: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Try each distinct score in descending order; return the first with the highest mean Dice, and that Dice."""
    thresholds = np.unique(scores[scores > -np.inf].astype(np.float64))[::-1]
    means = []
    for threshold in thresholds:
        prediction = scores >= threshold
        size = prediction.sum((1, 2)) + truth.sum((1, 2))
        dice = 2 * (prediction & truth).sum((1, 2))[size > 0] / size[size > 0]
        means.append(dice.mean())
    best = int(np.flatnonzero(np.array(means) > max(means) - 1e-12)[0])
    return float(thresholds[best]), float(means[best])


@pytest.mark.parametrize("levels", [2, 5, 50, 10**7])
@pytest.mark.parametrize("seed", range(6))
def test_best_threshold_agrees_with_brute_force(seed, levels):
    scores, truth = random_case(seed, levels=levels, size=12)
    if seed % 2:
        truth[1] = False  # a slice with no lesion, whose Dice is defined only once something is predicted
        scores[:, :3] = -np.inf  # outside the scored region
    threshold, mean_dice = metrics.best_threshold(scores, truth)
    expected = brute_force_best(scores, truth)
    assert threshold == expected[0]
    assert mean_dice == pytest.approx(expected[1], abs=1e-12)


def test_best_threshold_is_shared_by_all_slices_and_weighs_them_equally():
    truth = np.zeros((3, 16, 16), dtype=bool)
    truth[0, :8] = True  # one large lesion, found at 2; two small ones, found at 1
    truth[1:, 0, :2] = True
    scores = np.where(truth, 1.0, 0.0)
    scores[0] = np.where(truth[0], 2.0, 1.5)
    # Pooled pixels would favour 2; the mean over slices favours 1: (2/3 + 1 + 1) / 3 against (1 + 0 + 0) / 3.
    assert metrics.best_threshold(scores, truth) == (1.0, pytest.approx((2 / 3 + 2) / 3))


def test_best_threshold_ignores_slices_while_their_dice_is_undefined():
    scores, truth = np.zeros((2, 16, 16)), np.zeros((2, 16, 16), dtype=bool)
    truth[0, :2, :3] = True
    scores[0, 0, :3], scores[0, 1, :3] = 2, 1
    scores[1, 0, 0] = 1  # a false positive in the slice with no lesion
    # At 2 the second slice is undefined and the mean 6/9; at 1 the first has Dice 1, but the second 0.
    assert metrics.best_threshold(scores, truth) == (2.0, pytest.approx(2 / 3))


def test_validation_threshold_comes_from_the_validation_slices_alone():
    brain = np.ones((4, 16, 16), dtype=bool)
    truth = np.zeros_like(brain)
    truth[:, 5:10, 5:10] = True
    ramp = np.random.default_rng(0).permutation(np.linspace(0, 0.4, truth.size)).reshape(truth.shape)
    scores = ramp + 0.5 * truth  # test lesions score above 0.5, healthy pixels below 0.4
    val_scores = ramp + 2 + 5 * truth  # validation lesions above 7, healthy pixels above 2
    val = (val_scores, truth, brain)
    found = evaluate(scores, truth, brain, val, n_resamples=10).summary
    lowest_lesion = val_scores[truth & metrics.scored_region(brain)].min()
    assert found["validation"]["threshold"] == lowest_lesion
    assert found["validation"]["dice"] == 0  # nothing on the test slices reaches it
    assert found["oracle"]["dice"] == 1
    # The test set does not affect the validation threshold, nor the validation set the oracle.
    other = evaluate(scores * 3 + 1, ~truth, brain, val, n_resamples=10).summary
    assert other["validation"]["threshold"] == lowest_lesion
    assert evaluate(scores, truth, brain, n_resamples=10).summary["oracle"] == found["oracle"]


@pytest.mark.parametrize("where", ["outside the brain", "on the brain's rim", "without a score"])
def test_validation_is_null_if_no_threshold_reaches_a_lesion(where):
    scores, truth = random_case(0)
    brain, lesions, val_scores = np.zeros_like(truth), np.zeros_like(truth), scores.copy()
    brain[:, 2:-2, 2:-2] = True
    lesions[:, 2 - (where == "outside the brain"), 4:6] = True
    if where == "without a score":
        lesions = metrics.scored_region(brain)
        val_scores[lesions] = NAN
    found = evaluate(scores, truth, brain, val=(val_scores, lesions, brain), n_resamples=10)
    assert found.summary["validation"] is None
    assert found.summary["healthy"]


def test_validation_is_null_without_validation_slices():
    scores, truth = random_case(0)
    found = evaluate(scores, truth, np.ones_like(truth), n_resamples=10)
    for choice in ("validation", "healthy"):
        assert found.summary[choice] is None
        assert not [name for name in found.per_slice if name.startswith(choice)]


# ------------------------------------------------------------------------------------------------------------
# Properties

score_arrays = arrays(np.float64, (3, 6, 6), elements=st.integers(-4, 4).map(float))
truth_arrays = arrays(np.bool_, (3, 6, 6))
examples = settings(derandomize=True, max_examples=60, deadline=None)


@examples
@given(score_arrays, truth_arrays, st.integers(-4, 5))
def test_dice_is_a_function_of_jaccard(scores, truth, threshold):
    found = metrics.overlap_at(scores, truth, threshold)
    np.testing.assert_allclose(found["dice"], 2 * found["jaccard"] / (1 + found["jaccard"]), atol=1e-12)


@examples
@given(score_arrays, truth_arrays)
def test_monotone_transforms_change_neither_ranking_metrics_nor_best_dice(scores, truth):
    for transformed in (np.exp(scores), 3 * scores**3 + scores, scores / 1000 - 7):
        for metric in (metrics.average_precision, metrics.auroc):
            np.testing.assert_allclose(metric(transformed, truth), metric(scores, truth), atol=1e-12)
        expected = metrics.best_threshold(scores, truth)[1]
        np.testing.assert_allclose(metrics.best_threshold(transformed, truth)[1], expected, atol=1e-12)


@examples
@given(score_arrays, truth_arrays, st.floats(-5, 5))
def test_no_threshold_beats_the_best(scores, truth, threshold):
    dice = metrics.mean_over_slices(metrics.overlap_at(scores, truth, threshold)["dice"])
    best = metrics.best_threshold(scores, truth)[1]
    assert np.isnan(dice) or best >= dice - 1e-12


# ------------------------------------------------------------------------------------------------------------
# Uncertainty


def test_bootstrap_interval_covers_the_true_mean():
    rng = np.random.default_rng(0)
    intervals = [metrics.bootstrap_interval(rng.normal(0.4, 0.2, 40), 400, seed) for seed in range(300)]
    coverage = np.mean([low <= 0.4 <= high for low, high in intervals])
    assert 0.90 <= coverage <= 0.98  # 0.95, slightly less for 40 slices, ± the sampling error of 300 trials


def test_bootstrap_interval_is_seeded_and_ignores_nan():
    values = np.random.default_rng(1).random(30)
    with_nan = np.insert(values, [3, 17], NAN)
    assert metrics.bootstrap_interval(values, seed=5) == metrics.bootstrap_interval(with_nan, seed=5)
    assert metrics.bootstrap_interval(values, seed=5) != metrics.bootstrap_interval(values, seed=6)
    low, high = metrics.bootstrap_interval(values)
    error = values.std() / np.sqrt(30)  # of the mean, which is nearly normal
    np.testing.assert_allclose([low, high], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.2 * error)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, NAN], [NAN, NAN]])
def test_fewer_than_two_slices_have_no_interval(values):
    assert np.isnan(metrics.bootstrap_interval(values)).all()


def test_paired_bootstrap_resamples_slices_jointly():
    rng = np.random.default_rng(2)
    hard = rng.random(50)  # slices differ far more than the methods do
    a, b = hard + 0.05 + rng.normal(0, 0.01, 50), hard + rng.normal(0, 0.01, 50)
    a[7] = b[11] = NAN
    difference, (low, high) = metrics.paired_bootstrap(a, b)
    both = ~np.isnan(a) & ~np.isnan(b)
    assert difference == pytest.approx(a[both].mean() - b[both].mean())
    assert 0.04 < low < difference < high < 0.06
    assert metrics.paired_bootstrap(b, a)[0] == -difference
    assert metrics.paired_bootstrap(a, a) == (0, (0, 0))


@pytest.mark.parametrize("levels", [4, 10**7])
def test_resampled_auprc_agrees_with_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    scores, truth = random_case(3, n=6, levels=levels)
    scores[:, :3] = -np.inf
    truth[2] = False
    ranked = truth | (rng.random(truth.shape) < 0.7)
    draws = rng.multinomial(6, np.full(6, 1 / 6), 20)
    pixels = metrics.within(scores, ranked), metrics.within(truth, ranked)
    found = metrics.weighted_auprc(*pixels, draws)
    finite = np.where(scores > -np.inf, scores, -1)
    for value, weights in zip(found, draws, strict=True):
        weight = np.broadcast_to(weights[:, None, None], truth.shape)[ranked]
        expected = average_precision_score(truth[ranked], finite[ranked], sample_weight=weight)
        assert value == pytest.approx(expected, abs=1e-10)
    plain = metrics.weighted_auprc(*pixels, np.ones((1, 6)))
    assert plain == pytest.approx(metrics.average_precision(scores[ranked], truth[ranked]), abs=1e-12)


def test_resampled_auprc_does_not_depend_on_the_chunk_size(monkeypatch):
    scores, truth = random_case(5, n=4, levels=10**7)
    draws = np.random.default_rng(0).multinomial(4, np.full(4, 1 / 4), 5)
    unchunked = metrics.weighted_auprc(scores, truth, draws)
    monkeypatch.setattr(metrics, "CHUNK", 7)
    chunked = metrics.weighted_auprc(scores, truth, draws)
    np.testing.assert_allclose(chunked, unchunked, atol=1e-12)


def test_auprc_interval_agrees_with_pooling_resampled_slices():
    scores, truth = random_case(6, n=12, size=8)
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(1000):
        slices = rng.integers(0, 12, 12)
        resampled.append(average_precision_score(truth[slices].ravel(), scores[slices].ravel()))
    low, high = metrics.auprc_bootstrap_interval(scores, truth, 4000)
    width = high - low
    np.testing.assert_allclose([low, high], np.percentile(resampled, [2.5, 97.5]), atol=0.1 * width)
    assert low < metrics.average_precision(scores, truth) < high


def test_auprc_interval_of_too_few_slices_and_of_resamples_without_lesion():
    scores, truth = random_case(7, n=2)
    assert np.isnan(metrics.auprc_bootstrap_interval(scores[:1], truth[:1])).all()
    truth[1] = False  # a quarter of the resamples contain only the second slice
    low, high = metrics.auprc_bootstrap_interval(scores, truth)
    assert 0 < low < high < 1


# ------------------------------------------------------------------------------------------------------------
# Summary


def test_summary_agrees_with_the_per_slice_columns():
    scores, truth = random_case(8, n=6, size=64, levels=30)
    brain = disk_mask(6)
    truth &= brain
    found = evaluate(scores, truth, brain, val=(scores[:2], truth[:2], brain[:2]), n_resamples=100)
    json.dumps(found.summary, allow_nan=False)
    np.testing.assert_array_equal(found.per_slice["lesion_area"], truth.sum((1, 2)))
    for choice in ("oracle", "validation", "healthy"):
        block = found.summary[choice]
        for name in ("dice", "jaccard", "sensitivity", "precision", "assd", "hd95"):
            values = found.per_slice[f"{choice}_{name}"]
            assert block[name] == pytest.approx(values.mean())
            assert block[f"{name}_interval"] == pytest.approx(metrics.bootstrap_interval(values, 100))
    assert found.summary["oracle"]["dice"] >= found.summary["validation"]["dice"]
    cut = metrics.mask_scores(scores, brain)
    assert found.summary["oracle"]["threshold"] == brute_force_best(cut, truth)[0]
    assert found.summary["validation"]["threshold"] == brute_force_best(cut[:2], truth[:2])[0]
    assert found.summary["auprc_interval"][0] < found.summary["auprc"] < found.summary["auprc_interval"][1]


def test_lesion_sizes_split_the_slices_into_thirds():
    area = np.array([90, 10, 50, 20, 80, 0, 60, 30, 70, 40, 0, 0])  # three without lesion
    dice = area / 100
    dice[1] = NAN
    thirds = by_lesion_size({"lesion_area": area, "oracle_dice": dice})
    assert [third["area_bounds"] for third in thirds.values()] == [[10, 30], [40, 60], [70, 90]]
    assert [third["n_slices"] for third in thirds.values()] == [3, 3, 3]
    np.testing.assert_allclose([third["oracle_dice"] for third in thirds.values()], [0.25, 0.5, 0.8])
    assert [third["undefined"]["oracle_dice"] for third in thirds.values()] == [1, 0, 0]


def test_lesion_sizes_of_too_few_slices():
    thirds = by_lesion_size({"lesion_area": np.array([5, 5]), "oracle_dice": np.array([0.1, 0.3])})
    assert thirds["small"]["oracle_dice"] == pytest.approx(0.2)
    for name in ("medium", "large"):
        assert thirds[name]["n_slices"] == 0
        assert thirds[name]["oracle_dice"] is None
        assert thirds[name]["area_bounds"] is None
    assert by_lesion_size({"lesion_area": np.zeros(3)})["large"]["n_slices"] == 0


@pytest.mark.parametrize(("how", "width"), [("median3", 3), ("median5", 5)])
def test_scores_are_smoothed_slice_by_slice(how, width):
    scores = np.random.default_rng(0).normal(size=(3, 12, 10))
    padded = np.pad(scores, [(0, 0), *2 * [2 * (width // 2,)]], mode="symmetric")
    expected = [
        [[np.median(one[i : i + width, j : j + width]) for j in range(10)] for i in range(12)] for one in padded
    ]
    np.testing.assert_allclose(smooth_scores(scores, how), expected)
    np.testing.assert_array_equal(smooth_scores(scores, "none"), scores)

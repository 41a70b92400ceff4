"""Scores of whole subjects against scipy, scikit-learn, MONAI and scikit-image."""

import itertools
import json

import numpy as np
import pytest
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from scipy import ndimage
from skimage import measure
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score, roc_auc_score

from evaluation import metrics, results
from evaluation.evaluate import ScoredSlices, evaluate_parts, masked_scores
from evaluation.subjects import components, needs_subject_scores
from tests.evaluation.conftest import auprc_error_bound

VOXEL = (2.0, 1.5, 1.0)
DEPTH, SIZE = 6, 32


def subject(name: str, seed: int, n_lesions: int) -> ScoredSlices:
    """Return a subject's slices 70 to 75, with box-shaped lesions that no slice but the middle ones shows."""
    rng = np.random.default_rng(seed)
    brainmask, truth = np.zeros((2, DEPTH, SIZE, SIZE), bool)
    brainmask[:, 3:29, 4:28] = True
    for k in range(n_lesions):
        row = 7 + 8 * k
        truth[2:5, row : row + 4, 10 : 14 + seed % 3] = True
    scores = ndimage.gaussian_filter(rng.normal(size=truth.shape), 1) + 0.25 * ndimage.gaussian_filter(1.0 * truth, 1)
    names = [f"{name}_{70 + z}" for z in range(DEPTH)]
    return ScoredSlices(scores.astype(np.float32), truth, brainmask, names, np.full(DEPTH, n_lesions == 0))


def joined(subjects: list[ScoredSlices]) -> ScoredSlices:
    arrays = (np.concatenate([getattr(one, key) for one in subjects]) for key in ("scores", "truth", "brainmask"))
    names = [name for one in subjects for name in one.names]
    return ScoredSlices(*arrays, names, np.concatenate([one.healthy for one in subjects]))


@pytest.fixture(scope="module")
def subjects() -> list[ScoredSlices]:
    """Six patients with one or two lesions, and four healthy subjects."""
    return [subject(f"P{i}", i, 1 + i % 2) for i in range(6)] + [subject(f"H{i}", 10 + i, 0) for i in range(4)]


@pytest.fixture(scope="module")
def found(subjects):
    val = [joined([subject("V0", 20, 1), subject("V1", 21, 0)])]
    return evaluate_parts([joined(subjects)], val, voxel_size=VOXEL, n_resamples=200)


def masked(one: ScoredSlices) -> np.ndarray:
    return masked_scores(one, metrics.RIM)


def thresholds(found) -> dict[str, float]:
    return {choice: found.summary[choice]["threshold"] for choice in results.THRESHOLDS}


def column(found, name: str) -> np.ndarray:
    return found.per_subject[name]


def test_voxels_of_a_subject_are_pooled(subjects, found):
    assert column(found, "subject").tolist() == [one.names[0].split("_")[0] for one in subjects]
    for i, one in enumerate(subjects[:6]):
        inside = one.brainmask
        finite = np.where(np.isfinite(masked(one)), masked(one), -9)[inside]
        expected = average_precision_score(one.truth[inside], finite)
        assert column(found, "auprc")[i] == pytest.approx(expected, abs=1e-6)
        for choice, threshold in thresholds(found).items():
            marked = (masked(one) >= threshold).ravel()
            for name, reference in {
                "dice": f1_score,
                "sensitivity": recall_score,
                "precision": precision_score,
            }.items():
                expected = reference(one.truth.ravel(), marked, zero_division=np.nan)
                assert column(found, f"{choice}_{name}")[i] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_distances_are_in_mm_and_three_dimensional(subjects, found):
    for i, one in enumerate(subjects[:6]):
        marked = masked(one) >= thresholds(found)["healthy"]
        assert marked.any()
        pair = {"y_pred": torch.tensor(marked[None, None]), "y": torch.tensor(one.truth[None, None])}
        options = {"include_background": True, "spacing": list(VOXEL)}
        assd = compute_average_surface_distance(**pair, **options, symmetric=True).item()
        hd95 = compute_hausdorff_distance(**pair, **options, percentile=95).item()
        assert column(found, "healthy_assd_mm")[i] == pytest.approx(assd, abs=1e-6)
        assert column(found, "healthy_hd95_mm")[i] == pytest.approx(hd95, abs=1e-6)
        # Against scipy: distance maps of the edges, which have a face neighbour outside the mask.
        edges = [mask & ~ndimage.binary_erosion(mask) for mask in (marked, one.truth)]
        away = [ndimage.distance_transform_edt(~edge, sampling=VOXEL) for edge in edges]
        expected = np.concatenate([away[1][edges[0]], away[0][edges[1]]]).mean()
        assert assd == pytest.approx(expected, abs=1e-4)


def test_distances_need_consecutive_slices_and_a_voxel_size(subjects):
    gap = joined(subjects)._replace(names=[name.replace("_72", "_172") for name in joined(subjects).names])
    for parts, voxel_size in (([gap], VOXEL), ([joined(subjects)], None)):
        evaluation = evaluate_parts(parts, voxel_size=voxel_size, n_resamples=10)
        assert np.isnan(evaluation.per_subject["oracle_assd_mm"]).all()
        assert evaluation.summary["by_subject"]["oracle"]["assd_mm"] is None


def test_lesions_are_found_one_by_one(subjects, found):
    """Components as scikit-image labels them; whether they overlap is checked voxel by voxel."""
    for choice, threshold in thresholds(found).items():
        n_lesions = n_found = 0
        for i, one in enumerate(subjects):
            lesions = measure.label(one.truth, connectivity=3)
            marks = measure.label(masked(one) >= threshold, connectivity=3)
            pairs = {(a, b) for a, b in zip(lesions.ravel(), marks.ravel(), strict=True) if a and b}
            hit, touching = {a for a, _ in pairs}, {b for _, b in pairs}
            assert column(found, f"{choice}_lesions_found")[i] == len(hit)
            assert column(found, f"{choice}_false_positives")[i] == marks.max() - len(touching)
            assert column(found, "n_lesions")[i] == lesions.max()
            n_lesions, n_found = n_lesions + lesions.max(), n_found + len(hit)
        block = found.summary["by_subject"][choice]
        assert block["n_lesions"] == n_lesions == 9
        assert block["lesions_found"] == pytest.approx(n_found / n_lesions)


def test_corner_neighbours_are_connected_but_not_across_a_gap():
    mask = np.zeros((3, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = True
    assert components(mask, np.array([70, 71, 72]))[1] == 1
    assert components(mask, np.array([70, 71, 73]))[1] == 2
    assert components(mask, np.array([1, 5, 9]))[1] == 3


def test_froc_counts_lesions_and_false_positives_at_each_threshold(subjects, found):
    froc = found.summary["by_subject"]["froc"]
    assert froc["thresholds"] == sorted(froc["thresholds"])
    assert max(froc["sensitivity"]) == 1
    for threshold, false_positives, sensitivity in zip(*froc.values(), strict=True):
        n_found = n_false = 0
        for one in subjects:
            lesions, n = ndimage.label(one.truth, np.ones((3, 3, 3)))
            n_found += sum((masked(one)[lesions == k] >= threshold).any() for k in range(1, n + 1))
            marks, n = ndimage.label(masked(one) >= threshold, np.ones((3, 3, 3)))
            n_false += sum(not one.truth[marks == k].any() for k in range(1, n + 1))
        assert (false_positives, sensitivity) == pytest.approx((n_false / len(subjects), n_found / 9))


def test_healthy_subjects_and_lesion_free_slices_of_patients_are_apart(subjects, found):
    threshold = thresholds(found)["healthy"]
    shares = [(masked(one) >= threshold).sum() / one.brainmask.sum() for one in subjects[6:]]
    counts = [ndimage.label(masked(one) >= threshold, np.ones((3, 3, 3)))[1] for one in subjects[6:]]
    block = found.summary["by_subject"]["healthy"]
    assert block["healthy"]["marked_share"] == pytest.approx(np.mean(shares))
    assert block["healthy"]["false_positives"] == pytest.approx(np.mean(counts))
    low, high = block["healthy"]["marked_share_interval"]
    assert (low, high) == pytest.approx(metrics.bootstrap_interval(shares, 200))
    assert min(shares) <= low < block["healthy"]["marked_share"] < high <= max(shares)

    shares, counts = [], []
    for one in subjects[:6]:
        free = ~one.truth.any(axis=(1, 2))
        marked = masked(one) >= threshold
        shares.append(marked[free].sum() / one.brainmask[free].sum())
        labels, n = ndimage.label(marked, np.ones((3, 3, 3)))
        counts.append(sum((labels[free] == k).any() and not one.truth[labels == k].any() for k in range(1, n + 1)))
    assert block["lesion_free_slices"]["marked_share"] == pytest.approx(np.mean(shares))
    assert block["lesion_free_slices"]["false_positives"] == pytest.approx(np.mean(counts))


def test_a_patient_whose_lesion_is_elsewhere_is_not_healthy(subjects):
    patient = subjects[-1]._replace(healthy=np.zeros(DEPTH, bool))
    evaluation = evaluate_parts([joined([*subjects[:-1], patient])], n_resamples=10)
    summary = evaluation.summary["by_subject"]
    assert (summary["n_healthy"], summary["n_with_lesion"], summary["n_subjects"]) == (3, 6, 10)
    assert (
        evaluation.per_subject["oracle_lesion_free_marked_share"][-1]
        == evaluation.per_subject["oracle_marked_share"][-1]
    )


def test_detection_ranks_slices_and_subjects_by_their_highest_scores(subjects, found):
    def highest(scores: np.ndarray) -> float:
        ordered = np.sort(scores[np.isfinite(scores)])[::-1]
        return ordered[: int(np.ceil(len(ordered) / 100))].mean(dtype=np.float64)

    slices = [(highest(s), t.any()) for one in subjects for s, t in zip(masked(one), one.truth, strict=True)]
    whole = [(highest(masked(one)), one.truth.any()) for one in subjects]
    for kind, pairs in (("slice", slices), ("subject", whole)):
        scores, labels = zip(*pairs, strict=True)
        block = found.summary["by_subject"]["detection"][kind]
        for name, reference in (("auroc", roc_auc_score), ("average_precision", average_precision_score)):
            assert block[name] == pytest.approx(reference(labels, scores), abs=1e-6)
            low, high = block[f"{name}_interval"]
            assert 0 <= low <= block[name] <= high <= 1


def test_resampled_auroc_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    scores = [rng.integers(0, 5, n) / 4 for n in (8, 3, 6, 5)]
    truth = [rng.random(len(one)) < 0.4 for one in scores]
    draws = rng.multinomial(4, np.full(4, 0.25), 20)
    for value, weights in zip(metrics.weighted_auroc(scores, truth, draws), draws, strict=True):
        weight = np.repeat(weights, [len(one) for one in scores])
        labels = np.concatenate(truth)
        if len(set(labels[weight > 0])) == 2:
            expected = roc_auc_score(labels, np.concatenate(scores), sample_weight=weight)
            assert value == pytest.approx(expected, abs=1e-12)
        else:
            assert np.isnan(value)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2])
def test_healthy_threshold_is_the_lowest_that_marks_few_healthy_pixels(share):
    rng = np.random.default_rng(0)
    for levels, n in itertools.product((3, 40, 10**6), (50, 999)):
        scores = (rng.integers(0, levels, n) / levels).astype(np.float32)
        scores[: n // 10] = -np.inf
        threshold = metrics.healthy_threshold(scores, share)
        assert np.mean(scores >= threshold) <= share
        lower = [value for value in np.unique(scores) if value < threshold]
        assert all(np.mean(scores >= value) > share for value in lower)


def test_healthy_threshold_of_the_validation_slices(subjects, found):
    one = joined([subject("V0", 20, 1), subject("V1", 21, 0)])
    healthy = one.brainmask & ~one.truth
    share = np.mean(masked(one)[healthy] >= thresholds(found)["healthy"])
    assert 0.009 < share <= 0.01
    assert found.summary["healthy"]["share"] == 0.01


def test_without_a_lesion_in_the_validation_slices_only_the_healthy_threshold_is_defined(subjects):
    summary = evaluate_parts([joined(subjects)], [subject("V0", 20, 0)], n_resamples=10).summary
    assert summary["validation"] is None
    assert summary["healthy"]["threshold"] > 0
    assert summary["by_subject"].keys() >= {"oracle", "healthy"}
    assert "validation" not in summary["by_subject"]
    json.dumps(summary, allow_nan=False)


def test_one_slice_of_each_patient_needs_no_scores_by_subject():
    truth = [np.ones((2, 2), bool), np.zeros((2, 2), bool)]
    assert not needs_subject_scores(["a_1", "b_1"], [truth[0]] * 2)
    assert needs_subject_scores(["a_1", "b_1"], truth)
    assert needs_subject_scores(["a_1", "a_2"], [truth[0]] * 2)


def test_parts_do_not_change_the_result(subjects):
    whole = evaluate_parts([joined(subjects)], voxel_size=VOXEL, n_resamples=20)
    parts = evaluate_parts([joined(subjects[:3]), *subjects[3:]], voxel_size=VOXEL, n_resamples=20)
    assert whole.summary == parts.summary
    for columns, others in ((whole.per_slice, parts.per_slice), (whole.per_subject, parts.per_subject)):
        for name, values in columns.items():
            np.testing.assert_array_equal(values, others[name])


# ------------------------------------------------------------------------------------------------------------
# More pixels than can be sorted


def test_ranking_many_pixels_stays_within_the_stated_bound(monkeypatch):
    rng = np.random.default_rng(1)
    truth = rng.random(300_000) < 0.3
    scores = (rng.normal(size=truth.size) + 1.5 * truth * rng.random(truth.size)).astype(np.float32)
    exact = metrics.average_precision(scores, truth), metrics.auroc(scores, truth)
    monkeypatch.setattr(metrics, "MAX_RANKED", 50_000)
    for n_thresholds in (64, 4096, 2**16):
        monkeypatch.setattr(metrics, "MAX_THRESHOLDS", n_thresholds)
        bound = auprc_error_bound(n_thresholds)
        assert abs(metrics.average_precision(scores, truth) - exact[0]) <= bound
        assert abs(metrics.auroc(scores, truth) - exact[1]) <= bound
        precision, recall = metrics.precision_recall(scores, truth)
        assert len(recall) <= n_thresholds + 1
        assert abs(-np.sum(np.diff(recall) * precision[:-1]) - exact[0]) <= bound
    assert auprc_error_bound(2**16) <= 1e-4


def test_adversarial_rankings_stay_within_the_stated_bound(monkeypatch):
    """Healthy pixels just above or just below the thresholds are the worst case for precision between two of them."""
    monkeypatch.setattr(metrics, "MAX_RANKED", 10)
    monkeypatch.setattr(metrics, "MAX_THRESHOLDS", 16)
    rng = np.random.default_rng(0)
    for _ in range(300):
        blocks = [np.repeat(kind, rng.integers(1, 40)) for kind in rng.permutation([True, False] * rng.integers(1, 12))]
        truth = np.concatenate(blocks)
        scores = np.arange(len(truth), 0, -1.0)
        exact = average_precision_score(truth, scores)
        assert abs(metrics.average_precision(scores, truth) - exact) <= auprc_error_bound(16)


def test_many_pixels_have_nearly_the_same_thresholds(subjects, found, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_RANKED", 500)
    val = [joined([subject("V0", 20, 1), subject("V1", 21, 0)])]
    other = evaluate_parts([joined(subjects)], val, voxel_size=VOXEL, n_resamples=200).summary
    assert other["auprc"] == pytest.approx(found.summary["auprc"], abs=1e-4)
    assert other["auprc_interval"] == pytest.approx(found.summary["auprc_interval"], abs=1e-3)
    # All lesion scores are thresholds here, among which the best mean Dice of a lesion pixel is.
    assert other["oracle"]["dice"] == pytest.approx(found.summary["oracle"]["dice"], abs=2e-3)
    assert other["healthy"] == found.summary["healthy"]


# ------------------------------------------------------------------------------------------------------------
# Intervals over subjects


def test_with_one_slice_of_each_subject_intervals_are_those_over_slices():
    rng = np.random.default_rng(3)
    values = rng.random(40)
    values[5] = np.nan
    names = [f"S{i}" for i in rng.permutation(40)]
    assert metrics.bootstrap_interval(values, subjects=names) == metrics.bootstrap_interval(values)
    defined = values[~np.isnan(values)]
    plain = np.random.default_rng(0).integers(0, 39, (1000, 39))
    assert metrics.bootstrap_interval(values) == pytest.approx(np.percentile(defined[plain].mean(axis=1), [2.5, 97.5]))
    scores = [rng.normal(size=30) for _ in names]
    truth = [rng.random(30) < 0.2 for _ in names]
    expected = metrics.auprc_bootstrap_interval(scores, truth)
    assert metrics.auprc_bootstrap_interval(scores, truth, subjects=names) == expected


def test_intervals_over_subjects_cover_the_mean_of_correlated_slices_and_those_over_slices_do_not():
    """Slices of a subject share most of their deviation from the mean."""
    rng = np.random.default_rng(0)
    n_subjects, n_slices, trials = 100, 5, 600
    names = np.repeat(np.arange(n_subjects), n_slices)
    covered = {"subjects": 0, "slices": 0}
    for seed in range(trials):
        shared = rng.normal(0, 0.2, n_subjects)[names]
        values = 0.5 + shared + rng.normal(0, 0.1, len(names))
        for kind, subjects in (("subjects", names), ("slices", None)):
            low, high = metrics.bootstrap_interval(values, 500, seed, subjects)
            covered[kind] += low <= 0.5 <= high
    assert 0.93 <= covered["subjects"] / trials <= 0.97
    assert covered["slices"] / trials < 0.75


def test_paired_comparison_resamples_subjects():
    rng = np.random.default_rng(4)
    names = np.repeat(np.arange(12), 20)
    a = rng.normal(0, 0.2, 12)[names] + rng.normal(0, 0.01, len(names))
    b = np.zeros(len(names))
    difference, of_subjects = metrics.paired_bootstrap(a, b, subjects=names)
    _, of_slices = metrics.paired_bootstrap(a, b)
    assert difference == pytest.approx(a.mean())
    assert of_subjects[1] - of_subjects[0] > 3 * (of_slices[1] - of_slices[0])

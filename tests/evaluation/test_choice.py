"""Choosing a score on validation slices: near-ties, single slices, and slices without lesions or variance."""

import numpy as np
import pytest
from test_scores import make_maps

from evaluation.choice import applicable, choose, grid_auprc, intensity_grid, most_robust, slices_to_choose_on
from evaluation.metrics import average_precision, ranked_scores, weighted_auprc
from evaluation.scores import ScoreSettings, anomaly_map, fit_constants, parse_grid
from tests.evaluation.conftest import auprc_error_bound

OPTIONS = {
    "sign": "bright,dark,both",
    "norm": "absolute,standardised",
    "calibration": "reconstruction,none",
    "match": "scan,none",
    "smoothing": "gaussian,none",
    "width": "0.03125",
    "outside": "zeros",
    "neighbours": "0,3",
    "rim": "0,4",
}
GRID = parse_grid(OPTIONS)


def choice(maps: dict, input: str = "flair"):
    return choose(maps, GRID, input)


def test_grid_auprc_agrees_with_each_scores_average_precision():
    maps = make_maps(n=6)
    grid = applicable(maps, GRID)
    assert {settings.neighbours for settings in grid} == {0.0}  # each scan has one slice
    found = dict(grid_auprc(maps, grid, np.ones((1, 6), dtype=int), np.arange(6)))
    assert list(found) == grid
    for settings in grid[::7]:
        scores = anomaly_map(maps, settings, fit_constants(maps, settings))
        exact = average_precision(*ranked_scores(scores, maps["truth"], maps["brainmask"], settings.rim))
        assert float(found[settings][0]) == pytest.approx(exact, abs=1 / 512)


def test_number_of_thresholds_bounds_the_error_of_auprc():
    rng = np.random.default_rng(0)
    truth = rng.random((8, 40, 40)) < 0.2
    scores = rng.normal(size=truth.shape) + truth
    draws = rng.multinomial(8, np.full(8, 1 / 8), 20)
    exact = weighted_auprc(scores, truth, draws)
    for max_thresholds in (16, 64, 256):
        approximate = weighted_auprc(scores, truth, draws, max_thresholds)
        assert (np.abs(approximate - exact) <= auprc_error_bound(max_thresholds)).all()


def test_sign_follows_the_lesions_despite_opposite_healthy_errors():
    maps = make_maps(n=8)
    spots = np.random.default_rng(3).random(maps["truth"].shape) < 0.1
    maps["image"] = maps["image"] - np.float32(4) * (spots & maps["brainmask"] & ~maps["truth"])
    assert choice(maps).settings.sign == "bright"
    dark = {**maps, "image": 2 * maps["reconstruction"] - maps["image"]}
    assert choice(dark).settings.sign == "dark"


def test_lesions_of_both_signs_keep_both():
    maps = make_maps(n=8)
    core = maps["truth"].copy()
    core[:, :, 13:] = False
    maps["image"] = maps["image"] - np.float32(6) * core
    found = choice(maps)
    assert found.settings.sign == "both"
    assert 0.3 < found.selection["lesion_error_above"] < 0.7


def test_the_most_robust_of_near_best_scores_is_chosen():
    """The lesion is so bright that every score finds it, so robustness decides."""
    maps = make_maps(n=8)
    maps["image"] = maps["image"] + np.float32(50) * maps["truth"]
    found = choice(maps)
    assert found.settings[:4] == ("bright", "absolute", "reconstruction", "scan")
    assert found.selection["auprc"] >= found.selection["best_auprc"] - 0.02
    assert found.selection["near_the_best"] >= 1
    assert found.selection["resampled"] == "subjects"


def test_order_of_preference():
    robust = ScoreSettings("bright")
    worse = [
        robust._replace(norm="squared"),
        robust._replace(match="none"),
        robust._replace(sign="both"),
        robust._replace(sign="dark"),
    ]
    for i, settings in enumerate(worse):
        assert most_robust([*reversed(worse[i:])], "bright") == settings
    assert most_robust(worse, "dark") == worse[-1]


@pytest.mark.parametrize(("input", "sign"), [("flair", "bright"), ("t2", "bright"), ("t1", "dark")])
def test_modality_determines_the_sign_without_lesions(input, sign):
    maps = make_maps()
    maps["truth"][:] = False
    found = choice(maps, input)
    assert found.settings == ScoreSettings(sign)
    assert found.selection is None
    assert found.constants.usual


def test_a_single_slice_determines_only_the_sign():
    found = choice(make_maps(n=1))
    assert found.settings == ScoreSettings("bright")


def test_slices_of_a_single_subject_are_resampled():
    found = choice(make_maps(n=6, per_scan=6))
    assert found.selection["resampled"] == "slices"
    assert {settings.neighbours for settings in applicable(make_maps(n=6, per_scan=6), GRID)} == {0.0, 3.0}


def test_standardised_scores_need_variance():
    maps = make_maps()
    maps["variance"][:] = 0
    assert {settings.norm for settings in applicable(maps, GRID)} == {"absolute"}
    alone = [ScoreSettings(norm="standardised")]
    assert applicable(maps, alone) == alone


def test_intensity_baseline_gets_the_same_choice():
    sign, grid = intensity_grid(GRID, "dark")
    assert sign == "dark"
    assert {settings[:4] for settings in grid} == {("dark", "absolute", "none", "none")}
    assert {settings.rim for settings in grid} == {0.0, 4.0}
    assert intensity_grid([ScoreSettings("bright")], "dark")[0] == "bright"
    assert len(intensity_grid([ScoreSettings(norm="standardised")], "dark")[1]) == 1


def test_many_slices_are_thinned_to_blocks_of_consecutive_ones(monkeypatch):
    monkeypatch.setattr("evaluation.choice.CHOICE_SLICES", 12)
    names = [[f"S{s}_{z}" for s in group for z in range(8)] for group in ((0, 1), (2, 3))]
    parts = [{"names": np.array(of_part), "image": np.arange(16.0) + 100 * i} for i, of_part in enumerate(names)]
    kept = slices_to_choose_on(parts)
    assert kept["names"].tolist() == [f"S{s}_{z + shift}" for s, shift in enumerate((0, 2, 3, 5)) for z in range(3)]
    assert kept["image"].tolist() == [
        *(z + shift + 8 * (s % 2) + 100 * (s // 2) for s, shift in enumerate((0, 2, 3, 5)) for z in range(3))
    ]
    one_each = [{"names": np.array([f"S{s}_80" for s in range(20)]), "image": np.zeros(20)}]
    assert len(slices_to_choose_on(one_each)["names"]) == 20  # of one slice each, none is left out

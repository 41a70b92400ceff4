"""Anomaly scores from error maps: each step against its closed form, and the expected invariances."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from evaluation.scores import (
    BINS,
    OPTIONS,
    Constants,
    ScoreSettings,
    anomaly_map,
    fit_constants,
    fit_match,
    intensity_maps,
    match_scans,
    parse_grid,
    pixel_scores,
    scan_slopes,
    split_names,
    unusual_contrasts,
)
from models.cycle import Cycle, error_floor

PLAIN = ScoreSettings("both", "absolute", "none", "none", "none", 0.0)
N, SIZE = 4, 32


def make_maps(seed: int = 0, n: int = N, per_scan: int = 1) -> dict:
    """Return slices with a smooth reconstruction, the same with noise as image, and a bright lesion."""
    rng = np.random.default_rng(seed)
    reconstruction = ndimage.gaussian_filter(rng.normal(size=(n, SIZE, SIZE)), (0, 2, 2)) * 8
    brainmask = np.zeros((n, SIZE, SIZE), bool)
    brainmask[:, 4:28, 5:29] = True
    truth = np.zeros_like(brainmask)
    truth[:, 10:15, 10:16] = True
    image = reconstruction + 0.3 * rng.normal(size=reconstruction.shape) + 3 * truth
    return {
        "names": np.array([f"S_{i // per_scan:02d}_{70 + i % per_scan}" for i in range(n)]),
        "image": np.where(brainmask, image, -3).astype(np.float32),
        "reconstruction": np.where(brainmask, reconstruction, -3).astype(np.float32),
        "variance": (0.1 * rng.random(reconstruction.shape)).astype(np.float32),
        "brainmask": brainmask,
        "truth": truth,
    }


def score(maps: dict, one: ScoreSettings, fitted_on: dict | None = None) -> np.ndarray:
    return anomaly_map(maps, one, fit_constants(fitted_on or maps, one))


# ----------------------------------------------------------------------------------------------------------
# The grid


def test_grid_contains_every_distinct_combination():
    options = {**ScoreSettings()._asdict(), "rim": "0, 4", "smoothing": "gaussian,none", "width": "0.03,0.05"}
    options |= {"outside": "zeros,left_out", "neighbours": "0"}
    grid = parse_grid({key: str(value) for key, value in options.items()})
    smoothed = {("gaussian", width, outside) for width in (0.03, 0.05) for outside in ("zeros", "left_out")}
    expected = set(product(smoothed | {("none", 0.0, "zeros")}, (0.0, 4.0)))
    assert {(one[4:7], one.rim) for one in grid} == expected
    assert len(grid) == len(expected)
    assert {one[:4] for one in grid} == {ScoreSettings()[:4]}


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("sign", "brigth", "sign='brigth' is unknown"),
        ("rim", "-1", "rim='-1' is not a number from 0 to 32"),
        ("width", "nan", "width='nan' is not a number"),
        ("width", "", "width='' is not a number"),
        ("neighbours", "1e999", "neighbours='1e999' is not a number"),
    ],
)
def test_errors_name_the_invalid_option(key, text, said):
    options = {name: str(value) for name, value in ScoreSettings()._asdict().items()}
    with pytest.raises(ValueError, match=said):
        parse_grid(options | {key: text})


# ----------------------------------------------------------------------------------------------------------
# Pixel scores


def test_pixel_scores_of_each_sign_and_norm():
    maps, constants = make_maps(), Constants(0.5)
    error = np.where(maps["brainmask"], maps["image"] - maps["reconstruction"], 0)
    expected = {
        ("both", "absolute"): np.abs(error),
        ("bright", "absolute"): np.maximum(error, 0),
        ("dark", "squared"): np.minimum(error, 0) ** 2,
        ("both", "standardised"): error**2 / (maps["variance"] + 0.5),
    }
    for (sign, norm), values in expected.items():
        found = pixel_scores(maps, PLAIN._replace(sign=sign, norm=norm), constants)
        np.testing.assert_allclose(found, values, rtol=1e-5, atol=1e-6)


def test_error_floor_agrees_with_models_cycle():
    maps = make_maps()
    image, reconstruction, variance, brain, truth = (
        torch.from_numpy(maps[key])[:, None] for key in ("image", "reconstruction", "variance", "brainmask", "truth")
    )
    cycle = Cycle(variance, variance, reconstruction, variance)
    expected = error_floor(image, cycle, brain & ~truth)
    assert fit_constants(maps, PLAIN).error_floor == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("norm", OPTIONS["norm"])
def test_calibrated_scores_are_1_in_healthy_tissue_of_any_intensity(norm):
    """Healthy errors are twice as large where the reconstruction is bright; calibration removes the difference."""
    maps = make_maps(n=40)
    noise = np.random.default_rng(1).normal(size=maps["image"].shape) * np.where(maps["reconstruction"] > 0, 2, 1)
    maps["image"] = (maps["reconstruction"] + noise + 9 * maps["truth"]).astype(np.float32)
    healthy = maps["brainmask"] & ~maps["truth"]
    for calibration in OPTIONS["calibration"]:
        one = PLAIN._replace(norm=norm, calibration=calibration)
        constants = fit_constants(maps, one)
        found = pixel_scores(maps, one, constants)
        sides = [found[healthy & side].mean() for side in (maps["reconstruction"] > 1.5, maps["reconstruction"] < -1.5)]
        if calibration == "none":
            assert sides[0] > 1.5 * sides[1]
        else:
            assert len(constants.usual) == BINS
            assert sides == pytest.approx([1, 1], rel=0.15)


def test_fitted_constants_ignore_lesions():
    maps = make_maps()
    brighter = {**maps, "image": (maps["image"] + 100 * maps["truth"]).astype(np.float32)}
    one = PLAIN._replace(calibration="reconstruction")
    found, expected = fit_constants(brighter, one), fit_constants(maps, one)
    assert found.usual == expected.usual
    assert found.error_floor == expected.error_floor


def test_nonfinite_pixels_score_lowest_and_do_not_affect_other_slices():
    maps = make_maps()
    broken = {**maps, "reconstruction": maps["reconstruction"].copy()}
    broken["reconstruction"][0, 20, 20:22] = np.nan, np.inf
    for one in (PLAIN, ScoreSettings()):
        constants = fit_constants(maps, one)
        found, intact = anomaly_map(broken, one, constants), anomaly_map(maps, one, constants)
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found[1:], intact[1:], rtol=1e-6)
    assert not pixel_scores(broken, PLAIN, Constants(1.0))[0, 20, 20:22].any()
    assert np.isfinite(fit_constants(broken, ScoreSettings()).usual).all()


# ----------------------------------------------------------------------------------------------------------
# Intensity matching


@pytest.mark.parametrize("match", ["affine", "scan"])
@pytest.mark.parametrize(("scale", "shift"), [(0.4, -2), (2.5, 1), (1, 3)])
def test_matched_scores_do_not_depend_on_normalisation(match, scale, shift):
    maps = make_maps()
    moved = {**maps, "image": maps["image"].copy()}
    moved["image"][1] = scale * maps["image"][1] + shift
    one = ScoreSettings(match=match)
    # "scan" keeps the ordinary slope of the original scan, but corrects all of the moved scan's unusual one.
    tolerance = 0.15 if match == "scan" and scale != 1 else 1e-3
    np.testing.assert_allclose(score(moved, one, maps), score(maps, one), rtol=0, atol=tolerance)
    without = one._replace(match="none")
    assert np.abs(score(moved, without, maps) - score(maps, without))[1].max() > 0.3


def test_ordinary_slopes_are_corrected_only_if_many_slices_agree():
    single, several = make_maps(n=12), make_maps(n=12, per_scan=12)
    for maps, corrected in ((single, False), (several, True)):
        usual = fit_match(maps, "scan")
        moved = {**maps, "image": (1.2 * maps["image"]).astype(np.float32)}
        differences = [
            match_scans(moved, match, usual)[0] - match_scans(maps, match, usual)[0] for match in ("scan", "affine")
        ]
        inside = maps["brainmask"] & ~maps["truth"]
        assert np.abs(differences[1][inside]).max() < 1e-3
        assert (np.abs(differences[0][inside]).max() < 1e-3) == corrected


def test_a_large_lesion_does_not_bias_matching():
    maps = make_maps(n=1)
    maps["truth"][:, 8:18, 8:20] = True  # a fifth of the brain
    healthy = {**maps, "image": np.where(maps["truth"], maps["reconstruction"], maps["image"])}
    lesioned = {**maps, "image": maps["image"] + np.float32(4) * maps["truth"]}
    found, expected = (match_scans(one, "affine", Constants(1.0))[1] for one in (lesioned, healthy))
    assert scan_slopes(lesioned) == pytest.approx(scan_slopes(healthy), rel=0.1)
    assert found == pytest.approx(expected, abs=0.15)


def test_all_slices_of_a_scan_are_matched_together():
    maps = make_maps(n=4, per_scan=2)
    moved = {**maps, "image": maps["image"].copy()}
    moved["image"][:2] = 2 * maps["image"][:2] + 1
    found = scan_slopes(moved)
    assert found[0] == found[1] == pytest.approx(2 * scan_slopes(maps)[0])
    assert unusual_contrasts(moved, fit_match(maps, "scan")).keys() == {"S_00"}
    assert unusual_contrasts(maps, fit_match(maps, "scan")) == {}


def test_scans_without_contrast_are_not_matched():
    maps = make_maps()
    flat = {**maps, "reconstruction": np.full_like(maps["reconstruction"], 0.5)}
    np.testing.assert_array_equal(scan_slopes(flat), 1)
    empty = {**maps, "brainmask": np.zeros_like(maps["brainmask"])}
    np.testing.assert_array_equal(match_scans(empty, "affine", Constants(1.0))[0], maps["image"])


# ----------------------------------------------------------------------------------------------------------
# Smoothing


@pytest.mark.parametrize("outside", OPTIONS["outside"])
def test_gaussian_smoothing_outside_the_brain(outside):
    maps = make_maps()
    width = 2 / SIZE
    one = PLAIN._replace(smoothing="gaussian", width=width, outside=outside)
    raw = np.where(maps["brainmask"], np.abs(maps["image"] - maps["reconstruction"]), 0)
    expected = ndimage.gaussian_filter(raw, (0, 2, 2), mode="constant", truncate=3)
    if outside == "left_out":
        weights = ndimage.gaussian_filter(maps["brainmask"].astype(float), (0, 2, 2), mode="constant", truncate=3)
        expected = expected / np.maximum(weights, 1e-6)
    np.testing.assert_allclose(score(maps, one), np.where(maps["brainmask"], expected, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("outside", OPTIONS["outside"])
def test_median_smoothing_outside_the_brain(outside):
    maps = make_maps(n=1)
    one = PLAIN._replace(smoothing="median", width=2 / SIZE, outside=outside)
    raw, brain = np.abs(maps["image"] - maps["reconstruction"])[0], maps["brainmask"][0]
    found = score(maps, one)[0]
    for i, j in ((4, 5), (4, 16), (12, 12), (27, 28)):
        window = (slice(i - 2, i + 3), slice(j - 2, j + 3))
        values = raw[window][brain[window]]
        if outside == "zeros":
            values = np.append(values, np.zeros(25 - values.size))
        assert found[i, j] == pytest.approx(np.median(values), rel=1e-5)


def test_neighbouring_slices_of_a_scan_are_weighted_by_distance():
    maps = make_maps(n=5, per_scan=3)
    maps["names"] = np.array(["A_70", "A_71", "A_74", "B_70", "B_71"])
    raw, found = score(maps, PLAIN), score(maps, PLAIN._replace(neighbours=2.0))
    weights = np.exp(-0.5 * (np.array([1, 0, 3]) / 2) ** 2)
    expected = np.tensordot(weights / weights.sum(), raw[:3], axes=1)
    np.testing.assert_allclose(found[1], expected, rtol=1e-4, atol=1e-6)
    alone = {key: values[:1] for key, values in maps.items()}
    np.testing.assert_allclose(score(alone, PLAIN._replace(neighbours=2.0)), raw[:1], rtol=1e-5)


def test_names_are_split_into_scan_and_slice_number():
    scans, numbers = split_names(["a_b_3", "a_b_12", "a_c_3", "x_y"])
    assert scans.tolist() == [0, 0, 1, 2]
    assert numbers.tolist() == [3, 12, 3, 0]


SETTINGS = st.builds(
    ScoreSettings,
    **{key: st.sampled_from(values) for key, values in OPTIONS.items()},
    width=st.sampled_from([0.0, 0.01, 0.05]),
    neighbours=st.sampled_from([0.0, 2.0]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(one=SETTINGS, per_scan=st.sampled_from([1, 2]))
def test_scores_are_non_negative_and_zero_outside_the_brain(one, per_scan):
    maps = make_maps(per_scan=per_scan)
    found = score(maps, one)
    assert found.dtype == np.float32
    assert (found >= 0).all()
    assert not found[~maps["brainmask"]].any()
    assert found.any()


@pytest.mark.parametrize("sign", ["bright", "dark"])
def test_intensity_baseline_is_the_error_of_a_flat_reconstruction(sign):
    maps = make_maps()
    one = PLAIN._replace(sign=sign)
    found = anomaly_map(intensity_maps(maps, sign), one, Constants(1.0))
    expected = np.maximum(maps["image"] + 3 if sign == "bright" else 3 - maps["image"], 0)
    np.testing.assert_allclose(found, np.where(maps["brainmask"], expected, 0), rtol=1e-6)

"""From error maps to an anomaly score: pure functions of image, reconstruction, variance and brain mask.

`anomaly_map` takes the steps in this order, each switched by one field of `ScoreSettings`: match the scan's intensities
to its reconstruction, take the signed error, its norm, divide by the error that is usual at this intensity, and smooth.
All constants are fitted on healthy pixels (`fit_constants`). `maps` is one split of error_maps.npz, of which the
functions read `image`, `reconstruction`, `variance` and `brainmask`, [N, H, W] each, and N `names`.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, median_filter

FloatArray = NDArray[np.floating]

OPTIONS = {
    "sign": ("bright", "dark", "both"),
    "norm": ("absolute", "squared", "standardised"),
    "calibration": ("reconstruction", "none"),
    "match": ("scan", "affine", "none"),
    "smoothing": ("gaussian", "median", "none"),
    "outside": ("zeros", "left_out"),
}
# Least and greatest value of the options that are numbers.
RANGES = {"width": (0.0, 0.25), "neighbours": (0.0, 100.0), "rim": (0.0, 32.0)}
BRIGHT_LESIONS = ("flair", "t2")  # on other modalities they are taken to be dark

KEPT, ROUNDS = 0.7, 10  # share of the pixels that a match keeps, and how often it is fitted again
QUANTILES = (0.1, 0.7)  # of a scan's intensities, between which lesions are rare: where a match begins
# How far the logarithm of a scan's slope may be from the usual one before its scale is corrected: for one slice, by
# 1/√n for n slices, but not below the second number. A slice's slope tells more of its anatomy than of its scale.
UNUSUAL = 0.3, 0.1
SLOPES = (0.6, 1.6)  # of a match, relative to the usual one; outside, the scan's normalisation is far off
BINS, BIN_PIXELS = 24, 50  # of the calibration, and the pixels that each needs at least
BLUR = 0.5 / 64  # of the reconstruction, in shares of the slice, before its intensity is looked up
FAR_OFF = (
    "warning: {} has {:.2f} times the usual contrast: its normalisation is far off, look at its intensities and at a "
    "large lesion's effect on their quantiles"
)


class ScoreSettings(NamedTuple):
    """How error maps become a score. The defaults are near the best on all data tried (docs/scores.md)."""

    # Errors that count: A above its reconstruction, below it, or both. Baur et al. 2021 keep those above on FLAIR.
    sign: str = "bright"
    norm: str = "absolute"  # |e|, e², or e² / (v + c), by the variance of the draws
    calibration: str = "reconstruction"  # divide by the mean score of healthy pixels of the same reconstruction
    match: str = "scan"  # take out each scan's offset, and its scale where that is unusual; or always, "affine"
    smoothing: str = "gaussian"  # within the slice: a Gaussian, a median filter, or none
    width: float = 2 / 64  # the Gaussian's σ or the median's half-width, in shares of the slice's shorter side
    outside: str = "zeros"  # smooth zeros outside the brain, which damps its rim, or leave the outside out
    neighbours: float = 0.0  # σ of a Gaussian over neighbouring slices of the same scan, in slices; 0: none
    rim: float = 0.0  # px at 128 that the brain mask is eroded by; the paper's script: 4


class Constants(NamedTuple):
    """Constants of a score, fitted on healthy pixels."""

    error_floor: float  # c of the standardised norm: the squared error that the draws' variance does not explain
    slope: float = 1.0  # of image against reconstruction that is usual for a scan
    offset: float = 0.0  # the median difference of the two that is usual
    intensities: tuple[float, ...] = ()  # of the reconstruction, ascending
    usual: tuple[float, ...] = ()  # the mean score of healthy pixels at each


class Matched(NamedTuple):
    """Images [N, H, W] after the match, and the slope and the offset that each slice's scan had, [N]."""

    image: FloatArray
    slopes: FloatArray
    offsets: FloatArray


def parse_grid(options: Mapping[str, str]) -> list[ScoreSettings]:
    """Return every combination of the comma-separated alternatives of `config.score_model.scoring`.

    Combinations that equal another one are left out: without smoothing, its width makes no difference.

    Raises:
        ValueError: if an alternative is not known, or a number is out of range.
    """
    alternatives = {}
    for name in ScoreSettings._fields:
        alternatives[name] = [_parse(name, text.strip()) for text in options[name].split(",")]
    grid = (ScoreSettings(*values) for values in product(*alternatives.values()))
    return list(dict.fromkeys(one._replace(width=0.0, outside="zeros") if unsmoothed(one) else one for one in grid))


def unsmoothed(settings: ScoreSettings) -> bool:
    """Whether no filter within the slice is applied."""
    return settings.smoothing == "none" or settings.width == 0


def _parse(name: str, text: str) -> str | float:
    if name in OPTIONS:
        if text not in OPTIONS[name]:
            raise ValueError(f"{name}={text!r} is not known: choose of {', '.join(OPTIONS[name])}")
        return text
    least, most = RANGES[name]
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not least <= value <= most:
        raise ValueError(f"{name}={text!r} is no number in {least:g} … {most:g}")
    return value


def smooth_scores(scores: FloatArray, how: str) -> FloatArray:
    """Apply `sampling.smooth` to scores [N, H, W]: "median3" or "median5" filters each slice, "none" does nothing."""
    return scores if how == "none" else median_filter(scores, size=(1, *2 * (int(how.removeprefix("median")),)))


def scans_of(names: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Return each slice's scan, numbered from 0, and the slice's own number; names are "{subject}_{slice}"."""
    subjects, numbers = zip(*(name.rpartition("_")[::2] for name in map(str, names)), strict=True)
    are_numbers = [int(number) if number.isdecimal() and len(number) < 10 else 0 for number in numbers]
    return np.unique(subjects, return_inverse=True)[1], np.array(are_numbers)


def match_scans(maps: Mapping[str, Any], match: str, constants: Constants) -> Matched:
    """Give each scan the usual offset and scale; all slices of a scan are matched together.

    Quantiles normalise a scan, and a large lesion moves them: then all healthy tissue is too dark for the networks. The
    reconstruction has the intensities of training. `match` is as in `ScoreSettings`: "scan" corrects a scale only where
    it is unusual, "affine" always, which makes the score invariant to it.
    """
    image = np.array(maps["image"], dtype=np.float32)
    slopes, offsets = scan_slopes(maps) / constants.slope, np.zeros(len(image))
    scans, _ = scans_of(maps["names"])
    bounds = np.maximum(UNUSUAL[0] / np.sqrt(np.bincount(scans)[scans]), UNUSUAL[1])
    rescaled = (np.abs(np.log(slopes)) > bounds) | (match == "affine")
    image[rescaled] /= slopes[rescaled, None, None].astype(np.float32)
    error = image - maps["reconstruction"]
    for scan in np.unique(scans):
        rows = np.flatnonzero(scans == scan)
        inside = maps["brainmask"][rows] & np.isfinite(error[rows])
        if inside.any():
            offsets[rows] = np.median(error[rows][inside])
    return Matched(image + (constants.offset - offsets)[:, None, None].astype(np.float32), slopes, offsets)


def scan_slopes(maps: Mapping[str, Any]) -> FloatArray:
    """Return the slope of image against reconstruction of each slice's scan, [N]."""
    slopes = np.ones(len(maps["image"]))
    scans, _ = scans_of(maps["names"])
    for scan in np.unique(scans):
        rows = np.flatnonzero(scans == scan)
        image, reconstruction = maps["image"][rows], maps["reconstruction"][rows]
        inside = maps["brainmask"][rows] & np.isfinite(image) & np.isfinite(reconstruction)
        if np.count_nonzero(inside) >= BIN_PIXELS:
            slopes[rows] = _slope(image[inside].astype(np.float64), reconstruction[inside].astype(np.float64))
    return slopes


def far_off(maps: Mapping[str, Any], constants: Constants) -> dict[str, float]:
    """Return the relative slope of each scan whose normalisation failed, by its name."""
    names = [str(name).rpartition("_")[0] for name in maps["names"]]
    slopes = dict(zip(names, (scan_slopes(maps) / constants.slope).tolist(), strict=True))
    return {name: slope for name, slope in slopes.items() if not SLOPES[0] <= slope <= SLOPES[1]}


def fit_match(maps: Mapping[str, Any], match: str) -> Constants:
    """Fit the usual slope and offset on some scans; no truth is needed."""
    _, first = np.unique(scans_of(maps["names"])[0], return_index=True)
    constants = Constants(1.0, float(np.median(scan_slopes(maps)[first])))
    if match == "none":
        return constants
    offset = float(np.median(match_scans(maps, match, constants).offsets[first]))
    # Networks are trained to have none: as if one more scan had shown that.
    return constants._replace(offset=offset * len(first) / (len(first) + 1))


def _slope(image: FloatArray, reconstruction: FloatArray) -> float:
    """Return the slope of image against reconstruction [M], from the pixels that fit best.

    Both have errors: noise and lesions in the image, lost detail in the reconstruction. So the slope is the ratio of
    standard deviations (reduced major axis), which scales as the image does; least squares would be flattened by the
    errors of one or steepened by those of the other. Pixels that fit badly, as lesions do, are trimmed, and the rest is
    fitted again.
    """
    (low, high), (low_of_it, high_of_it) = (np.quantile(one, QUANTILES) for one in (image, reconstruction))
    slope, kept = (high - low) / max(high_of_it - low_of_it, 1e-6), np.ones(len(image), dtype=bool)
    for _ in range(ROUNDS):
        residuals = image - slope * reconstruction
        residuals = np.abs(residuals - np.median(residuals[kept]))
        kept = residuals <= np.quantile(residuals, KEPT)
        slope = image[kept].std() / max(reconstruction[kept].std(), 1e-6)
    return float(slope) if 0.1 <= slope <= 10 else 1.0  # without any contrast, there is nothing to match


def fit_constants(maps: Mapping[str, Any], settings: ScoreSettings, usual: Constants | None = None) -> Constants:
    """Fit the constants of a score on healthy pixels, those of the brain outside `maps["truth"]`.

    `usual` is that of `fit_match`, where it is known already.
    """
    usual = usual or fit_match(maps, settings.match)
    error = error_of(maps, settings, usual)
    healthy = maps["brainmask"] & ~maps["truth"] & np.isfinite(error) & np.isfinite(maps["variance"])
    floor = 1.0
    if healthy.any():
        total = np.mean(error[healthy].astype(np.float64) ** 2)
        floor = max(float(total - maps["variance"][healthy].mean(dtype=np.float64)), float(total) / 100, 1e-6)
    if settings.calibration == "none" or np.count_nonzero(healthy) < BIN_PIXELS:
        return usual._replace(error_floor=floor)
    scores = _normed(error.astype(np.float64), maps["variance"], settings.norm, floor)[healthy]
    intensities = _blurred(maps["reconstruction"])[healthy]
    order = np.argsort(intensities)
    bins = np.array_split(order, min(BINS, len(order) // BIN_PIXELS))
    means = np.array([scores[one].mean(dtype=np.float64) for one in bins])
    means = np.maximum(means, max(means.mean() / 100, 1e-6))
    centres = [float(intensities[one].mean(dtype=np.float64)) for one in bins]
    return usual._replace(error_floor=floor, intensities=tuple(centres), usual=tuple(means.tolist()))


def anomaly_map(maps: Mapping[str, Any], settings: ScoreSettings, constants: Constants) -> FloatArray:
    """Return the score of every pixel, float32 [N, H, W], at least 0, and 0 outside the brain. No rim is cut here."""
    return smooth(pixel_scores(maps, settings, constants), maps, settings)


def pixel_scores(maps: Mapping[str, Any], settings: ScoreSettings, constants: Constants) -> FloatArray:
    """Return the score of every pixel before smoothing; an undefined score is 0, the lowest."""
    error = error_of(maps, settings, constants)
    if settings.sign != "both":
        error = np.maximum(error if settings.sign == "bright" else -error, 0)
    scores = _normed(error, maps["variance"], settings.norm, constants.error_floor)
    if settings.calibration == "reconstruction" and constants.usual:
        scores = scores / np.interp(_blurred(maps["reconstruction"]), constants.intensities, constants.usual)
    return np.where(maps["brainmask"] & np.isfinite(scores), scores, 0).astype(np.float32)


def error_of(maps: Mapping[str, Any], settings: ScoreSettings, constants: Constants) -> FloatArray:
    """Return the signed error [N, H, W] of the image, matched if the settings ask for it."""
    matched = settings.match != "none"
    image = match_scans(maps, settings.match, constants).image if matched else maps["image"]
    return image - maps["reconstruction"]


def _normed(error: FloatArray, variance: FloatArray, norm: str, error_floor: float) -> FloatArray:
    if norm == "absolute":
        return np.abs(error)
    return error**2 if norm == "squared" else error**2 / (np.maximum(variance, 0) + error_floor)


def _blurred(images: FloatArray) -> FloatArray:
    return gaussian_filter(images, (0, *2 * (BLUR * min(images.shape[1:]),)), mode="nearest")


def smooth(scores: FloatArray, maps: Mapping[str, Any], settings: ScoreSettings) -> FloatArray:
    """Smooth scores [N, H, W] that are 0 outside the brain, within slices and over neighbouring ones."""
    brain, width = maps["brainmask"], settings.width * min(scores.shape[1:])
    leaves_out = settings.outside == "left_out"
    if settings.smoothing == "median" and width:
        beyond = np.nan if leaves_out else 0.0
        scores = np.stack([_median(*one, max(1, round(width)), beyond) for one in zip(scores, brain, strict=True)])
    blurs = settings.smoothing == "gaussian" and width > 0

    def filtered(values: FloatArray) -> FloatArray:
        if blurs:
            values = gaussian_filter(values, (0, width, width), mode="constant", truncate=3)
        return _over_slices(values, maps["names"], settings.neighbours) if settings.neighbours else values

    smoothed = filtered(scores)
    if leaves_out and (blurs or settings.neighbours):
        smoothed = smoothed / np.maximum(filtered(brain.astype(np.float32)), 1e-6)
    return np.where(brain, smoothed, 0).astype(np.float32)


def _median(scores: FloatArray, brain: NDArray[np.bool_], radius: int, beyond: float) -> FloatArray:
    """Median filter a slice [H, W] inside its brain; pixels outside count as `beyond`, or not at all if NaN."""
    padded = np.pad(np.where(brain, scores, np.float32(beyond)), radius, constant_values=beyond)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * (2 * radius + 1,))[brain]
    ordered = np.sort(windows.reshape(len(windows), -1), axis=1)  # NaN comes last
    n = np.count_nonzero(~np.isnan(ordered), axis=1)
    rows, found = np.arange(len(ordered)), np.zeros_like(scores)
    found[brain] = (ordered[rows, (n - 1) // 2] + ordered[rows, n // 2]) / 2
    return found


def _over_slices(values: FloatArray, names: Sequence[str], sigma: float) -> FloatArray:
    """Average slices of the same scan with Gaussian weights of the distance of their numbers."""
    scans, numbers = scans_of(names)
    found = np.empty_like(values)
    for scan in np.unique(scans):
        rows = np.flatnonzero(scans == scan)
        weights = np.exp(-0.5 * (np.subtract.outer(numbers[rows], numbers[rows]) / sigma) ** 2)
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(values.dtype)
        found[rows] = np.tensordot(weights, values[rows], axes=1)
    return found


def compared(maps: Mapping[str, Any]) -> dict[str, Any]:
    """Return maps in float32 whose image is the reconstructed modality, which in one-way runs is not the input."""
    floats = {
        "image": maps.get("reference", maps["image"]),
        **{key: maps[key] for key in ("reconstruction", "variance")},
    }
    return {**maps, **{key: values.astype(np.float32) for key, values in floats.items()}}


def intensity_maps(maps: Mapping[str, Any], sign: str) -> dict[str, Any]:
    """Return maps whose error is the bare intensity: the reconstruction is −3 or, for dark lesions, 3."""
    image = maps["image"].astype(np.float32)
    background = np.full_like(image, -3.0 if sign == "bright" else 3.0)
    return {**maps, "image": image, "reconstruction": background, "variance": np.zeros_like(background)}

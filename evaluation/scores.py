"""From error maps to an anomaly score: pure functions of image, reconstruction, variance and brain mask.

`anomaly_map` applies these steps in order, each configured by `ScoreSettings`: match the scan's intensities to its
reconstruction, compute the signed error, keep one sign, apply a norm, divide by the mean score of healthy pixels at the
same intensity, and smooth. All constants are fitted on healthy pixels (`fit_constants`).

`maps` is one split of error_maps.npz: `image`, `reconstruction`, `variance`, `brainmask` [N, H, W], and N `names`.
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
# Minimum and maximum of the numeric options.
RANGES = {"width": (0.0, 0.25), "neighbours": (0.0, 100.0), "rim": (0.0, 32.0)}
BRIGHT_LESIONS = ("flair", "t2")  # modalities with bright lesions; on the others lesions are assumed to be dark

# Trimmed fit of a scan's slope: fraction of pixels kept, number of refits, and the quantiles that give the initial
# slope (lesions are rare between them).
KEPT, ROUNDS, QUANTILES = 0.7, 10, (0.1, 0.7)
# "scan" corrects a scan's scale if |log(slope / usual slope)| exceeds the first number / √n for n slices, and at least
# the second: the slope of a few slices varies more with anatomy than with scale.
SLOPE_TOLERANCE = 0.3, 0.1
CONTRAST_RANGE = (0.6, 1.6)  # of a scan's slope relative to the usual one; outside, its normalisation has failed
BINS, BIN_PIXELS = 24, 50  # calibration bins, and minimum pixels in each
BLUR = 0.5 / 64  # σ that the reconstruction is smoothed with before calibration, as a fraction of the slice
CONTRAST_WARNING = (
    "warning: {} has {:.2f} times the usual contrast, so its normalisation has probably failed: check its intensities "
    "(a large lesion shifts their quantiles)"
)


class ScoreSettings(NamedTuple):
    """Settings of a score. The defaults are close to the best on all data tried (docs/scores.md)."""

    # Errors to keep: image above its reconstruction, below it, or both. Baur et al. 2021 keep those above on FLAIR.
    sign: str = "bright"
    norm: str = "absolute"  # |e|, e², or e² / (v + c) with the variance v of MMCCD's draws
    calibration: str = "reconstruction"  # divide by the mean score of healthy pixels with the same reconstruction
    match: str = "scan"  # remove each scan's offset, and its scale only if unusual ("scan") or always ("affine")
    smoothing: str = "gaussian"  # filter within the slice: Gaussian, median or none
    width: float = 2 / 64  # σ of the Gaussian or half-width of the median, as a fraction of the slice's shorter side
    outside: str = "zeros"  # smooth with zeros outside the brain, which lowers scores at its rim, or ignore the outside
    neighbours: float = 0.0  # σ of a Gaussian over neighbouring slices of the same scan, in slices; 0: off
    rim: float = 0.0  # px, at an image size of 128, that the brain mask is eroded by; the paper's script: 4


class Constants(NamedTuple):
    """Constants of a score, fitted on healthy pixels."""

    error_floor: float  # c of the standardised norm: mean squared error minus the draws' variance
    slope: float = 1.0  # median over scans of the slope of image against reconstruction
    offset: float = 0.0  # median over scans of the offset, shrunk towards 0
    intensities: tuple[float, ...] = ()  # bin centres of the calibration: reconstruction intensities, ascending
    usual: tuple[float, ...] = ()  # mean score of healthy pixels in each bin


def parse_grid(options: Mapping[str, str]) -> list[ScoreSettings]:
    """Return every distinct combination of the comma-separated alternatives in `config.score_model.scoring`.

    Without smoothing, `width` and `outside` have no effect, so such combinations appear once.

    Raises:
        ValueError: if an alternative is unknown or a number is out of range.
    """
    alternatives = {}
    for name in ScoreSettings._fields:
        alternatives[name] = [_parse(name, text.strip()) for text in options[name].split(",")]
    grid = [ScoreSettings(*values) for values in product(*alternatives.values())]
    for i, settings in enumerate(grid):
        if settings.smoothing == "none" or settings.width == 0:
            grid[i] = settings._replace(width=0.0, outside="zeros")
    return list(dict.fromkeys(grid))


def _parse(name: str, text: str) -> str | float:
    if name in OPTIONS:
        if text not in OPTIONS[name]:
            raise ValueError(f"{name}={text!r} is unknown: choose one of {', '.join(OPTIONS[name])}")
        return text
    low, high = RANGES[name]
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not low <= value <= high:
        raise ValueError(f"{name}={text!r} is not a number from {low:g} to {high:g}")
    return value


def smooth_scores(scores: FloatArray, how: str) -> FloatArray:
    """Smooth scores [N, H, W] slice by slice; `how` is the config's `sampling.smooth`: "none", "median3", "median5"."""
    return scores if how == "none" else median_filter(scores, size=(1, *2 * (int(how.removeprefix("median")),)))


def split_names(names: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Split names "{subject}_{slice}" into scan indices, from 0, and slice numbers, [N] each."""
    subjects, numbers = zip(*(name.rpartition("_")[::2] for name in map(str, names)), strict=True)
    parsed = [int(number) if number.isdecimal() and len(number) < 10 else 0 for number in numbers]
    return np.unique(subjects, return_inverse=True)[1], np.array(parsed)


def match_scans(maps: Mapping[str, Any], match: str, constants: Constants) -> tuple[FloatArray, FloatArray]:
    """Correct each scan's offset and scale to the usual ones, jointly for all slices of a scan.

    A large lesion shifts the quantiles that a scan is normalised by, which makes healthy tissue darker than in the
    training data; the reconstruction keeps the intensities of training.

    Args:
        match: "scan" corrects only unusual scales; "affine" corrects all, which makes the score invariant to scale.

    Returns:
        Matched images [N, H, W], and the offset of each slice's scan [N].
    """
    image = np.array(maps["image"], dtype=np.float32)
    slopes, offsets = scan_slopes(maps) / constants.slope, np.zeros(len(image))
    scans, _ = split_names(maps["names"])
    tolerance = np.maximum(SLOPE_TOLERANCE[0] / np.sqrt(np.bincount(scans)[scans]), SLOPE_TOLERANCE[1])
    rescaled = (np.abs(np.log(slopes)) > tolerance) | (match == "affine")
    image[rescaled] /= slopes[rescaled, None, None].astype(np.float32)
    error = image - maps["reconstruction"]
    for scan in np.unique(scans):
        rows = np.flatnonzero(scans == scan)
        inside = maps["brainmask"][rows] & np.isfinite(error[rows])
        if inside.any():
            offsets[rows] = np.median(error[rows][inside])
    return image + (constants.offset - offsets)[:, None, None].astype(np.float32), offsets


def scan_slopes(maps: Mapping[str, Any]) -> FloatArray:
    """Fit the slope of image against reconstruction for each scan; return that of each slice's scan, [N]."""
    slopes = np.ones(len(maps["image"]))
    scans, _ = split_names(maps["names"])
    for scan in np.unique(scans):
        rows = np.flatnonzero(scans == scan)
        image, reconstruction = maps["image"][rows], maps["reconstruction"][rows]
        inside = maps["brainmask"][rows] & np.isfinite(image) & np.isfinite(reconstruction)
        if np.count_nonzero(inside) >= BIN_PIXELS:
            slopes[rows] = _slope(image[inside].astype(np.float64), reconstruction[inside].astype(np.float64))
    return slopes


def unusual_contrasts(maps: Mapping[str, Any], constants: Constants) -> dict[str, float]:
    """Return the slope, relative to the usual one, of every scan whose normalisation has failed, keyed by scan."""
    names = [str(name).rpartition("_")[0] for name in maps["names"]]
    slopes = dict(zip(names, (scan_slopes(maps) / constants.slope).tolist(), strict=True))
    return {name: slope for name, slope in slopes.items() if not CONTRAST_RANGE[0] <= slope <= CONTRAST_RANGE[1]}


def fit_match(maps: Mapping[str, Any], match: str) -> Constants:
    """Fit the usual slope and offset as medians over scans; lesion masks are not needed."""
    _, first = np.unique(split_names(maps["names"])[0], return_index=True)
    constants = Constants(1.0, float(np.median(scan_slopes(maps)[first])))
    if match == "none":
        return constants
    offset = float(np.median(match_scans(maps, match, constants)[1][first]))
    # Shrink towards 0, the offset that networks are trained for, with the weight of one scan.
    return constants._replace(offset=offset * len(first) / (len(first) + 1))


def _slope(image: FloatArray, reconstruction: FloatArray) -> float:
    """Fit the slope of image against reconstruction, [M] each, to the pixels with the smallest residuals.

    Both variables have errors: noise and lesions in the image, lost detail in the reconstruction. Least squares would
    therefore be biased; the ratio of standard deviations (reduced major axis) scales with the image. Each round
    discards the pixels with the largest residuals, such as lesions, and fits the slope again.
    """
    image_range, reconstruction_range = (np.diff(np.quantile(x, QUANTILES))[0] for x in (image, reconstruction))
    slope, kept = image_range / max(reconstruction_range, 1e-6), np.ones(len(image), dtype=bool)
    for _ in range(ROUNDS):
        residuals = image - slope * reconstruction
        residuals = np.abs(residuals - np.median(residuals[kept]))
        kept = residuals <= np.quantile(residuals, KEPT)
        slope = image[kept].std() / max(reconstruction[kept].std(), 1e-6)
    return float(slope) if 0.1 <= slope <= 10 else 1.0  # no contrast to match


def fit_constants(maps: Mapping[str, Any], settings: ScoreSettings, constants: Constants | None = None) -> Constants:
    """Fit the constants of a score on healthy pixels: brain pixels outside `maps["truth"]`.

    `constants` is the result of `fit_match`, if already computed.
    """
    constants = constants or fit_match(maps, settings.match)
    error = signed_error(maps, settings, constants)
    healthy = maps["brainmask"] & ~maps["truth"] & np.isfinite(error) & np.isfinite(maps["variance"])
    floor = 1.0
    if healthy.any():
        total = np.mean(error[healthy].astype(np.float64) ** 2)
        floor = max(float(total - maps["variance"][healthy].mean(dtype=np.float64)), float(total) / 100, 1e-6)
    if settings.calibration == "none" or np.count_nonzero(healthy) < BIN_PIXELS:
        return constants._replace(error_floor=floor)
    scores = _normed(error.astype(np.float64), maps["variance"], settings.norm, floor)[healthy]
    intensities = _blurred(maps["reconstruction"])[healthy]
    order = np.argsort(intensities)
    bins = np.array_split(order, min(BINS, len(order) // BIN_PIXELS))
    means = np.array([scores[pixels].mean(dtype=np.float64) for pixels in bins])
    means = np.maximum(means, max(means.mean() / 100, 1e-6))
    centres = [float(intensities[pixels].mean(dtype=np.float64)) for pixels in bins]
    return constants._replace(error_floor=floor, intensities=tuple(centres), usual=tuple(means.tolist()))


def anomaly_map(maps: Mapping[str, Any], settings: ScoreSettings, constants: Constants) -> FloatArray:
    """Return the anomaly score, float32 [N, H, W], non-negative, 0 outside the brain. Does not remove the rim."""
    return smooth(pixel_scores(maps, settings, constants), maps, settings)


def pixel_scores(maps: Mapping[str, Any], settings: ScoreSettings, constants: Constants) -> FloatArray:
    """Return the anomaly score before smoothing; non-finite scores become 0, the lowest."""
    error = signed_error(maps, settings, constants)
    if settings.sign != "both":
        error = np.maximum(error if settings.sign == "bright" else -error, 0)
    scores = _normed(error, maps["variance"], settings.norm, constants.error_floor)
    if settings.calibration == "reconstruction" and constants.usual:
        scores = scores / np.interp(_blurred(maps["reconstruction"]), constants.intensities, constants.usual)
    return np.where(maps["brainmask"] & np.isfinite(scores), scores, 0).astype(np.float32)


def signed_error(maps: Mapping[str, Any], settings: ScoreSettings, constants: Constants) -> FloatArray:
    """Return image minus reconstruction, [N, H, W], after matching scans unless `settings.match` is "none"."""
    image = maps["image"] if settings.match == "none" else match_scans(maps, settings.match, constants)[0]
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
    ignore_outside = settings.outside == "left_out"
    if settings.smoothing == "median" and width:
        radius, outside = max(1, round(width)), np.nan if ignore_outside else 0.0
        scores = np.stack([_median(*slices, radius, outside) for slices in zip(scores, brain, strict=True)])
    blurs = settings.smoothing == "gaussian" and width > 0

    def filtered(values: FloatArray) -> FloatArray:
        if blurs:
            values = gaussian_filter(values, (0, width, width), mode="constant", truncate=3)
        return _average_slices(values, maps["names"], settings.neighbours) if settings.neighbours else values

    smoothed = filtered(scores)
    if ignore_outside and (blurs or settings.neighbours):
        smoothed = smoothed / np.maximum(filtered(brain.astype(np.float32)), 1e-6)
    return np.where(brain, smoothed, 0).astype(np.float32)


def _median(scores: FloatArray, brain: NDArray[np.bool_], radius: int, outside: float) -> FloatArray:
    """Median filter a slice [H, W] inside the brain, with pixels outside set to `outside`, or ignored if it is NaN."""
    padded = np.pad(np.where(brain, scores, np.float32(outside)), radius, constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * (2 * radius + 1,))[brain]
    ordered = np.sort(windows.reshape(len(windows), (2 * radius + 1) ** 2), axis=1)  # NaNs sort last
    n = np.count_nonzero(~np.isnan(ordered), axis=1)
    rows, smoothed = np.arange(len(ordered)), np.zeros_like(scores)
    smoothed[brain] = (ordered[rows, (n - 1) // 2] + ordered[rows, n // 2]) / 2
    return smoothed


def _average_slices(values: FloatArray, names: Sequence[str], sigma: float) -> FloatArray:
    """Average the slices of each scan with Gaussian weights of the distance between slice numbers."""
    scans, numbers = split_names(names)
    averaged = np.empty_like(values)
    for scan in np.unique(scans):
        rows = np.flatnonzero(scans == scan)
        weights = np.exp(-0.5 * (np.subtract.outer(numbers[rows], numbers[rows]) / sigma) ** 2)
        weights = (weights / weights.sum(axis=1, keepdims=True)).astype(values.dtype)
        averaged[rows] = np.tensordot(weights, values[rows], axes=1)
    return averaged


def reference_maps(maps: Mapping[str, Any]) -> dict[str, Any]:
    """Return the maps of a score in float32, with the target of a one-way translation, if any, as `image`."""
    floats = {key: maps[key] for key in ("reconstruction", "variance")}
    floats["image"] = maps["reference" if "reference" in maps else "image"]
    return _masks(maps) | {key: values.astype(np.float32) for key, values in floats.items()}


def intensity_maps(maps: Mapping[str, Any], sign: str) -> dict[str, Any]:
    """Return maps whose error is the input intensity: a reconstruction of −3 everywhere, or 3 for dark lesions."""
    image = maps["image"].astype(np.float32)
    background = np.full_like(image, -3.0 if sign == "bright" else 3.0)
    floats = {"image": image, "reconstruction": background, "variance": np.zeros_like(background)}
    return _masks(maps) | floats


def _masks(maps: Mapping[str, Any]) -> dict[str, Any]:
    """Return names and masks only: the arrays of a stored part are read when they are used."""
    return {key: maps[key] for key in ("names", "truth", "brainmask") if key in maps}

"""Which score to make of error maps: chosen on validation slices, as nnU-Net chooses its post-processing."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .metrics import ranked_pixels, scored_region, weighted_auprc
from .scores import (
    BRIGHT_LESIONS,
    Constants,
    ScoreSettings,
    error_of,
    fit_constants,
    fit_match,
    match_scans,
    pixel_scores,
    scans_of,
    smooth,
)

RESAMPLES = 200  # of the bootstrap that says which scores are as good as the best
THRESHOLDS = 512  # that AUPRC is computed at while choosing, spread evenly over the lesions' scores
ALIKE = 3  # by what slices of one subject, which resemble each other, make a standard error too small
ONE_SIDED = 0.98  # share of the lesions' squared error, above or below, from which on the other side is left out
# The order in which settings are held to the robust ones while the score stays near the best (docs/scores.md).
PREFERENCE = ("sign", "match", "calibration", "smoothing", "width", "rim", "outside", "norm", "neighbours")


class Choice(NamedTuple):
    """A score, its constants, and how it was chosen, for metrics.json; None where there was nothing to choose by."""

    settings: ScoreSettings
    constants: Constants
    selection: dict[str, Any] | None


def choose(maps: Mapping[str, Any], grid: Sequence[ScoreSettings], input: str, label: str = "choosing") -> Choice:
    """Choose the most robust of the scores that find about as much as the best one on validation slices.

    Every score of the grid is tried. Those within one standard error of the best, of their paired difference under a
    bootstrap over scans (over slices where there is one scan), are as good. Among them the sign of the lesions' errors
    is preferred, then matched scans, then calibrated errors, and so on (`PREFERENCE`). A single slice only says the
    sign, and without any lesion the modality does.

    Args:
        maps: validation maps as for `anomaly_map`, with `truth`.
        grid: the alternatives, as from `parse_grid`.
        input: the modality, which says how lesions look where none is there.
        label: of the progress bar.
    """
    grid = possible(maps, grid)
    inside = maps["truth"] & maps["brainmask"]
    if not inside.any():
        settings = most_robust(grid, "bright" if input in BRIGHT_LESIONS else "dark")
        return Choice(settings, fit_constants(maps, settings), None)
    scans, _ = scans_of(maps["names"])
    of_slices = len(np.unique(scans)) == 1
    units = np.arange(len(scans)) if of_slices else scans
    draws = np.random.default_rng(0).multinomial(n := units.max() + 1, np.full(n, 1 / n), RESAMPLES)
    draws = np.concatenate([np.ones((1, n), dtype=draws.dtype), draws])[:, units]
    found = dict(tqdm(auprc_of_each(maps, grid, draws), total=len(grid), desc=label, unit="score", leave=False))
    values = np.array(list(found.values()))  # [scores, 1 + resamples]
    best = values[:, 0].argmax()
    errors = np.nanstd(values[:, 1:] - values[best, 1:], axis=1) * (ALIKE if of_slices else 1)
    behind = values[best, 0] - values[:, 0]
    near = [one for one, is_near in zip(found, (behind <= errors) | (n == 1), strict=True) if is_near]
    error = np.where(inside, error_of(maps, ScoreSettings(), fit_match(maps, "scan")), 0)
    above = float(np.nansum(np.maximum(error, 0) ** 2) / max(np.nansum(error**2), 1e-12))
    sign = "bright" if above >= ONE_SIDED else "dark" if above <= 1 - ONE_SIDED else "both"
    settings = most_robust(near, sign)
    selection = {
        "tried": len(grid),
        "near_the_best": len(near),
        "best_auprc": float(values[best, 0]),
        "auprc": float(found[settings][0]),
        "lesion_error_above": above,
        "resampled": "slices" if of_slices else "subjects",
    }
    return Choice(settings, fit_constants(maps, settings), selection)


def possible(maps: Mapping[str, Any], grid: Sequence[ScoreSettings]) -> list[ScoreSettings]:
    """Drop scores that the maps do not allow: standardised ones without variance, neighbours of single slices.

    If nothing else is left, the grid stays as it is: without variance, standardised errors are squared ones.
    """
    scans, _ = scans_of(maps["names"])
    alone, single = len(np.unique(scans)) == len(scans), not maps["variance"].any()
    left = [one for one in grid if not ((alone and one.neighbours) or (single and one.norm == "standardised"))]
    return left or list(grid)


def most_robust(settings: Sequence[ScoreSettings], sign: str) -> ScoreSettings:
    """Return the settings that depart least from the robust ones, in order of preference; `sign` is the robust sign."""
    robust = ScoreSettings(sign)._asdict()
    # Where one side is robust, both are better than the other side; where both are, bright lesions are the rule.
    signs = [sign, *(one for one in ("both", "bright", "dark") if one != sign)]

    def departures(one: ScoreSettings) -> list[int]:
        return [signs.index(one.sign), *(int(getattr(one, key) != robust[key]) for key in PREFERENCE[1:])]

    return min(settings, key=departures)


def auprc_of_each(
    maps: Mapping[str, Any], grid: Sequence[ScoreSettings], draws: np.ndarray
) -> Iterator[tuple[ScoreSettings, np.ndarray]]:
    """Yield the AUPRC of every score of a grid, [R], for draws of the slices [R, N] as in `weighted_auprc`."""
    ranked = ranked_pixels(maps["truth"], maps["brainmask"])
    regions = {rim: scored_region(maps["brainmask"], rim) for rim in {one.rim for one in grid}}
    matches = {one.match for one in grid} - {"none"}
    inputs = {one: {**maps, "image": match_scans(maps, one, fit_match(maps, one)).image} for one in matches}
    for _, alike in groupby(grid, lambda one: one[:4]):
        alike = list(alike)
        of, settings = inputs.get(alike[0].match, maps), alike[0]._replace(match="none")  # it is done once for all
        pixels = pixel_scores(of, settings, fit_constants(of, settings, Constants(1.0)))
        for _, same in groupby(alike, lambda one: one[:-1]):
            scores = smooth(pixels, maps, (same := list(same))[0])
            for one in same:
                cut = np.where(regions[one.rim], scores, -np.inf)
                yield one, weighted_auprc(cut, maps["truth"], ranked, draws, THRESHOLDS)


def intensity_grid(grid: Sequence[ScoreSettings], sign: str) -> tuple[str, list[ScoreSettings]]:
    """Return the sign and the scores of a grid that suit the bare intensity, which has no reconstruction.

    `sign` is the one to take, unless the grid has the other one alone.
    """
    signs = {one.sign for one in grid} - {"both"} or {sign}
    sign = sign if sign in signs else signs.pop()
    plain = (one._replace(sign=sign, match="none", calibration="none") for one in grid if one.norm != "standardised")
    return sign, list(dict.fromkeys(plain)) or [ScoreSettings(sign, calibration="none", match="none")]

"""Choice of an anomaly score on validation slices, as nnU-Net chooses its post-processing."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .metrics import ranked_pixels, rows_by_code, scored_region, subject_codes, weighted_auprc, within
from .results import Part
from .scores import (
    BRIGHT_LESIONS,
    Constants,
    ScoreSettings,
    fit_constants,
    fit_match,
    match_scans,
    pixel_scores,
    signed_error,
    smooth,
    split_names,
)
from .subjects import subject_of

CHOICE_SLICES = 256  # validation slices to choose on: every score of the grid is computed on them
RESAMPLES = 200  # bootstrap resamples that give the standard error of AUPRC differences
MAX_THRESHOLDS = 512  # of AUPRC during the choice, evenly spaced quantiles of the lesion pixels' scores
SLICE_CORRELATION = 3  # factor on standard errors over the slices of one subject, which are correlated
ONE_SIDED = 0.98  # share of the lesions' squared error on one side that makes this side the robust sign
# Settings in the order in which their robust values are preferred among near-best scores (docs/scores.md).
PREFERENCE = ("sign", "match", "calibration", "smoothing", "width", "rim", "outside", "norm", "neighbours")


def slices_to_choose_on(parts: Sequence[Part]) -> Part:
    """Return the slices of a split, or about CHOICE_SLICES of them if there are more and subjects have several.

    Of each subject these are a block of consecutive slices, because a score may average neighbouring ones. Its height
    varies evenly from subject to subject.
    """
    names = [str(name) for part in parts for name in part["names"]]
    if len(parts) == 1 and len(names) <= CHOICE_SLICES:
        return parts[0]
    subjects = subject_codes([subject_of(name) for name in names], len(names))
    n_subjects = subjects.max() + 1
    length, kept = max(1, CHOICE_SLICES // n_subjects), np.zeros(len(names), dtype=bool)
    for subject in range(n_subjects):
        rows = np.flatnonzero(subjects == subject)
        rows = rows[np.argsort(split_names([names[i] for i in rows])[1], kind="stable")]
        start = round((len(rows) - length) * subject / max(n_subjects - 1, 1)) if len(rows) > length else 0
        kept[rows[start : start + length]] = True
    found: dict[str, list[np.ndarray]] = {}
    for part, rows in zip(parts, np.split(kept, np.cumsum([len(part["names"]) for part in parts])[:-1]), strict=True):
        for key in part if rows.any() else ():
            found.setdefault(key, []).append(np.asarray(part[key])[rows])
    return {key: np.concatenate(arrays) for key, arrays in found.items()}


class Choice(NamedTuple):
    """A score, its constants, and for metrics.json how it was chosen (None if there was no lesion to choose by)."""

    settings: ScoreSettings
    constants: Constants
    selection: dict[str, Any] | None


def choose(maps: Mapping[str, Any], grid: Sequence[ScoreSettings], input: str, label: str = "choosing") -> Choice:
    """Choose the most robust of the scores that are about as good as the best one on validation slices.

    Evaluates the AUPRC of every score of the grid. A score is near the best if their difference is within one standard
    error, from a paired bootstrap over scans (over slices if there is only one scan). Among these, the settings are
    chosen in the order of `PREFERENCE`: first the sign of the lesions' errors, then matching, then calibration, and so
    on. With a single slice all scores count as near the best; without lesions the sign follows from the modality.

    Args:
        maps: validation maps as for `anomaly_map`, with `truth`.
        grid: the alternatives, as returned by `parse_grid`.
        input: the modality, which determines the sign if there are no lesions.
        label: of the progress bar.
    """
    grid = applicable(maps, grid)
    lesions = maps["truth"] & maps["brainmask"]
    if not lesions.any():
        settings = most_robust(grid, "bright" if input in BRIGHT_LESIONS else "dark")
        return Choice(settings, fit_constants(maps, settings), None)
    scans, _ = split_names(maps["names"])
    single_scan = len(np.unique(scans)) == 1
    units = np.arange(len(scans)) if single_scan else scans
    draws = np.random.default_rng(0).multinomial(n := units.max() + 1, np.full(n, 1 / n), RESAMPLES)
    draws = np.concatenate([np.ones((1, n), dtype=draws.dtype), draws])
    auprc = dict(tqdm(grid_auprc(maps, grid, draws, units), total=len(grid), desc=label, unit="score", leave=False))
    values = np.array(list(auprc.values()))  # [scores, 1 + resamples]
    best = values[:, 0].argmax()
    errors = np.nanstd(values[:, 1:] - values[best, 1:], axis=1) * (SLICE_CORRELATION if single_scan else 1)
    is_near = (values[best, 0] - values[:, 0] <= errors) | (n == 1)
    near = [settings for settings, kept in zip(auprc, is_near, strict=True) if kept]
    error = np.where(lesions, signed_error(maps, ScoreSettings(), fit_match(maps, "scan")), 0)
    above = float(np.nansum(np.maximum(error, 0) ** 2) / max(np.nansum(error**2), 1e-12))
    sign = "bright" if above >= ONE_SIDED else "dark" if above <= 1 - ONE_SIDED else "both"
    settings = most_robust(near, sign)
    selection = {
        "tried": len(grid),
        "near_the_best": len(near),
        "best_auprc": float(values[best, 0]),
        "auprc": float(auprc[settings][0]),
        "lesion_error_above": above,
        "resampled": "slices" if single_scan else "subjects",
    }
    return Choice(settings, fit_constants(maps, settings), selection)


def applicable(maps: Mapping[str, Any], grid: Sequence[ScoreSettings]) -> list[ScoreSettings]:
    """Drop standardised scores without variance and `neighbours` of one-slice scans, unless nothing else is left."""
    scans, _ = split_names(maps["names"])
    one_slice_each, no_variance = len(np.unique(scans)) == len(scans), not maps["variance"].any()
    kept = [s for s in grid if not ((one_slice_each and s.neighbours) or (no_variance and s.norm == "standardised"))]
    return kept or list(grid)


def most_robust(candidates: Sequence[ScoreSettings], sign: str) -> ScoreSettings:
    """Return the settings closest to the defaults with the given sign, compared in the order of `PREFERENCE`."""
    robust = ScoreSettings(sign)._asdict()
    # If one side is robust, prefer both sides to the opposite one; if both are, prefer bright to dark.
    signs = [sign, *(other for other in ("both", "bright", "dark") if other != sign)]

    def departures(settings: ScoreSettings) -> list[int]:
        return [signs.index(settings.sign), *(int(getattr(settings, key) != robust[key]) for key in PREFERENCE[1:])]

    return min(candidates, key=departures)


def grid_auprc(
    maps: Mapping[str, Any], grid: Sequence[ScoreSettings], draws: np.ndarray, units: np.ndarray
) -> Iterator[tuple[ScoreSettings, np.ndarray]]:
    """Yield every score of a grid with its AUPRC [R] under resamples.

    Args:
        maps: as in `choose`.
        grid: scores.
        draws: [R, U] as in `weighted_auprc`.
        units: resampled unit of each slice, [N] in 0 … U − 1: its subject, or the slice itself.
    """
    ranked, rows = ranked_pixels(maps["truth"], maps["brainmask"]), rows_by_code(units)

    def by_unit(slices: np.ndarray) -> list[np.ndarray]:
        pixels = within(slices, ranked)
        return [np.concatenate([pixels[i] for i in of_unit]) for of_unit in rows]

    truth = by_unit(maps["truth"])
    regions = {rim: scored_region(maps["brainmask"], rim) for rim in {settings.rim for settings in grid}}
    matches = {settings.match for settings in grid} - {"none"}
    matched = {match: {**maps, "image": match_scans(maps, match, fit_match(maps, match))[0]} for match in matches}
    for _, same_pixels in groupby(grid, lambda settings: settings[:4]):  # sign, norm, calibration and match
        same_pixels = list(same_pixels)
        source, unmatched = matched.get(same_pixels[0].match, maps), same_pixels[0]._replace(match="none")
        pixels = pixel_scores(source, unmatched, fit_constants(source, unmatched, Constants(1.0)))
        for _, same_scores in groupby(same_pixels, lambda settings: settings[:-1]):  # all but the rim
            scores = smooth(pixels, maps, (same_scores := list(same_scores))[0])
            for settings in same_scores:
                masked = np.where(regions[settings.rim], scores, -np.inf)
                yield settings, weighted_auprc(by_unit(masked), truth, draws, MAX_THRESHOLDS)


def intensity_grid(grid: Sequence[ScoreSettings], sign: str) -> tuple[str, list[ScoreSettings]]:
    """Return a sign and the scores of the grid that apply to the input intensity, which has no reconstruction.

    The returned sign is `sign` unless the grid contains only the opposite one.
    """
    signs = {settings.sign for settings in grid} - {"both"} or {sign}
    sign = sign if sign in signs else signs.pop()
    kept = (s._replace(sign=sign, match="none", calibration="none") for s in grid if s.norm != "standardised")
    return sign, list(dict.fromkeys(kept)) or [ScoreSettings(sign, calibration="none", match="none")]

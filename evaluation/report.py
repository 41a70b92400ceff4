"""Report of a test run: scores of its error maps, figures, TensorBoard events and printed tables."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from scipy.stats import rankdata
from torch.utils.tensorboard import SummaryWriter

from .choice import Choice, choose, intensity_grid
from .figures import draw_scores, write_figures
from .metrics import RIM, average_precision, by_lesion_size, evaluate, ranked_scores
from .results import REFERENCE, TITLES, Maps, write_scores
from .scores import (
    BRIGHT_LESIONS,
    CONTRAST_WARNING,
    ScoreSettings,
    anomaly_map,
    fit_match,
    intensity_maps,
    reference_maps,
    smooth_scores,
    unusual_contrasts,
)
from .tables import intensity_name, size_table, table

EVENTS = "events.out.tfevents.*"


def score_maps(results: Path, run: Mapping[str, Any], maps: Maps, address: str, grid: Sequence[ScoreSettings]) -> None:
    """Score error maps; write metrics.json, per_slice.csv, figures and TensorBoard events, and print the tables.

    Args:
        results: the folder to write to.
        run, maps: as for `write_maps`.
        address: the results folder's name in printed messages.
        grid: the scores to choose from on validation slices, in addition to the published score.
    """
    smooth, sign = run["sampling_settings"]["smooth"], better_sign(maps.get("val", maps["test"]))
    for split, group in maps.items():
        warn_non_finite(group, split)
    choices, chosen_maps = choose_scores(run, maps, grid, sign)
    maps = {
        split: {
            **group,
            **chosen_maps[split],
            "unsmoothed": group["scores"],
            "scores": smooth_scores(group["scores"], smooth),
            "intensity": sign * group["image"],
        }
        for split, group in maps.items()
    }
    rims = {"scores": run.get("rim", RIM), "intensity": RIM} | ({"unsmoothed": RIM} if smooth != "none" else {})
    rims |= {key: choice.settings.rim for key, choice in choices.items()}
    evaluations, blocks = {}, {}
    for key, rim in rims.items():
        val = evaluate_args(maps["val"], key) if "val" in maps else None
        evaluations[key] = evaluate(*evaluate_args(maps["test"], key), val=val, rim=rim)
        blocks[key] = evaluations[key].summary | {"by_lesion_size": by_lesion_size(evaluations[key].per_slice)}
    for key, choice in choices.items():
        blocks[key] |= {"settings": choice.settings._asdict(), "constants": choice.constants._asdict()}
        blocks[key]["selection"] = choice.selection
    metrics = {**run, **blocks["scores"], "unsmoothed": blocks.get("unsmoothed"), "chosen": blocks.get("chosen")}
    metrics["baseline_intensity"] = {**blocks["intensity"], "sign": sign, "chosen": blocks.get("chosen_intensity")}
    names = {"scores": TITLES[run["method"]], "intensity": intensity_name(metrics)}
    names |= {"chosen": f"{names['scores']}, chosen", "chosen_intensity": f"{names['intensity']}, chosen"}
    ranked = {
        name: ranked_scores(*evaluate_args(maps["test"], key), rims[key]) for key, name in names.items() if key in rims
    }
    chosen = evaluations["chosen"].per_slice.items() if choices else ()
    per_slice = evaluations["scores"].per_slice | {f"chosen_{key}": values for key, values in chosen}
    per_slice.pop("chosen_lesion_area", None)
    write_scores(results, metrics, maps["test"]["names"], per_slice)
    write_figures(results / "figures", draw_scores(maps["test"], metrics, per_slice, ranked))
    write_events(results, metrics, ranked)
    by_size = f"{size_table(metrics)}\n\n" if metrics["n_slices"] >= 3 else ""
    print(f"\n{table([metrics])}\n\n{by_size}results: {address}\nfigures: {address}/figures")


def choose_scores(
    run: Mapping[str, Any], maps: Maps, grid: Sequence[ScoreSettings], sign: int
) -> tuple[dict[str, Choice], dict[str, dict[str, np.ndarray]]]:
    """Choose a score of the error maps and one of the intensity on validation slices, or else on training slices.

    Returns:
        The choices, `chosen` and `chosen_intensity`, and for each split their score maps [N, H, W]. Both are empty for
        combined runs, without slices to choose on, and for one-way runs whose error maps lack the target modality.
    """
    choices: dict[str, Choice] = {}
    scores: dict[str, dict[str, np.ndarray]] = {split: {} for split in maps}
    source = next((split for split in ("val", "train") if split in maps), None)
    one_way = run["method"].startswith("one_way")
    if run["method"] == "combined":
        return choices, scores
    if source is None or (one_way and REFERENCE not in maps[source]):
        missing = "target modality" if source else "validation or training slices"
        print(f"no score can be chosen because the error maps hold no {missing}: run modality_cyclic_test.py again")
        return choices, scores
    references = {split: reference_maps(group) for split, group in maps.items()}
    usual = fit_match(references[source], "scan")
    for group in references.values():
        for name, slope in unusual_contrasts(group, usual).items():
            print(CONTRAST_WARNING.format(name, slope))
    if not (maps[source]["truth"] & maps[source]["brainmask"]).any():
        sign = 1 if run["input"] in BRIGHT_LESIONS else -1
        print(f"no lesions in the {source} slices: using the robust score instead of choosing one (docs/scores.md)")
    side, alternatives = intensity_grid(grid, "bright" if sign > 0 else "dark")
    intensities = {split: intensity_maps(group, side) for split, group in maps.items()}
    for key, groups, options in (("chosen", references, grid), ("chosen_intensity", intensities, alternatives)):
        choices[key] = choose(groups[source], options, run["trans" if one_way else "input"], f"choosing on {source}")
        for split, group in groups.items():
            scores[split][key] = anomaly_map(group, choices[key].settings, choices[key].constants)
    return choices, scores


def warn_non_finite(group: Mapping[str, Any], split: str) -> None:
    """Print how many scores are not finite, and the first slice with such scores."""
    broken = ~np.isfinite(group["scores"]) & group["brainmask"]
    slices = np.array(group["names"])[broken.any(axis=(1, 2))]
    if len(slices):
        n_scores = np.count_nonzero(broken)
        print(f"warning: {n_scores} scores in {len(slices)} {split} slices are not finite, first in {slices[0]}")


def better_sign(group: Mapping[str, Any]) -> int:
    """Return the sign, 1 or −1, with which the input intensity has the higher AUPRC; −1 means dark lesions."""
    auprc = {
        sign: average_precision(*ranked_scores(sign * group["image"], group["truth"], group["brainmask"]))
        for sign in (1, -1)
    }
    return -1 if auprc[-1] > auprc[1] else 1


def evaluate_args(maps: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, truth and brain mask for `evaluate`, with `maps[key]` as the scores."""
    return maps[key], maps["truth"], maps["brainmask"]


def write_events(
    results: Path, metrics: Mapping[str, Any], ranked: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write the figures, precision-recall curves and hyperparameters of a test run for TensorBoard.

    `ranked` maps the name of each curve to scores and truth [M].
    """
    settings = {key: metrics[key] for key in ("method", "input", "trans", "image_size")}
    trained = {f"steps_{key}": steps for key, steps in metrics["trained_steps"].items() if steps is not None}
    scores = {"auprc": metrics["auprc"], "auroc": metrics["auroc"]}
    scores |= {f"{choice}_dice": metrics[choice]["dice"] for choice in ("oracle", "validation") if metrics[choice]}
    scores = {f"results/{key}": value for key, value in scores.items() if value is not None}
    with SummaryWriter(str(results)) as events:
        for path in sorted((results / "figures").glob("*.png")):
            events.add_image(path.stem, imread(path), dataformats="HWC")
        for name, (values, truth) in ranked.items():
            # TensorBoard evaluates evenly spaced thresholds in [0, 1]; ranks spread the curve's points evenly.
            events.add_pr_curve(f"precision_recall/{name}", truth, rankdata(values) / len(values))
        events.add_hparams(settings | trained, scores, run_name=".")

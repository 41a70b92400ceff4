"""What is computed from the error maps of a test run: scores, figures, TensorBoard events, and the printed tables."""

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
    FAR_OFF,
    ScoreSettings,
    anomaly_map,
    compared,
    far_off,
    fit_match,
    intensity_maps,
    smooth_scores,
)
from .tables import intensity_name, size_table, table

EVENTS = "events.out.tfevents.*"


def score_maps(results: Path, run: Mapping[str, Any], maps: Maps, address: str, grid: Sequence[ScoreSettings]) -> None:
    """Score error maps; write metrics.json, per_slice.csv, figures and events into a folder, and print the tables.

    Args:
        results: the folder.
        run, maps: those of `write_maps`.
        address: the folder's name for the user.
        grid: the scores of which validation slices choose one, beside the published one.
    """
    smooth, sign = run["sampling_settings"]["smooth"], better_sign(maps.get("val", maps["test"]))
    for split, group in maps.items():
        warn_of_broken(group, split)
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
    found = {
        key: evaluate(*labelled(maps["test"], key), val=labelled(maps["val"], key) if "val" in maps else None, rim=rim)
        for key, rim in rims.items()
    }
    blocks: dict[str, Any] = {
        key: evaluation.summary | {"by_lesion_size": by_lesion_size(evaluation.per_slice)}
        for key, evaluation in found.items()
    }
    for key, choice in choices.items():
        blocks[key] |= {"settings": choice.settings._asdict(), "constants": choice.constants._asdict()}
        blocks[key]["selection"] = choice.selection
    metrics = {**run, **blocks["scores"], "unsmoothed": blocks.get("unsmoothed"), "chosen": blocks.get("chosen")}
    metrics["baseline_intensity"] = {**blocks["intensity"], "sign": sign, "chosen": blocks.get("chosen_intensity")}
    per_slice = found["scores"].per_slice
    names = {"scores": TITLES[run["method"]], "intensity": intensity_name(metrics)}
    names |= {"chosen": f"{names['scores']}, chosen", "chosen_intensity": f"{names['intensity']}, chosen"}
    ranked = {
        name: ranked_scores(*labelled(maps["test"], key), rims[key]) for key, name in names.items() if key in rims
    }
    of_chosen = {f"chosen_{key}": values for key, values in found["chosen"].per_slice.items()} if choices else {}
    of_chosen.pop("chosen_lesion_area", None)
    write_scores(results, metrics, maps["test"]["names"], per_slice | of_chosen)
    write_figures(results / "figures", draw_scores(maps["test"], metrics, per_slice | of_chosen, ranked))
    write_events(results, metrics, ranked)
    by_size = f"{size_table(metrics)}\n\n" if metrics["n_slices"] >= 3 else ""  # thirds of fewer are none
    print(f"\n{table([metrics])}\n\n{by_size}results: {address}\nfigures: {address}/figures")


def choose_scores(
    run: Mapping[str, Any], maps: Maps, grid: Sequence[ScoreSettings], sign: int
) -> tuple[dict[str, Choice], dict[str, dict[str, np.ndarray]]]:
    """Choose a score of the error maps and one of the intensity, on validation slices or else on those of training.

    Returns:
        The choices by `chosen` and `chosen_intensity`, and by split the maps [N, H, W] that they make. Neither is there
        without slices to choose on, of combined runs, and of a one-way run that did not keep the other modality.
    """
    choices: dict[str, Choice] = {}
    found: dict[str, dict[str, np.ndarray]] = {split: {} for split in maps}
    split = next((one for one in ("val", "train") if one in maps), None)
    one_way = run["method"].startswith("one_way")
    if run["method"] == "combined":
        return choices, found
    if split is None or (one_way and REFERENCE not in maps[split]):
        lacking = "other modality" if split else "validation or training slices"
        print(f"no score can be chosen, these error maps hold no {lacking}: test again for one")
        return choices, found
    input = run["trans" if one_way else "input"]
    sources = {key: compared(group) for key, group in maps.items()}
    usual = fit_match(sources[split], "scan")
    for group in sources.values():
        for name, slope in far_off(group, usual).items():
            print(FAR_OFF.format(name, slope))
    if not (maps[split]["truth"] & maps[split]["brainmask"]).any():
        sign = 1 if run["input"] in BRIGHT_LESIONS else -1
        print(f"no lesion in the {split} slices: the score is not chosen but the robust one (docs/scores.md)")
    side, alternatives = intensity_grid(grid, "bright" if sign > 0 else "dark")
    intensities = {key: intensity_maps(group, side) for key, group in maps.items()}
    for key, of_splits, options in (("chosen", sources, grid), ("chosen_intensity", intensities, alternatives)):
        choices[key] = choose(of_splits[split], options, input, f"choosing on {split}")
        for one, group in of_splits.items():
            found[one][key] = anomaly_map(group, choices[key].settings, choices[key].constants)
    return choices, found


def warn_of_broken(group: Mapping[str, Any], split: str) -> None:
    """Say how many scores are not finite, and where the first one is."""
    broken = ~np.isfinite(group["scores"]) & group["brainmask"]
    if broken.any():
        where = group["names"][broken.any(axis=(1, 2)).argmax()]
        n_slices = np.count_nonzero(broken.any(axis=(1, 2)))
        print(f"warning: {np.count_nonzero(broken)} scores of {n_slices} {split} slices are not finite, first {where}")


def better_sign(group: Mapping[str, Any]) -> int:
    """1, or −1 if lesions are rather dark: which of the intensity and its negative has the higher AUPRC on slices."""
    found = {
        sign: average_precision(*ranked_scores(sign * group["image"], group["truth"], group["brainmask"]))
        for sign in (1, -1)
    }
    return -1 if found[-1] > found[1] else 1


def labelled(maps: Mapping[str, Any], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, truth and brain mask as `evaluate` takes them, with the array named `key` as the score."""
    return maps[key], maps["truth"], maps["brainmask"]


def write_events(
    results: Path, metrics: Mapping[str, Any], ranked: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write the figures in a test run's folder, precision-recall curves and the run's settings for TensorBoard.

    `ranked` holds scores and truth [M] by the name of a curve.
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
            # TensorBoard takes thresholds evenly from 0 to 1: of ranks, so that the curve is drawn evenly.
            events.add_pr_curve(f"precision_recall/{name}", truth, rankdata(values) / len(values))
        events.add_hparams(settings | trained, scores, run_name=".")

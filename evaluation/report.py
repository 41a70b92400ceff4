"""What is computed from the error maps of a test run: scores, figures, TensorBoard events, and the printed tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from scipy.stats import rankdata
from torch.utils.tensorboard import SummaryWriter

from .figures import draw_scores, write_figures
from .metrics import average_precision, by_lesion_size, evaluate, ranked_scores, smooth_scores
from .results import METHODS, Maps, write_scores
from .tables import intensity_name, size_table, table

EVENTS = "events.out.tfevents.*"


def score_maps(results: Path, run: Mapping[str, Any], maps: Maps, address: str) -> None:
    """Score error maps; write metrics.json, per_slice.csv, figures and events into a folder, and print the tables.

    `run` and `maps` are those of `write_maps`; `address` is what to call the folder `results`.
    """
    smooth = run["sampling_settings"]["smooth"]
    sign = better_sign(maps.get("val", maps["test"]))
    maps = {
        split: {
            **group,
            "unsmoothed": group["scores"],
            "scores": smooth_scores(group["scores"], smooth),
            "intensity": sign * group["image"],
        }
        for split, group in maps.items()
    }
    for split, group in maps.items():
        broken = ~np.isfinite(group["unsmoothed"]) & group["brainmask"]
        if broken.any():
            where = group["names"][broken.any(axis=(1, 2)).argmax()]
            n_slices = np.count_nonzero(broken.any(axis=(1, 2)))
            print(
                f"warning: {np.count_nonzero(broken)} scores of {n_slices} {split} slices are not finite, first {where}"
            )
    found = {
        key: evaluate(*labelled(maps["test"], key), val=labelled(maps["val"], key) if "val" in maps else None)
        for key in ("scores", "intensity", *(["unsmoothed"] if smooth != "none" else []))
    }
    blocks = {
        key: evaluation.summary | {"by_lesion_size": by_lesion_size(evaluation.per_slice)}
        for key, evaluation in found.items()
    }
    metrics = {**run, **blocks["scores"], "unsmoothed": blocks.get("unsmoothed")}
    metrics["baseline_intensity"] = blocks["intensity"] | {"sign": sign}
    per_slice = found["scores"].per_slice
    ranked = {
        METHODS[run["method"]]: ranked_scores(*labelled(maps["test"], "scores")),
        intensity_name(metrics): ranked_scores(*labelled(maps["test"], "intensity")),
    }
    write_scores(results, metrics, maps["test"]["names"], per_slice)
    write_figures(results / "figures", draw_scores(maps["test"], metrics, per_slice, ranked))
    write_events(results, metrics, ranked)
    by_size = f"{size_table(metrics)}\n\n" if metrics["n_slices"] >= 3 else ""  # thirds of fewer are none
    print(f"\n{table([metrics])}\n\n{by_size}results: {address}\nfigures: {address}/figures")


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

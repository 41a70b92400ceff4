"""Figures of slices, translations, errors and scores.

Slices are float arrays [H, W], normalised as by preprocessing. Marks use the colour-blind safe palette of Okabe and
Ito; lines in the same chart also differ in style.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .metrics import RIM, average_precision, dice_curve, mask_scores, mean_over_slices, overlap_at, precision_recall
from .results import SCORE_MEANINGS
from .window import WINDOW, to_grey

GREY = {"cmap": "gray", "vmin": 0, "vmax": 1}
ORANGE, SKY_BLUE, BLUE, VERMILION = "#e69f00", "#56b4e9", "#0072b2", "#d55e00"
TRUTH_STYLE = {"color": SKY_BLUE, "linestyle": "-", "linewidth": 1.6}
PREDICTION_STYLE = {"color": ORANGE, "linestyle": "-", "linewidth": 1.2}
CURVE_STYLES = tuple(
    {"color": colour, "linestyle": style}
    for colour, style in zip((BLUE, VERMILION) * 2, ("-", "--", "-.", ":"), strict=True)
)
HISTOGRAM_STYLES = (
    {"histtype": "stepfilled", "color": SKY_BLUE},
    {"histtype": "step", "color": VERMILION, "linewidth": 1.8},
)
THRESHOLD_STYLES = {"oracle": {"color": "black", "linestyle": "--"}, "validation": {"color": "black", "linestyle": "-"}}


def printable(text: str) -> str:
    """Replace the parts of a file name that are not valid UTF-8 and cannot be drawn."""
    return str(text).encode("utf-8", "replace").decode()


def draw_scores(
    maps: Mapping[str, np.ndarray],
    metrics: Mapping[str, Any],
    per_slice: Mapping[str, np.ndarray],
    ranked: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> dict[str, Figure]:
    """Draw all figures of a test run, keyed by file name without extension.

    Args:
        maps: arrays [N, H, W] and N names of the test slices, as in error_maps.npz.
        metrics: contents of metrics.json.
        per_slice: columns of N values.
        ranked: for each label, scores and truth [M] of the ranked pixels.
    """
    scores = mask_scores(maps["scores"], maps["brainmask"], metrics.get("rim", RIM))
    thresholds = _thresholds(metrics)
    meaning = SCORE_MEANINGS[metrics["score"]]
    figures = {
        "slices": _segmentation_figure(maps, metrics, metrics, scores, per_slice, meaning),
        "precision_recall": precision_recall_figure(ranked),
        "dice_threshold": dice_threshold_figure(scores, maps["truth"], thresholds, meaning),
        "histograms": histograms_figure(scores, maps["truth"], thresholds, meaning),
    }
    if chosen := metrics.get("chosen"):
        maps = {**maps, "scores": maps["chosen"]}
        scores = mask_scores(maps["scores"], maps["brainmask"], chosen["settings"]["rim"])
        columns = {key.removeprefix("chosen_"): values for key, values in per_slice.items() if "chosen_" in key}
        meaning = SCORE_MEANINGS["chosen"]
        figures["chosen_slices"] = _segmentation_figure(maps, metrics, chosen, scores, columns, meaning)
    return figures


def _thresholds(block: Mapping[str, Any]) -> dict[str, float]:
    """Return the thresholds of a score; inf, so that nothing is predicted, if no score is above -inf."""
    return {
        choice: np.inf if block[choice]["threshold"] is None else block[choice]["threshold"]
        for choice in THRESHOLD_STYLES
        if block[choice]
    }


def _segmentation_figure(
    maps: Mapping[str, np.ndarray],
    run: Mapping[str, Any],
    block: Mapping[str, Any],
    scores: np.ndarray,
    per_slice: Mapping[str, np.ndarray],
    meaning: str,
) -> Figure:
    """Draw slices with the predictions of one score, [N, H, W] masked, its block of metrics.json and its columns."""
    thresholds = _thresholds(block)
    choice = "validation" if "validation" in thresholds else "oracle"
    prediction, dice = scores >= thresholds[choice], per_slice[f"{choice}_dice"]
    label = f"prediction ({choice} threshold)"
    return slices_figure(maps, prediction, dice, label, run["input"], run["trans"], meaning)


def write_figures(directory: Path, figures: Mapping[str, Figure]) -> None:
    """Save each figure as {name}.png."""
    directory.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png", dpi=110)


def slices_figure(
    maps: Mapping[str, np.ndarray],
    prediction: np.ndarray,
    dice: np.ndarray,
    label: str,
    input: str,
    trans: str,
    meaning: str,
) -> Figure:
    """Draw one row for each of the best, median and worst slices, cropped to the brains.

    The columns are input, translation, reconstruction, deviation of the draws, score and contours.

    Args:
        maps: as in `draw_scores`.
        prediction, dice, label: [N, H, W] bool, its Dice [N], and its label in the legend.
        input, trans: names of the modalities.
        meaning: label of the scores.
    """
    groups = best_median_worst(dice)
    crop = _bounding_box(maps["brainmask"][list(groups)])
    error_maps = np.where(maps["brainmask"], np.nan_to_num(maps["scores"]), 0)
    norm = _error_norm(np.quantile(error_maps[maps["brainmask"]], 0.995))
    columns = {
        f"input ({input})": maps["image"],
        f"translation ({trans})": maps["translation"],
        f"reconstruction ({input})": maps["reconstruction"],
        "deviation of draws": np.sqrt(maps["variance"]),
        "anomaly score": error_maps,
        "segmentation": maps["image"],
    }
    if (maps["translation"] == maps["reconstruction"]).all():  # single network: baseline or one-way score
        del columns[f"translation ({trans})"]
        columns = {
            key.replace(f"reconstruction ({input})", f"output ({trans})"): value for key, value in columns.items()
        }
    highest = np.sqrt(maps["variance"][maps["brainmask"]].max())
    norms = {"deviation of draws": Normalize(0, highest), "anomaly score": norm}
    if not highest:  # single draw, such as Cyclic UNet's
        del columns["deviation of draws"]
    figure, axes = _panels(len(groups), len(columns), (2 * len(columns), 2.1 * len(groups) + 0.6))
    for row, (i, group) in zip(axes, groups.items(), strict=True):
        for ax, (name, images) in zip(row, columns.items(), strict=True):
            if name in norms:
                colours = ax.imshow(images[i][crop].T, cmap="inferno", norm=norms[name])
            else:
                ax.imshow(to_grey(images[i][crop]), **GREY)
        _outline(row[-1], prediction[i][crop], PREDICTION_STYLE)
        _outline(row[-1], maps["truth"][i][crop], TRUTH_STYLE)
        row[0].set_ylabel(f"{group}: Dice {dice[i]:.2f}\n{printable(maps['names'][i])}", fontsize=9, parse_math=False)
    for ax, title in zip(axes[0], columns, strict=True):
        ax.set_title(title, fontsize=9.5)
    figure.colorbar(colours, ax=axes, shrink=0.6, aspect=40, label=meaning)
    marks = {label: PREDICTION_STYLE, "truth": TRUTH_STYLE}
    handles = [Line2D([], [], label=label, **style) for label, style in marks.items()]
    on_grey = {"facecolor": "0.3", "labelcolor": "white"}
    figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=10, **on_grey)
    return figure


def scan_figure(
    images: np.ndarray,
    anomaly: np.ndarray,
    marked: np.ndarray,
    labels: Sequence[str],
    *,
    threshold: float,
    aspect: float,
    title: str,
    meaning: str,
) -> Figure:
    """Draw slices of a scan, one per column: the scan, its anomaly map, and the outline of the segmentation.

    Slices are in radiological orientation: anterior up, the patient's right on the left.

    Args:
        images: [N, H, W], normalised as by preprocessing, with axes towards the patient's left and back.
        anomaly, marked: [N, H, W], non-negative scores, and bool.
        labels: title of each column.
        threshold: scores from here on are marked.
        aspect: pixel size along W divided by pixel size along H.
        title: of the figure.
        meaning: label of the scores.
    """
    crop = _bounding_box(images > WINDOW[0])
    scored = anomaly[anomaly > 0]
    norm = _error_norm(max(threshold, np.quantile(scored, 0.995)) if scored.size else threshold)
    height, width = images[0][crop].shape
    size = (2.1 * len(images) + 1.2, 6.3 * width * aspect / height + 1.1)
    figure, axes = _panels(3, len(images), size)
    for column, image, scores, mask, label in zip(axes.T, images, anomaly, marked, labels, strict=True):
        for ax in (column[0], column[2]):
            ax.imshow(to_grey(image[crop]), aspect=aspect, **GREY)
        colours = column[1].imshow(scores[crop].T, cmap="inferno", norm=norm, aspect=aspect)
        _outline(column[2], mask[crop], PREDICTION_STYLE)
        column[0].set_title(label, fontsize=8.5)
    for ax, name in zip(axes[:, 0], ("scan", "anomaly score", "marked"), strict=True):
        ax.set_ylabel(name, fontsize=11)
    for x, side, ha in ((0.03, "R", "left"), (0.97, "L", "right")):
        where = {"transform": axes[0, 0].transAxes, "ha": ha, "va": "top"}
        axes[0, 0].text(x, 0.97, side, color="white", fontsize=9, **where)
    bar = figure.colorbar(colours, ax=axes, shrink=0.6, aspect=40, label=f"{meaning} (line: threshold)")
    bar.ax.axhline(threshold, color=PREDICTION_STYLE["color"], linewidth=2)
    # Matplotlib's own `wrap` fails on a "$" in the file name despite `parse_math`. An inch holds 11 characters.
    figure.suptitle(textwrap.fill(printable(title), int(11 * size[0])), fontsize=11, parse_math=False)
    return figure


def best_median_worst(dice: np.ndarray, per_group: int = 2) -> dict[int, str]:
    """Select slices with the best, median and worst Dice [N]; return their groups, keyed by slice index, best first.

    Each group has up to `per_group` slices, without overlap. One or two slices are not grouped. A NaN Dice counts as 0.
    """
    order = np.argsort(-np.nan_to_num(dice), kind="stable").tolist()
    if len(order) < 3:
        return dict.fromkeys(order, "slice")
    n = max(1, min(per_group, len(order) // 3))
    middle = (len(order) - n) // 2
    groups = dict.fromkeys(order[:n], "best")
    for name, members in {"worst": order[-n:], "median": order[middle : middle + n]}.items():
        groups |= {i: name for i in members if i not in groups}
    return {i: groups[i] for i in order if i in groups}


def precision_recall_figure(ranked: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """Plot precision-recall curves and chance level; `ranked` is as in `draw_scores`, with the same truth for all."""
    figure, ax = _chart("recall", "precision")
    for (label, (scores, truth)), style in zip(ranked.items(), CURVE_STYLES, strict=False):
        precision, recall = precision_recall(scores, truth)
        auprc = average_precision(scores, truth)
        ax.plot(recall, precision, drawstyle="steps-post", label=f"{label}: AUPRC {auprc:.3f}", **style)
    chance = truth.mean()
    ax.axhline(chance, color="0.45", linestyle=":", label=f"chance: {chance:.3f}")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.legend()
    return figure


def dice_threshold_figure(
    scores: np.ndarray, truth: np.ndarray, thresholds: Mapping[str, float], meaning: str
) -> Figure:
    """Plot the mean Dice over slices against the threshold, with lines at the given thresholds.

    Args:
        scores: [N, H, W], -inf outside the scored region.
        truth: [N, H, W] bool.
        thresholds: `oracle`, and `validation` if available.
        meaning: label of the scores.
    """
    figure, ax = _chart(f"threshold ({meaning})", "mean Dice over slices")
    ax.plot(*dice_curve(scores, truth), color=BLUE, label="mean Dice")
    dice = {name: mean_over_slices(overlap_at(scores, truth, t)["dice"]) for name, t in thresholds.items()}
    _mark_thresholds(ax, scores, thresholds, {name: f", Dice {value:.3f}" for name, value in dice.items()})
    ax.set_ylim(0, 1)
    ax.legend()
    return figure


def histograms_figure(scores: np.ndarray, truth: np.ndarray, thresholds: Mapping[str, float], meaning: str) -> Figure:
    """Plot score histograms of healthy and lesion pixels; arguments as in `dice_threshold_figure`."""
    figure, ax = _chart(meaning, "pixels")
    finite = np.isfinite(scores)
    root_edges = np.linspace(0, np.sqrt(np.max(scores, where=finite, initial=1e-6)), 61)
    kinds = {"healthy": finite & ~truth, "lesion": finite & truth}
    for (label, pixels), style in zip(kinds.items(), HISTOGRAM_STYLES, strict=True):
        ax.hist(scores[pixels], root_edges**2, label=label, **style)
    _mark_thresholds(ax, scores, thresholds, {})
    ax.set_yscale("log")
    ax.legend()
    return figure


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """Create a figure with a grid of image axes without ticks; return it and its axes [rows, columns]."""
    figure = Figure(figsize=size, layout="compressed")
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})


def _chart(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(color="0.9")
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _error_norm(highest: float) -> PowerNorm:
    """Return a colour scale shared by all slices, like the threshold; the square root shows faint errors."""
    return PowerNorm(0.5, vmin=0, vmax=highest)


def _mark_thresholds(ax: Axes, scores: np.ndarray, thresholds: Mapping[str, float], notes: Mapping[str, str]) -> None:
    """Draw a vertical line at each finite threshold and set a square-root axis from 0 to the highest score.

    On this axis squared errors are spaced by the error, which spreads out small ones.
    """
    for choice, threshold in thresholds.items():
        if np.isfinite(threshold):
            label = f"{choice} threshold {threshold:.3g}{notes.get(choice, '')}"
            ax.axvline(threshold, label=label, **THRESHOLD_STYLES[choice])
    highest = np.max(scores, where=np.isfinite(scores), initial=1e-6)
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set_xticks(MaxNLocator(8).tick_values(0, np.sqrt(highest)) ** 2)
    ax.xaxis.set_major_formatter("{x:.3g}")
    ax.set_xlim(0, highest)


def _outline(ax: Axes, mask: np.ndarray, style: Mapping[str, Any]) -> None:
    """Draw the outline of a mask [H, W], transposed as by `to_grey`."""
    if mask.any():
        ax.contour(mask.T, levels=[0.5], **{f"{key}s": value for key, value in style.items()})


def _bounding_box(masks: np.ndarray) -> tuple[slice, slice]:
    """Return the [H, W] window that encloses all masks [N, H, W] with a margin of 2 px."""
    covered = masks.any(axis=0)
    return tuple(
        slice(max(0, line.argmax() - 2), len(line) - max(0, line[::-1].argmax() - 2))
        for line in (covered.any(axis=1), covered.any(axis=0))
    )

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

from .evaluate import Evaluation, ScoredSlices, masked_scores
from .metrics import RIM
from .results import SCORE_MEANINGS, Part
from .scores import split_names
from .subjects import subject_of
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
THRESHOLD_STYLES = {
    "oracle": {"color": "black", "linestyle": "--"},
    "validation": {"color": "black", "linestyle": "-"},
    "healthy": {"color": "black", "linestyle": ":"},
}
FALSE_POSITIVE_SLICES = 12  # healthy slices in a figure, one of each subject
PAGE_SLICES = 30  # slices in a figure of one subject
PAGE_COLUMNS = 6


def printable(text: str) -> str:
    """Replace the parts of a file name that are not valid UTF-8 and cannot be drawn."""
    return str(text).encode("utf-8", "replace").decode()


def draw_scores(
    parts: Sequence[Part],
    scored: Mapping[str, Sequence[ScoredSlices]],
    metrics: Mapping[str, Any],
    per_slice: Mapping[str, np.ndarray],
    per_subject: Mapping[str, np.ndarray],
    evaluations: Mapping[str, Evaluation],
) -> dict[str, Figure]:
    """Draw all figures of a test run, keyed by file name without extension.

    Args:
        parts: the test slices, as in error_maps.npz.
        scored: their published score, `scores`, and perhaps the `chosen` one.
        metrics: contents of metrics.json.
        per_slice, per_subject: columns of the published score, and with the prefix `chosen_` of the chosen one.
        evaluations: by label, one for each curve; the first one is that of the published score.
    """
    meaning, rim = SCORE_MEANINGS[metrics["score"]], metrics.get("rim", RIM)
    thresholds = _thresholds(metrics)
    dice = {choice: metrics[choice]["dice"] for choice in thresholds}
    evaluation = next(iter(evaluations.values()))
    figures = {
        "slices": _segmentation_figure(parts, scored["scores"], rim, metrics, metrics, per_slice, meaning),
        "precision_recall": precision_recall_figure(evaluations),
        "dice_threshold": dice_threshold_figure(*evaluation.curves["dice"], thresholds, dice, meaning),
        "histograms": histograms_figure(scored["scores"], rim, thresholds, meaning),
    }
    shown = {"block": metrics, "scored": scored["scores"], "rim": rim, "prefix": ""}
    if chosen := metrics.get("chosen"):
        shown = {"block": chosen, "scored": scored["chosen"], "rim": chosen["settings"]["rim"], "prefix": "chosen_"}
        columns = {key.removeprefix("chosen_"): values for key, values in per_slice.items() if "chosen_" in key}
        of_score = scored["chosen"], shown["rim"], metrics, chosen
        figures["chosen_slices"] = _segmentation_figure(parts, *of_score, columns, SCORE_MEANINGS["chosen"])
    if metrics["by_subject"]:
        froc = {label: one.summary["by_subject"]["froc"] for label, one in evaluations.items()}
        if any(froc.values()):
            figures["froc"] = froc_figure(froc)
        figures |= subject_figures(parts, per_subject=per_subject, **shown)
    return figures


def _thresholds(block: Mapping[str, Any]) -> dict[str, float]:
    """Return the thresholds of a score; inf, so that nothing is predicted, if no score is above -inf."""
    return {
        choice: np.inf if block[choice]["threshold"] is None else block[choice]["threshold"]
        for choice in THRESHOLD_STYLES
        if block[choice]
    }


def threshold_in_use(block: Mapping[str, Any]) -> tuple[str, float]:
    """Return the name and the value of the threshold that prediction would use, `oracle` without validation slices."""
    thresholds = _thresholds(block)
    choice = next(choice for choice in ("validation", "healthy", "oracle") if choice in thresholds)
    return choice, thresholds[choice]


def _pick(parts: Sequence[Part], scored: Sequence[ScoredSlices], rim: float, indices: Sequence[int]) -> dict[str, Any]:
    """Return the maps of some slices of a split, with `scores` in place of the published ones, and `masked` scores."""
    found: dict[int, dict[str, Any]] = {}
    start = 0
    for part, slices in zip(parts, scored, strict=True):
        rows = [i - start for i in indices if 0 <= i - start < len(part["names"])]
        masked = masked_scores(slices, rim) if rows else ()
        for row in rows:
            found[start + row] = {key: part[key][row] for key in part}
            found[start + row] |= {"scores": slices.scores[row], "masked": masked[row]}
        start += len(part["names"])
    return {key: np.stack([found[i][key] for i in indices]) for key in found[indices[0]]}


def _segmentation_figure(
    parts: Sequence[Part],
    scored: Sequence[ScoredSlices],
    rim: float,
    run: Mapping[str, Any],
    block: Mapping[str, Any],
    per_slice: Mapping[str, np.ndarray],
    meaning: str,
) -> Figure:
    """Draw slices with the predictions of one score, its block of metrics.json and its columns."""
    choice, threshold = threshold_in_use(block)
    dice = per_slice[f"{choice}_dice"]
    groups = best_median_worst(dice)
    maps = _pick(parts, scored, rim, list(groups))
    label = f"prediction ({choice} threshold)"
    titles = [
        f"{group}: Dice {dice[i]:.2f}\n{printable(name)}"
        for (i, group), name in zip(groups.items(), maps["names"], strict=True)
    ]
    return slices_figure(maps, maps["masked"] >= threshold, titles, label, run["input"], run["trans"], meaning)


def write_figures(directory: Path, figures: Mapping[str, Figure]) -> None:
    """Save each figure as {name}.png."""
    directory.mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png", dpi=110)


def slices_figure(
    maps: Mapping[str, np.ndarray],
    prediction: np.ndarray,
    titles: Sequence[str],
    label: str,
    input: str,
    trans: str,
    meaning: str,
) -> Figure:
    """Draw one row for each slice, cropped to the brains.

    The columns are input, translation, reconstruction, deviation of the draws, score and contours.

    Args:
        maps: arrays [N, H, W] as in error_maps.npz.
        prediction: [N, H, W] bool.
        titles: of the rows.
        label: of the prediction in the legend.
        input, trans: names of the modalities.
        meaning: label of the scores.
    """
    crop = _bounding_box(maps["brainmask"])
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
    figure, axes = _panels(len(titles), len(columns), (2 * len(columns), 2.1 * len(titles) + 0.6))
    for i, (row, title) in enumerate(zip(axes, titles, strict=True)):
        for ax, (name, images) in zip(row, columns.items(), strict=True):
            if name in norms:
                colours = ax.imshow(images[i][crop].T, cmap="inferno", norm=norms[name])
            else:
                ax.imshow(to_grey(images[i][crop]), **GREY)
        _outline(row[-1], prediction[i][crop], PREDICTION_STYLE)
        _outline(row[-1], maps["truth"][i][crop], TRUTH_STYLE)
        row[0].set_ylabel(title, fontsize=9, parse_math=False)
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
    _write_title(figure, title)
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


def precision_recall_figure(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Plot the precision-recall curve of each evaluation, by label, and chance level, the same for all."""
    figure, ax = _chart("recall", "precision")
    for (label, one), style in zip(evaluations.items(), CURVE_STYLES, strict=False):
        precision, recall = one.curves["precision_recall"]
        auprc = "undefined" if one.summary["auprc"] is None else f"{one.summary['auprc']:.3f}"
        ax.plot(recall, precision, drawstyle="steps-post", label=f"{label}: AUPRC {auprc}", **style)
    chance = one.summary["chance"] or 0.0
    ax.axhline(chance, color="0.45", linestyle=":", label=f"chance: {chance:.3f}")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.legend()
    return figure


def dice_threshold_figure(
    scores: np.ndarray, mean_dice: np.ndarray, thresholds: Mapping[str, float], dice: Mapping[str, float], meaning: str
) -> Figure:
    """Plot the mean Dice over slices against the threshold, with lines at the given thresholds.

    Args:
        scores, mean_dice: the curve, as from `dice_curve`.
        thresholds: by name.
        dice: the mean Dice at each of them, None if undefined.
        meaning: label of the scores.
    """
    figure, ax = _chart(f"threshold ({meaning})", "mean Dice over slices")
    ax.plot(scores, mean_dice, color=BLUE, label="mean Dice")
    highest = max(float(scores[0]), 1e-6) if len(scores) and np.isfinite(scores[0]) else 1e-6
    notes = {name: ", Dice " + ("undefined" if value is None else f"{value:.3f}") for name, value in dice.items()}
    _mark_thresholds(ax, highest, thresholds, notes)
    ax.set_ylim(0, 1)
    ax.legend()
    return figure


def histograms_figure(
    scored: Sequence[ScoredSlices], rim: float, thresholds: Mapping[str, float], meaning: str
) -> Figure:
    """Plot score histograms of healthy and lesion pixels.

    Args:
        scored: the slices and their scores.
        rim: as in `scored_region`.
        thresholds: by name.
        meaning: label of the scores.
    """
    figure, ax = _chart(meaning, "pixels")
    highest = 1e-6
    for part in scored:
        masked = masked_scores(part, rim)
        highest = max(highest, float(np.max(masked, where=np.isfinite(masked), initial=1e-6)))
    edges = np.linspace(0, np.sqrt(highest), 61) ** 2
    counts = {"healthy": np.zeros(60), "lesion": np.zeros(60)}
    for part in scored:
        masked = masked_scores(part, rim)
        for label, pixels in (("healthy", ~part.truth), ("lesion", part.truth)):
            counts[label] += np.histogram(masked[np.isfinite(masked) & pixels], edges)[0]
    for (label, of_kind), style in zip(counts.items(), HISTOGRAM_STYLES, strict=True):
        ax.hist(edges[:-1], edges, weights=of_kind, label=label, **style)
    _mark_thresholds(ax, highest, thresholds, {})
    ax.set_yscale("log")
    ax.legend()
    return figure


def froc_figure(curves: Mapping[str, Mapping[str, Sequence[float]] | None]) -> Figure:
    """Plot the share of lesions found against false positives per scan; `curves` are as from `froc`, by label.

    At low thresholds marks merge, and their number falls. The curves keep the highest number so far.
    """
    figure, ax = _chart("false positives per scan", "share of lesions found")
    for (label, curve), style in zip(curves.items(), CURVE_STYLES, strict=False):
        if curve:
            false_positives = np.maximum.accumulate(curve["false_positives"][::-1])
            ax.plot(false_positives, curve["sensitivity"][::-1], marker=".", label=label, **style)
    ax.set_ylim(0, 1.02)
    ax.set_xlim(left=0)
    ax.legend()
    return figure


def subject_figures(
    parts: Sequence[Part],
    scored: Sequence[ScoredSlices],
    rim: float,
    block: Mapping[str, Any],
    per_subject: Mapping[str, np.ndarray],
    prefix: str,
) -> dict[str, Figure]:
    """Draw the worst false positives of healthy subjects, and the patients with the best, median and worst Dice.

    Args:
        parts, scored, rim: the slices and one of their scores.
        block: of this score in metrics.json.
        per_subject: columns of values per subject.
        prefix: of the columns of this score.
    """
    choice, threshold = threshold_in_use(block)
    rows: dict[str, list[int]] = {}  # slices by subject, in order
    area: list[int] = []  # marked pixels of every slice
    names: list[str] = []
    for part in scored:
        area += np.count_nonzero(masked_scores(part, rim) >= threshold, axis=(1, 2)).tolist()
        names += map(str, part.names)
    for i in np.argsort(split_names(names)[1], kind="stable").tolist():
        rows.setdefault(subject_of(names[i]), []).append(i)

    def page(indices: Sequence[int], title: str) -> Figure:
        maps = _pick(parts, scored, rim, indices)
        labels = [f"{printable(name)}, {area[i]} px marked" for i, name in zip(indices, maps["names"], strict=True)]
        return page_figure(maps["image"], maps["brainmask"], maps["truth"], maps["masked"] >= threshold, labels, title)

    figures = {}
    is_healthy = dict(zip(per_subject["subject"].tolist(), per_subject["healthy"] > 0, strict=True))
    worst = sorted(
        (max(of_subject, key=area.__getitem__) for name, of_subject in rows.items() if is_healthy[name]),
        key=area.__getitem__,
    )
    if worst := [i for i in worst[::-1] if area[i]][:FALSE_POSITIVE_SLICES]:
        title = f"Healthy subjects: the slice with the largest marked area of each ({choice} threshold)"
        figures["healthy_false_positives"] = page(worst, title)
    with_lesion = np.flatnonzero(per_subject["lesion_voxels"] > 0)
    dice = np.nan_to_num(per_subject[f"{prefix}{choice}_dice"][with_lesion])
    for i, group in best_median_worst(dice, 1).items():
        name = per_subject["subject"][with_lesion[i]]
        shown = rows[name]
        if len(shown) > PAGE_SLICES:
            shown = [shown[round(k)] for k in np.linspace(0, len(shown) - 1, PAGE_SLICES)]
        figures[f"subject_{group}"] = page(
            shown, f"{group} Dice: {printable(name)}, {dice[i]:.2f} ({choice} threshold)"
        )
    return figures


def page_figure(
    images: np.ndarray,
    brainmask: np.ndarray,
    truth: np.ndarray,
    prediction: np.ndarray,
    labels: Sequence[str],
    title: str,
) -> Figure:
    """Draw slices [N, H, W] in a grid, each with the outlines of truth and prediction, cropped to the brains."""
    n_rows = -(-len(images) // PAGE_COLUMNS)
    columns = min(len(images), PAGE_COLUMNS)
    crop = _bounding_box(brainmask)
    figure, axes = _panels(n_rows, columns, (max(2.2 * columns, 6), 2.5 * n_rows + 0.8))
    for ax in axes.flat[len(images) :]:
        ax.set_axis_off()
    for ax, image, lesion, marked, label in zip(axes.flat, images, truth, prediction, labels, strict=False):
        ax.imshow(to_grey(image[crop]), **GREY)
        _outline(ax, marked[crop], PREDICTION_STYLE)
        _outline(ax, lesion[crop], TRUTH_STYLE)
        ax.set_title(label, fontsize=6.5, parse_math=False)
    marks = {"prediction": PREDICTION_STYLE} | ({"truth": TRUTH_STYLE} if truth.any() else {})
    handles = [Line2D([], [], label=label, **style) for label, style in marks.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, fontsize=9, facecolor="0.3", labelcolor="white")
    _write_title(figure, title)
    return figure


def _write_title(figure: Figure, title: str) -> None:
    # Matplotlib's own `wrap` fails on a "$" in a file name despite `parse_math`. An inch holds 11 characters.
    width = int(11 * figure.get_figwidth())
    figure.suptitle(textwrap.fill(printable(title), width), fontsize=11, parse_math=False)


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


def _mark_thresholds(ax: Axes, highest: float, thresholds: Mapping[str, float], notes: Mapping[str, str]) -> None:
    """Draw a vertical line at each finite threshold and set a square-root axis from 0 to the highest score.

    On this axis squared errors are spaced by the error, which spreads out small ones.
    """
    for choice, threshold in thresholds.items():
        if np.isfinite(threshold):
            label = f"{choice} threshold {threshold:.3g}{notes.get(choice, '')}"
            ax.axvline(threshold, label=label, **THRESHOLD_STYLES[choice])
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

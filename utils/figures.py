"""Pictures of slices, translations and errors. Slices are float arrays [H, W], normalised as by preprocessing."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def to_grey(image: np.ndarray) -> np.ndarray:
    """A slice as it is looked at: −3 … 3 mapped to 0 … 1 and clipped, [H, W] turned front-up to [W, H]."""
    return np.clip((image + 3) / 6, 0, 1).T


def side_by_side(*images: np.ndarray) -> np.ndarray:
    """Slices of one size in a row, in [0, 1], for TensorBoard."""
    return np.concatenate([to_grey(image) for image in images], axis=1)


def cycle_figure(
    path: Path, maps: Mapping[str, np.ndarray], dice: np.ndarray, input: str, trans: str, rows: int = 6
) -> None:
    """Write a PNG with a row for each of some slices: input | translation | reconstruction | error map | truth.

    The slices shown are spread evenly from the best Dice to the worst.

    Args:
        path: of the PNG.
        maps: image, translation, reconstruction, scores, truth and brainmask, [N, H, W], and N names.
        dice: [N].
        input, trans: names of the modalities.
        rows: slices shown, at most.
    """
    order = np.argsort(-np.nan_to_num(dice))
    shown = order[np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(int)]
    error_maps = np.where(maps["brainmask"], maps["scores"], np.nan)
    # One scale for all slices: a threshold is one number for all of them too.
    top = np.nanpercentile(error_maps, 99.5)
    titles = [f"input ({input})", f"translation ({trans})", f"reconstruction ({input})", "error map", "truth"]
    figure = Figure(figsize=(11, 2.1 * len(shown) + 0.5), layout="constrained")
    axes = figure.subplots(len(shown), len(titles), squeeze=False)
    for row, i in zip(axes, shown, strict=True):
        for ax, key in zip(row, ("image", "translation", "reconstruction"), strict=False):
            ax.imshow(to_grey(maps[key][i]), cmap="gray", vmin=0, vmax=1)
        colours = row[3].imshow(error_maps[i].T, cmap="inferno", vmin=0, vmax=top)
        row[3].set_facecolor("black")
        row[4].imshow(to_grey(maps["image"][i]), cmap="gray", vmin=0, vmax=1)
        if maps["truth"][i].any():
            row[4].contour(maps["truth"][i].T, levels=[0.5], colors="#56b4e9", linewidths=1.2)
        row[0].set_ylabel(f"{maps['names'][i]}\nDice {dice[i]:.2f}", fontsize=7)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.colorbar(colours, ax=axes[:, 3], shrink=0.8, label="squared cyclic error")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

"""Pictures of slices, translations and errors. Slices are float arrays [H, W], normalised as by preprocessing."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

# Normalised intensities shown as black and white. A tenth of the brain, and most tumours, lie above 3.
WINDOW = (-3.0, 5.0)
TRUTH_COLOUR = "#56b4e9"  # sky blue, told apart from grey and from inferno by colour-blind eyes too


def to_grey(image: np.ndarray) -> np.ndarray:
    """A slice as it is looked at: the window mapped to 0 … 1 and clipped, [H, W] turned front-up to [W, H]."""
    low, high = WINDOW
    return np.clip((image - low) / (high - low), 0, 1).T


def side_by_side(*images: np.ndarray) -> np.ndarray:
    """Slices of one size in a row, in [0, 1], for TensorBoard."""
    return np.concatenate([to_grey(image) for image in images], axis=1)


def cycle_figure(
    path: Path, maps: Mapping[str, np.ndarray], dice: np.ndarray, input: str, trans: str, rows: int = 6
) -> None:
    """Write a PNG with a row for each of some slices: input | translation | reconstruction | error map | truth.

    The slices shown are spread evenly from the best Dice to the worst. What lies outside all brains is cut off.

    Args:
        path: of the PNG.
        maps: image, translation, reconstruction, scores, truth and brainmask, [N, H, W], and N names.
        dice: [N].
        input, trans: names of the modalities.
        rows: slices shown, at most.
    """
    order = np.argsort(-np.nan_to_num(dice), kind="stable")
    chosen = order[np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(int)]
    crop = _bounding_box(maps["brainmask"][chosen])
    error_maps = np.where(maps["brainmask"], maps["scores"], 0)
    # One scale for all slices, as a threshold is one number for all of them; its square root shows faint errors.
    norm = PowerNorm(0.5, vmin=0, vmax=np.quantile(error_maps[maps["brainmask"]], 0.995))

    titles = [f"input ({input})", f"translation ({trans})", f"reconstruction ({input})", "error map", "truth"]
    figure = Figure(figsize=(10, 2.1 * len(chosen) + 0.3), layout="constrained")
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    for row, i in zip(axes, chosen, strict=True):
        grey = {key: to_grey(maps[key][i][crop]) for key in ("image", "translation", "reconstruction")}
        for ax, picture in zip(row, (*grey.values(), None, grey["image"]), strict=True):
            if picture is not None:
                ax.imshow(picture, cmap="gray", vmin=0, vmax=1)
        colours = row[3].imshow(error_maps[i][crop].T, cmap="inferno", norm=norm)
        truth = maps["truth"][i][crop].T
        if truth.any():
            row[4].contour(truth, levels=[0.5], colors=TRUTH_COLOUR, linewidths=1.5)
        row[0].set_ylabel(f"{maps['names'][i]}\nDice {dice[i]:.2f}", fontsize=8)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=10)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    figure.colorbar(colours, ax=axes, shrink=0.5, aspect=40, label="squared cyclic error")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _bounding_box(masks: np.ndarray) -> tuple[slice, slice]:
    """The smallest [H, W] window, with 2 px around it, that holds all masks [N, H, W]."""
    covered = masks.any(axis=0)
    return tuple(
        slice(max(0, line.argmax() - 2), len(line) - max(0, line[::-1].argmax() - 2))
        for line in (covered.any(axis=1), covered.any(axis=0))
    )

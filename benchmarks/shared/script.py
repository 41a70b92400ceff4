"""The frame of a benchmark script: flags and their checks, printed tables, saved figures."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from utils.cli import ArgumentParser, UserError

# Help of flags that several scripts have.
HELP = {
    "dataset": "config to use: brats (the paper's size) or phantom (the demo's)",
    "data_dir": "preprocessed slices to train on and to choose scores and thresholds on",
    "gpu_id": "number of the CUDA device, or cpu",
    "repeats": "turns of each side; medians are taken over these",
    "seeds": "seeds of weights, data order and noise, one run each",
    "workers": "networks to train at a time, with one thread each if several",
    "logdir": "folder of the experiments",
    "csv": "file of the scores",
    "figure": "figure to draw",
}


def create_parser(doc: str, **flags: Any) -> ArgumentParser:
    """Return a parser with these flags; each value is a default, or a default and the help that `HELP` lacks.

    A flag takes values of its default's type, and several of them if the default is a list.
    """
    parser = ArgumentParser(description=doc.splitlines()[0])
    for flag, value in flags.items():
        default, text = value if isinstance(value, tuple) else (value, HELP[flag])
        several = {"nargs": "+", "type": type(default[0])} if isinstance(default, list) else {"type": type(default)}
        parser.add_argument(f"--{flag}", default=default, help=text, **several)
    return parser


def require_at_least(args: argparse.Namespace, **least: int) -> argparse.Namespace:
    """Return the arguments.

    Raises:
        UserError: if a flag is below its least value.
    """
    for flag, bound in least.items():
        if (value := getattr(args, flag)) is not None and value < bound:
            raise UserError(f"--{flag} must be at least {bound}, got {value}")
    return args


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns, the first column aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def with_range(values: Sequence[float], middle: Callable[[Sequence[float]], float] = mean, digits: int = 2) -> str:
    """Return the mean, or another average, with the lowest and the highest value."""
    return "{:.{d}f} ({:.{d}f} … {:.{d}f})".format(middle(values), min(values), max(values), d=digits)


def over_seeds(values: Sequence[float]) -> str:
    """Return the mean, and the range if there is more than one value."""
    return f"{values[0]:.3f}" if len(values) == 1 else with_range(values, digits=3)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> str:
    """Return the mean of a − b over the same slices, and the 95 % interval of a paired bootstrap."""
    from evaluation.metrics import paired_bootstrap

    difference, (low, high) = paired_bootstrap(a, b)
    return f"{difference:+.3f} [{low:+.3f}, {high:+.3f}]"


def save_figure(figure: Any, path: Path, ncols: int) -> None:
    """Write a figure with the first panel's legend below all panels, in `ncols` columns."""
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=ncols)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

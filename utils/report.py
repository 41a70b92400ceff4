"""What a test run leaves behind, and the table that compares runs.

`python -m utils.report RESULTS …` prints one table for the folders of several runs.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .cli import ArgumentParser, UserError, run

METHODS = {"cyclic_unet": "Cyclic UNet", "mmccd": "MMCCD"}


def write_results(
    directory: Path,
    metrics: Mapping[str, Any],
    per_slice: Mapping[str, np.ndarray],
    maps: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write per_slice.csv, error_maps.npz and, last, metrics.json into the folder of a test run.

    Args:
        directory: is made if it is not there.
        metrics: JSON-able.
        per_slice: columns of N values, for the N test slices.
        maps: by split, `names` ("{subject}_{slice}") and arrays [N, H, W]; in the file they are called
            test_scores, test_truth and so on.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be made ({error.strerror}): check --logdir") from error
    with (directory / "per_slice.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "slice", *per_slice])
        for i, name in enumerate(maps["test"]["names"]):
            writer.writerow([*name.rsplit("_", 1), *(f"{column[i]:.6g}" for column in per_slice.values())])
    arrays = {f"{split}_{key}": array for split, group in maps.items() for key, array in group.items()}
    np.savez_compressed(directory / "error_maps.npz", **arrays)
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of test runs (contents of metrics.json), the bare intensity first, with 95 % intervals."""
    rows: dict[tuple[str, ...], None] = {}
    for one in runs:
        rows[(f"intensity ({one['input']})", "none", *_scores(one["baseline_intensity"]))] = None
    for one in runs:
        steps = " + ".join(_count(one["trained_steps"][direction]) for direction in ("forward", "backward"))
        rows[(METHODS[one["method"]], steps, *_scores(one))] = None
    header = ("method", "trained steps", "AUPRC", "oracle Dice", "validation Dice")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, tuple("─" * width for width in widths), *rows)
    ]
    first = runs[0]
    lines.append(
        f"{first['n_slices']} test slices; AUPRC by chance {first['chance']:.3f} (the lesions' share of the scored "
        f"pixels); lesion pixels outside the scored region {100 * first['lost_lesion_share']:.1f} %"
    )
    lines.append(
        "[95 % bootstrap interval over slices]; oracle: threshold chosen on these test slices, as the literature "
        "does; validation: chosen on the val slices"
    )
    return "\n".join(lines)


def _scores(block: Mapping[str, Any]) -> tuple[str, str, str]:
    chosen = [block["oracle"], block["validation"]]
    dice = [
        _with_interval(choice["dice"], choice["dice_interval"]) if choice else "no val slices"
        for choice in chosen
    ]
    return _with_interval(block["auprc"], block["auprc_interval"]), *dice


def _with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    if value is None:
        return "undefined"
    low, high = ("?" if bound is None else f"{bound:.3f}" for bound in interval)
    return f"{value:.3f} [{low}, {high}]"


def _count(steps: int | None) -> str:
    return "?" if steps is None else f"{steps:,}"


def main() -> None:
    parser = ArgumentParser(
        prog="python -m utils.report", description="Print one table for several test runs."
    )
    parser.add_argument("results", nargs="+", help="folders of test runs, below experiments/results")
    runs = []
    for folder in map(Path, parser.parse_args().results):
        path = folder / "metrics.json"
        if not path.is_file():
            raise UserError(f"no metrics.json in {folder}: run modality_cyclic_test.py first")
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    print(table(runs))
    for folder in parser.parse_args().results:
        print(f"figures: {Path(folder) / 'figures'}")


if __name__ == "__main__":
    run(main)

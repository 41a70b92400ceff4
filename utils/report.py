"""What a test run leaves behind, and the table that compares runs.

`python -m utils.report RESULTS …` prints one table for the folders of several runs.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from .cli import ArgumentParser, UserError, run
from .storage import local_path

METHODS = {"cyclic_unet": "Cyclic UNet", "mmccd": "MMCCD"}
CHOICES = ("oracle", "validation")  # of a threshold
SIZE_COLUMNS = ("auprc", "oracle_dice", "validation_dice")
PER_SLICE = "per_slice.csv"
MAPS = ("image", "translation", "reconstruction", "scores", "truth", "brainmask")  # [N, H, W] each

Maps = Mapping[str, Mapping[str, Any]]  # by split: `names` of the slices, and the arrays named in MAPS


def write_maps(path: Path, run: Mapping[str, Any], maps: Maps) -> None:
    """Write error_maps.npz, which is enough to score a test run again without a model.

    Args:
        path: of the file; its folder is made if it is not there.
        run: JSON-able, what was chained and how.
        maps: by split, `names` ("{subject}_{slice}") and arrays [N, H, W]; in the file they are called
            test_scores, test_truth and so on.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}): check --logdir") from error
    arrays = {f"{split}_{key}": array for split, group in maps.items() for key, array in group.items()}
    np.savez_compressed(path, run=json.dumps(run), **arrays)


def read_maps(path: Path) -> tuple[dict[str, Any], Maps]:
    """What `write_maps` was given.

    Raises:
        UserError: the file is not there, or is not what `write_maps` writes.
    """
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}: run modality_cyclic_test.py first")
    try:
        with np.load(path) as file:
            run = json.loads(str(file["run"]))
            splits = ("test", "val") if "val_names" in file else ("test",)
            maps = {split: {key: file[f"{split}_{key}"] for key in ("names", *MAPS)} for split in splits}
        for group in maps.values():
            n_slices, height, width = group["scores"].shape
            shapes = {group[key].shape for key in MAPS} | {(*group["names"].shape, height, width)}
            if shapes != {(n_slices, height, width)}:
                raise ValueError(f"arrays of different shapes: {shapes}")
    except Exception as error:  # whatever NumPy, zip and JSON make of a file that is damaged or another's
        raise UserError(f"{path} cannot be scored ({error}): run modality_cyclic_test.py again") from error
    return run, maps


def write_scores(
    directory: Path, metrics: Mapping[str, Any], names: Sequence[str], per_slice: Mapping[str, np.ndarray]
) -> None:
    """Write per_slice.csv and metrics.json into the folder of a test run.

    Args:
        directory: of the test run.
        metrics: JSON-able.
        names: "{subject}_{slice}" of the N test slices.
        per_slice: columns of N values.
    """
    with (directory / PER_SLICE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "slice", *per_slice])
        for i, name in enumerate(names):
            writer.writerow([*name.rsplit("_", 1), *(f"{column[i]:.6g}" for column in per_slice.values())])
    (directory / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


def write_events(
    directory: Path, metrics: Mapping[str, Any], ranked: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Write the figures that lie in `directory`, precision-recall curves and the run's settings for TensorBoard.

    Args:
        directory: of the test run; the events of an earlier scoring are replaced.
        metrics: contents of metrics.json.
        ranked: by name of a curve, scores and truth of the pixels, [M] each.
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    for earlier in directory.glob("events.out.tfevents.*"):
        earlier.unlink()
    settings = {key: metrics[key] for key in ("method", "input", "trans", "image_size")}
    trained = {f"steps_{key}": steps for key, steps in metrics["trained_steps"].items() if steps is not None}
    results = {"auprc": metrics["auprc"], "auroc": metrics["auroc"]}
    results |= {f"{choice}_dice": metrics[choice]["dice"] for choice in CHOICES if metrics[choice]}
    results = {f"results/{key}": value for key, value in results.items() if value is not None}
    with SummaryWriter(str(directory)) as events:
        for path in sorted((directory / "figures").glob("*.png")):
            events.add_image(path.stem, imread(path), dataformats="HWC")
        for name, (scores, truth) in ranked.items():
            # TensorBoard takes thresholds evenly from 0 to 1: of ranks, so that the curve is drawn evenly.
            events.add_pr_curve(f"precision_recall/{name}", truth, rankdata(scores) / len(scores))
        events.add_hparams(settings | trained, results, run_name=".")


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of test runs (contents of metrics.json), the bare intensity first, with 95 % intervals."""
    rows: dict[tuple[str, ...], None] = {}
    for one in runs:
        rows[(f"intensity ({one['input']})", "none", *_scores(one["baseline_intensity"]))] = None
    for one in runs:
        steps = " + ".join(_count(one["trained_steps"][direction]) for direction in ("forward", "backward"))
        rows[(METHODS[one["method"]], steps, *_scores(one))] = None
    header = ("method", "trained steps", "AUPRC", "oracle Dice", "validation Dice")
    lines = _aligned(header, *rows)
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


def size_table(metrics: Mapping[str, Any]) -> str:
    """A table of one test run (contents of metrics.json) by the size of the lesions."""
    rows = []
    methods = {f"intensity ({metrics['input']})": metrics["baseline_intensity"]}
    methods[METHODS[metrics["method"]]] = metrics
    for size in metrics["by_lesion_size"]:
        for method, block in methods.items():
            third = block["by_lesion_size"][size]
            bounds = "{} … {} px".format(*third["area_bounds"]) if third["area_bounds"] else "none"
            values = [_value(third[key]) if key in third else "no val slices" for key in SIZE_COLUMNS]
            rows.append((size, bounds, str(third["n_slices"]), method, *values))
    header = ("lesions", "area", "slices", "method", "mean AUPRC", "oracle Dice", "validation Dice")
    return "\n".join(_aligned(header, *rows))


def comparison(run_a: Path, run_b: Path) -> str:
    """A table of how two test runs differ on the same slices: a paired bootstrap of every metric.

    Args:
        run_a, run_b: folders of test runs.

    Raises:
        UserError: a folder has no sound per_slice.csv, or the two are not of the same slices and lesions.
    """
    from .metrics import paired_bootstrap

    a, b = _read_per_slice(run_a), _read_per_slice(run_b)
    if set(a) != set(b):
        raise UserError(
            f"{run_a} and {run_b} hold different slices ({len(set(a) - set(b))} of {len(a)} only in the first, "
            f"{len(set(b) - set(a))} of {len(b)} only in the second): test both on the same data"
        )
    names = sorted(a)
    if any(a[name]["lesion_area"] != b[name]["lesion_area"] for name in names):
        raise UserError(f"{run_a} and {run_b} differ in lesion areas: test both at the same image size")
    rows = []
    for metric in (key for key in a[names[0]] if key != "lesion_area" and key in b[names[0]]):
        values = np.array([[one[name][metric] for name in names] for one in (a, b)])
        difference, interval = paired_bootstrap(*values)
        n_paired = np.count_nonzero(~np.isnan(values).any(axis=0))
        low, high = (_value(bound, signed=True) for bound in interval)
        rows.append((metric, _value(difference, signed=True), f"[{low}, {high}]", str(n_paired)))
    lines = [f"A: {run_a}", f"B: {run_b}", *_aligned(("metric", "A − B", "95 % interval", "slices"), *rows)]
    lines.append(
        "means over the slices where both are defined; paired bootstrap over slices, thresholds frozen; "
        "assd and hd95 are distances: less is better"
    )
    return "\n".join(lines)


def _read_per_slice(directory: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The rows of a per_slice.csv by (subject, slice)."""
    path = directory / PER_SLICE
    if not path.is_file():
        raise UserError(f"no {PER_SLICE} in {directory}: run modality_cyclic_test.py first")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        slices = {
            (row.pop("subject"), row.pop("slice")): {key: float(value) for key, value in row.items()}
            for row in rows
        }
        if not slices or len(slices) < len(rows) or any("lesion_area" not in row for row in rows):
            raise ValueError("no slices, a slice twice, or no lesion_area")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}): score the run again with --rescore") from error
    return slices


def _aligned(*rows: Sequence[str]) -> list[str]:
    """Lines of a table whose first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = rows
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, tuple("─" * width for width in widths), *body)
    ]


def _scores(block: Mapping[str, Any]) -> tuple[str, str, str]:
    chosen = [block[choice] for choice in CHOICES]
    dice = [
        with_interval(choice["dice"], choice["dice_interval"]) if choice else "no val slices"
        for choice in chosen
    ]
    return with_interval(block["auprc"], block["auprc_interval"]), *dice


def with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    """`0.585 [0.461, 0.702]`; a value without a defined interval stands alone."""
    if value is None:
        return "undefined"
    if None in interval:  # a single slice has none
        return f"{value:.3f}"
    low, high = interval
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _value(value: float | None, signed: bool = False) -> str:
    if value is None or np.isnan(value):
        return "undefined"
    return f"{value:+.3f}" if signed else f"{value:.3f}"


def _count(steps: int | None) -> str:
    return "?" if steps is None else f"{steps:,}"


def main() -> None:
    parser = ArgumentParser(
        prog="python -m utils.report", description="Print one table for several test runs."
    )
    parser.add_argument(
        "results", nargs="+", type=local_path, help="folders of test runs, below experiments/results"
    )
    folders = parser.parse_args().results
    runs = []
    for folder in folders:
        path = folder / "metrics.json"
        if not path.is_file():
            raise UserError(f"no metrics.json in {folder}: run modality_cyclic_test.py first")
        runs.append(json.loads(path.read_text(encoding="utf-8")))
    print(table(runs))
    for folder in folders:
        print(f"figures: {folder / 'figures'}")


if __name__ == "__main__":
    run(main)

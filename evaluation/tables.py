"""Tables of test runs, and paired comparisons of two runs.

`python -m evaluation.tables RESULTS …` prints one table for several results folders.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.cli import ArgumentParser, UserError, run
from utils.storage import local_path

from .results import THRESHOLDS, TITLES, changed_kinds, read_metrics, read_per_slice

DICE_COLUMNS = tuple(f"{choice} Dice" for choice in THRESHOLDS)


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format a table of test runs (contents of metrics.json), for each input after a row for the intensity."""
    rows: dict[tuple[str, ...], None] = {}
    inputs, notes = list(dict.fromkeys(metrics["input"] for metrics in runs)), []
    for metrics in sorted(runs, key=lambda metrics: inputs.index(metrics["input"])):
        rows[(intensity_name(metrics), "none", *_scores(metrics["baseline_intensity"]))] = None
        if chosen := metrics["baseline_intensity"].get("chosen"):
            rows[(f"{intensity_name(metrics)}, chosen", "none", *_scores(chosen))] = None
        steps = " + ".join("?" if steps is None else f"{steps:,}" for steps in metrics["trained_steps"].values())
        name, smooth = TITLES[metrics["method"]], metrics["sampling_settings"]["smooth"]
        if len(inputs) > 1:
            name += f" ({metrics['input']})"
        if metrics["unsmoothed"]:
            rows[(name, steps, *_scores(metrics["unsmoothed"]))] = None
        rows[(name if smooth == "none" else f"{name}, {smooth}", steps, *_scores(metrics))] = None
        if members := metrics.get("members"):
            notes.append(f"{name}: {describe_members(members)}")
        if chosen := metrics.get("chosen"):
            rows[(f"{name}, chosen", steps, *_scores(chosen))] = None
            notes.append(f"{name}, chosen: {describe_score(chosen['settings'])}")
    first = runs[0]
    lost = first["lost_lesion_share"]
    interval = "[95 % bootstrap interval over subjects]; " if any("[" in cell for row in rows for cell in row) else ""
    lines = [
        *_aligned(("method", "trained steps", "AUPRC", *DICE_COLUMNS), *rows),
        f"{first['n_slices']} test slices; chance-level AUPRC {_value(first['chance'])} (fraction of lesion pixels); "
        + ("no lesions" if lost is None else f"{100 * lost:.1f} % of lesion pixels outside the scored region"),
        f"{interval}oracle: threshold chosen on the test slices, as in the literature; validation: chosen on the val "
        "slices",
    ]
    if first.get("healthy"):
        lines.append(
            f"healthy: the lowest threshold at which {100 * _share(first):g} % of their healthy pixels are marked"
        )
    return "\n".join(lines + notes)


def _share(metrics: Mapping[str, Any]) -> float:
    """Return the share of healthy validation pixels that is marked at the threshold `healthy`."""
    return metrics["healthy"].get("share", math.nan)


def subject_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format a table of the scores by subject, a row for each method and threshold, of runs that have such scores."""
    rows: dict[tuple[str, ...], None] = {}
    for metrics in runs:
        name, intensity = TITLES[metrics["method"]], metrics["baseline_intensity"]
        blocks = {intensity_name(metrics): intensity, f"{intensity_name(metrics)}, chosen": intensity.get("chosen")}
        blocks |= {name: metrics, f"{name}, chosen": metrics.get("chosen")}
        for method, block in ((method, block["by_subject"]) for method, block in blocks.items() if block):
            detection = block["detection"]["subject"]
            for choice in (choice for choice in THRESHOLDS if block.get(choice)):
                found = block[choice]
                healthy = found["healthy"]
                row = (
                    with_interval(found["dice"], found["dice_interval"]),
                    _value(found["lesions_found"], ".2f"),
                    _value(found["false_positives"], ".1f"),
                    with_interval(healthy["marked_share"], healthy["marked_share_interval"]),
                    _value(healthy["false_positives"], ".1f"),
                    with_interval(detection["auroc"], detection["auroc_interval"]),
                )
                rows[(method, choice, *row)] = None
    counts = runs[0]["by_subject"]
    header = ("by subject", "threshold", "Dice", "lesions found", "FP/scan", "healthy brain marked", "FP/healthy scan")
    return "\n".join(
        [
            *_aligned((*header, "detection AUROC"), *rows),
            f"{counts['n_subjects']} test subjects: {counts['n_with_lesion']} with a lesion in their slices, "
            f"{counts['n_healthy']} healthy",
            "Dice: mean over subjects with a lesion; lesions found: share of all lesions; FP: marked components that "
            "touch no lesion; detection: of subjects with a lesion",
        ]
    )


def describe_members(members: Sequence[Mapping[str, Any]]) -> str:
    """Describe a combined run in one line; `members` is as in metrics.json."""
    return f"sum of the chosen scores of {' + '.join(TITLES.get(one['method'], 'intensity') for one in members)}"


def describe_score(settings: Mapping[str, Any]) -> str:
    """Describe a score in one line; `settings` is as in metrics.json."""
    width, filters = settings["width"], {"gaussian": "Gaussian σ", "median": "median half-width", "none": "unsmoothed"}
    words = [
        {"both": "errors of both signs", "bright": "bright errors", "dark": "dark errors"}[settings["sign"]],
        settings["norm"],
        "calibrated" if settings["calibration"] != "none" else "",
        {"scan": "scans matched", "affine": "scans matched and rescaled", "none": ""}[settings["match"]],
        filters[settings["smoothing"]] + (f" {width:.3g} of the slice" if width else ""),
        "pixels outside the brain ignored" if settings["outside"] == "left_out" else "",
        f"averaged over neighbouring slices (σ {settings['neighbours']:g})" if settings["neighbours"] else "",
        f"brain without a rim of {settings['rim']:g} px (at 128 px)" if settings["rim"] else "whole brain",
    ]
    return ", ".join(filter(None, words))


def intensity_name(metrics: Mapping[str, Any]) -> str:
    """Return the name of the intensity baseline in tables and figures."""
    return f"{'inverted ' if metrics['baseline_intensity']['sign'] < 0 else ''}intensity ({metrics['input']})"


def size_table(metrics: Mapping[str, Any]) -> str:
    """Format a table of one test run (contents of metrics.json) by lesion size."""
    rows = []
    methods = {intensity_name(metrics): metrics["baseline_intensity"], TITLES[metrics["method"]]: metrics}
    for size in metrics["by_lesion_size"]:
        for method, block in methods.items():
            third = block["by_lesion_size"][size]
            bounds = "{} … {} px".format(*third["area_bounds"]) if third["area_bounds"] else "none"
            values = [
                _value(third[f"{choice}_dice"]) if f"{choice}_dice" in third else _missing(block, choice)
                for choice in THRESHOLDS
            ]
            values = [_value(third["auprc"]), *values]
            rows.append((size, bounds, str(third["n_slices"]), method, *values))
    header = ("lesions", "area", "slices", "method", "mean AUPRC", *DICE_COLUMNS)
    return "\n".join(_aligned(header, *rows))


def comparison(run_a: Path, run_b: Path) -> str:
    """Format a table of the differences between two test runs on the same slices: a paired bootstrap of every metric.

    Raises:
        UserError: if a per_slice.csv is missing or damaged, or the runs differ in slices or lesions.
    """
    from .metrics import paired_bootstrap

    a, b = read_per_slice(run_a), read_per_slice(run_b)
    if set(a) != set(b):
        raise UserError(
            f"{run_a} and {run_b} hold different slices ({len(set(a) - set(b))} of {len(a)} only in the first, "
            f"{len(set(b) - set(a))} of {len(b)} only in the second): test both on the same data"
        )
    if kinds := changed_kinds(read_metrics(run_a), read_metrics(run_b)):
        raise UserError(f"{run_a} and {run_b} differ in their {' and '.join(kinds)} slices: test both on the same data")
    names = sorted(a)
    if any(a[name]["lesion_area"] != b[name]["lesion_area"] for name in names):
        raise UserError(f"{run_a} and {run_b} differ in lesion areas: test both at the same image size")
    rows = []
    for metric in (key for key in a[names[0]] if key != "lesion_area" and key in b[names[0]]):
        values = np.array([[rows_of[name][metric] for name in names] for rows_of in (a, b)])
        difference, interval = paired_bootstrap(*values, subjects=[subject for subject, _ in names])
        n_paired = np.count_nonzero(~np.isnan(values).any(axis=0))
        low, high = (_value(bound, "+.3f") for bound in interval)
        rows.append((metric, _value(difference, "+.3f"), f"[{low}, {high}]", str(n_paired)))
    lines = [f"A: {run_a}", f"B: {run_b}", *_aligned(("metric", "A − B", "95 % interval", "slices"), *rows)]
    lines.append(
        "means over slices where both are defined; paired bootstrap over subjects with fixed thresholds; lower is "
        "better for the distances assd and hd95"
    )
    return "\n".join(lines)


def _aligned(*rows: Sequence[str]) -> list[str]:
    """Return the lines of a table with aligned columns; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *body = rows
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, tuple("─" * width for width in widths), *body)
    ]


def _scores(block: Mapping[str, Any]) -> tuple[str, ...]:
    dice = (
        with_interval(block[choice]["dice"], block[choice]["dice_interval"])
        if block.get(choice)
        else _missing(block, choice)
        for choice in THRESHOLDS
    )
    return with_interval(block["auprc"], block["auprc_interval"]), *dice


def _missing(block: Mapping[str, Any], choice: str) -> str:
    """Return why a block of metrics.json has no scores at a threshold."""
    if choice not in block:
        return "not computed"  # by an earlier version
    return "no val lesions" if choice == "validation" and block.get("healthy") else "no val slices"


def with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    """Format a value with its interval, `0.585 [0.461, 0.702]`, or without it if either is undefined."""
    return _value(value) + ("" if value is None or None in interval else " [{:.3f}, {:.3f}]".format(*interval))


def _value(value: float | None, spec: str = ".3f") -> str:
    return "undefined" if value is None or math.isnan(value) else format(value, spec)


def same_test_set(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two runs were scored on the same test slices, as far as their metrics.json tell."""
    return all(run[key] == other[key] for key in ("n_slices", "image_size")) and not changed_kinds(run, other)


def main() -> None:
    parser = ArgumentParser(prog="python -m evaluation.tables", description="Print one table for several test runs.")
    parser.add_argument("results", nargs="+", type=local_path, help="results folders, such as experiments/results/RUN")
    folders = parser.parse_args().results
    groups: list[list[dict[str, Any]]] = []
    for metrics in map(read_metrics, folders):
        known = next((group for group in groups if same_test_set(group[0], metrics)), None)
        if known is None:
            groups.append(known := [])
        known.append(metrics)
    if len(groups) > 1:
        print(f"warning: {len(groups)} different test sets, a table for each: do not compare scores between tables\n")
    for i, runs in enumerate(groups):
        if i > 0:
            print()
        print(table(runs))
        if with_subjects := [metrics for metrics in runs if metrics.get("by_subject")]:
            print(f"\n{subject_table(with_subjects)}")
    for folder in folders:
        print(f"figures: {folder / 'figures'}")


if __name__ == "__main__":
    run(main)

"""Report of a test run: scores of its error maps, figures, TensorBoard events and printed tables."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from .choice import Choice, choose, intensity_grid, slices_to_choose_on
from .evaluate import Evaluation, ScoredSlices, by_lesion_size, evaluate_parts
from .figures import draw_scores, write_figures
from .metrics import RIM, average_precision, ranked_scores
from .results import HEALTHY, REFERENCE, THRESHOLDS, TITLES, Maps, Part, Parts, write_scores
from .scores import (
    BRIGHT_LESIONS,
    CONTRAST_WARNING,
    ScoreSettings,
    anomaly_map,
    fit_match,
    intensity_maps,
    reference_maps,
    smooth_scores,
    unusual_contrasts,
)
from .tables import intensity_name, size_table, subject_table, table

EVENTS = "events.out.tfevents.*"
PR_POINTS = 127  # of a precision-recall curve in TensorBoard, which shows no more


def score_maps(
    results: Path,
    run: Mapping[str, Any],
    maps: Maps,
    address: str,
    grid: Sequence[ScoreSettings],
    healthy_share: float,
) -> None:
    """Score error maps; write metrics.json, the tables, figures and TensorBoard events, and print the tables.

    Args:
        results: the folder to write to.
        run, maps: as for `write_maps`.
        address: the results folder's name in printed messages.
        grid: the scores to choose from on validation slices, in addition to the published score.
        healthy_share: of the healthy validation pixels, marked at the threshold `healthy`.
    """
    for split, parts in maps.items():
        warn_non_finite(parts, split)
    smooth = run["sampling_settings"]["smooth"]
    sign = better_sign(slices_to_choose_on(maps.get("val", maps["test"])))
    choices = choose_scores(run, maps, grid, sign)
    scores = score_functions(smooth, sign, choices)
    rims = {"scores": run.get("rim", RIM), "intensity": RIM} | ({"unsmoothed": RIM} if smooth != "none" else {})
    rims |= {key: choice.settings.rim for key, choice in choices.items()}
    evaluations, blocks = {}, {}
    for key, rim in rims.items():
        test, val = (scored(maps[split], scores[key]) if split in maps else None for split in ("test", "val"))
        options = {"rim": rim, "healthy_share": healthy_share, "voxel_size": run.get("voxel_size")}
        evaluations[key] = evaluate_parts(test, val, **options, label=f"evaluating {key}")
        blocks[key] = evaluations[key].summary | {"by_lesion_size": by_lesion_size(evaluations[key].per_slice)}
    for key, choice in choices.items():
        blocks[key] |= {"settings": choice.settings._asdict(), "constants": choice.constants._asdict()}
        blocks[key]["selection"] = choice.selection
    metrics = {**run, **blocks["scores"], "unsmoothed": blocks.get("unsmoothed"), "chosen": blocks.get("chosen")}
    metrics["baseline_intensity"] = {**blocks["intensity"], "sign": sign, "chosen": blocks.get("chosen_intensity")}
    names = {"scores": TITLES[run["method"]], "intensity": intensity_name(metrics)}
    names |= {"chosen": f"{names['scores']}, chosen", "chosen_intensity": f"{names['intensity']}, chosen"}
    named = {name: evaluations[key] for key, name in names.items() if key in rims}
    per_slice, per_subject = dict(evaluations["scores"].per_slice), dict(evaluations["scores"].per_subject)
    if choices:
        per_slice |= chosen_columns(evaluations["chosen"].per_slice)
        per_subject |= chosen_columns(evaluations["chosen"].per_subject)
    write_scores(results, metrics, [name for part in maps["test"] for name in part["names"]], per_slice, per_subject)
    shown = {key: scored(maps["test"], scores[key]) for key in ("scores", "chosen") if key in rims}
    write_figures(results / "figures", draw_scores(maps["test"], shown, metrics, per_slice, per_subject, named))
    write_events(results, metrics, named)
    tables = [table([metrics])]
    tables += [size_table(metrics)] if metrics["n_slices"] >= 3 else []
    tables += [subject_table([metrics])] if metrics["by_subject"] else []
    print("\n" + "\n\n".join([*tables, f"results: {address}\nfigures: {address}/figures"]))


def score_functions(smooth: str, sign: int, choices: Mapping[str, Choice]) -> dict[str, Callable[[Part], np.ndarray]]:
    """Return functions from a part to its scores [n, H, W]: the published ones, the intensity, and the chosen ones."""
    functions = {
        "scores": lambda part: smooth_scores(part["scores"], smooth),
        "unsmoothed": lambda part: part["scores"],
        "intensity": lambda part: sign * part["image"],
    }
    if choices:
        side = choices["chosen_intensity"].settings.sign
        of_maps = {"chosen": reference_maps, "chosen_intensity": partial(intensity_maps, sign=side)}
        for key, prepare in of_maps.items():
            functions[key] = partial(chosen_scores, prepare, choices[key])
    return functions


def chosen_scores(prepare: Callable[[Part], Part], choice: Choice, part: Part) -> np.ndarray:
    """Return the chosen score of a part [n, H, W]; `prepare` returns the maps that it is computed from."""
    return anomaly_map(prepare(part), choice.settings, choice.constants)


def scored(parts: Sequence[Part], score: Callable[[Part], np.ndarray]) -> Parts[ScoredSlices]:
    """Return the parts of a split with a score, computed when they are indexed."""

    def load(i: int) -> ScoredSlices:
        part = parts[i]
        return ScoredSlices(score(part), part["truth"], part["brainmask"], part["names"], part[HEALTHY])

    return Parts(load, len(parts))


def chosen_columns(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the columns of the chosen score under their names in the tables, without those that no score changes."""
    fixed = ("lesion_area", "subject", "healthy", "n_slices", "lesion_voxels", "n_lesions")
    return {f"chosen_{key}": values for key, values in columns.items() if key not in fixed}


def choose_scores(run: Mapping[str, Any], maps: Maps, grid: Sequence[ScoreSettings], sign: int) -> dict[str, Choice]:
    """Choose a score of the error maps and one of the intensity on validation slices, or else on training slices.

    Returns:
        The choices, `chosen` and `chosen_intensity`; empty for combined runs, without slices to choose on, and for
        one-way runs whose error maps lack the target modality.
    """
    source = next((split for split in ("val", "train") if split in maps), None)
    one_way = run["method"].startswith("one_way")
    if run["method"] == "combined":
        return {}
    if source is None or (one_way and REFERENCE not in maps[source][0]):
        missing = "target modality" if source else "validation or training slices"
        print(f"no score can be chosen because the error maps hold no {missing}: run modality_cyclic_test.py again")
        return {}
    chosen_on = slices_to_choose_on(maps[source])
    reference = reference_maps(chosen_on)
    usual = fit_match(reference, "scan")
    for parts in maps.values():
        for part in parts:
            for name, slope in unusual_contrasts(reference_maps(part), usual).items():
                print(CONTRAST_WARNING.format(name, slope))
    if not (chosen_on["truth"] & chosen_on["brainmask"]).any():
        sign = 1 if run["input"] in BRIGHT_LESIONS else -1
        print(f"no lesions in the {source} slices: using the robust score instead of choosing one (docs/scores.md)")
    side, alternatives = intensity_grid(grid, "bright" if sign > 0 else "dark")
    intensity, modality = intensity_maps(chosen_on, side), run["trans" if one_way else "input"]
    return {
        key: choose(group, options, modality, f"choosing on {source}")
        for key, group, options in (
            ("chosen", reference, grid),
            ("chosen_intensity", intensity, alternatives),
        )
    }


def warn_non_finite(parts: Sequence[Part], split: str) -> None:
    """Print how many scores are not finite, and the first slice with such scores."""
    n_scores, slices = 0, []
    for part in parts:
        broken = ~np.isfinite(part["scores"]) & part["brainmask"]
        n_scores += np.count_nonzero(broken)
        slices += np.array(part["names"])[broken.any(axis=(1, 2))].tolist()
    if slices:
        print(f"warning: {n_scores} scores in {len(slices)} {split} slices are not finite, first in {slices[0]}")


def better_sign(group: Part) -> int:
    """Return the sign, 1 or −1, with which the input intensity has the higher AUPRC; −1 means dark lesions."""
    auprc = {
        sign: average_precision(*ranked_scores(sign * group["image"], group["truth"], group["brainmask"]))
        for sign in (1, -1)
    }
    return -1 if auprc[-1] > auprc[1] else 1


def write_events(results: Path, metrics: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> None:
    """Write the figures, precision-recall curves and hyperparameters of a test run for TensorBoard.

    `evaluations` are keyed by the name of each curve.
    """
    settings = {key: metrics[key] for key in ("method", "input", "trans", "image_size")}
    trained = {f"steps_{key}": steps for key, steps in metrics["trained_steps"].items() if steps is not None}
    scores = {"auprc": metrics["auprc"], "auroc": metrics["auroc"]}
    scores |= {f"{choice}_dice": metrics[choice]["dice"] for choice in THRESHOLDS if metrics[choice]}
    scores = {f"results/{key}": value for key, value in scores.items() if value is not None}
    with SummaryWriter(str(results)) as events:
        for path in sorted((results / "figures").glob("*.png")):
            events.add_image(path.stem, imread(path), dataformats="HWC")
        for name, (summary, per_slice, _, curves) in evaluations.items():
            precision, recall = curves["precision_recall"]
            n_lesion = per_slice["lesion_area"].sum()
            if n_lesion:
                points = np.linspace(0, len(recall) - 2, PR_POINTS).round().astype(int)  # the last has no prediction
                precision, recall = precision[points], recall[points]
                hits, healthy = recall * n_lesion, n_lesion / summary["chance"] - n_lesion
                false_positives = hits / np.maximum(precision, 1e-12) - hits
                counts = hits, false_positives, healthy - false_positives, n_lesion - hits
                tag = f"precision_recall/{name}"
                events.add_pr_curve_raw(tag, *counts, precision, recall, num_thresholds=PR_POINTS)
        events.add_hparams(settings | trained, scores, run_name=".")

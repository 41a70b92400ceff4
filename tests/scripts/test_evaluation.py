"""modality_cyclic_test.py without a model: `--rescore`, `--compare` and `--combine`."""

import csv
import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.results import MAPS, THRESHOLDS, chosen_score, write_maps
from evaluation.scores import anomaly_map, intensity_maps
from tests.evaluation.conftest import evaluate
from tests.scripts.conftest import expect_refusal

pytestmark = pytest.mark.xdist_group("evaluation")  # one process, so that the runs are scored once

TEST = "modality_cyclic_test.py"
RUN = {
    "method": "cyclic_unet",
    "input": "flair",
    "trans": "t2",
    "image_size": 32,
    "checkpoints": {"forward": "there/forward.pt", "backward": "back/backward.pt"},
    "trained_steps": {"forward": 4, "backward": None},
    "sampling_settings": {"smooth": "none"},
    "score": "errors",
    "usual_error": 1.0,
}
N_TEST = 7
FIGURES = {"slices", "chosen_slices", "precision_recall", "dice_threshold", "histograms"}


def make_maps(n_slices: int, quality: float, seed: int) -> dict[str, np.ndarray]:
    """Return slices of noise, each with a lesion whose error is raised by `quality`."""
    rng = np.random.default_rng(seed)
    brainmask = np.zeros((n_slices, 32, 32), bool)
    brainmask[:, 4:28, 4:28] = True
    truth = np.zeros_like(brainmask)
    for i in range(n_slices):
        truth[i, 10 : 13 + i, 10:15] = True
    image, reconstruction = rng.normal(size=(2, n_slices, 32, 32)).astype(np.float32)
    return {
        "names": np.array([f"S_{i:02d}_80" for i in range(n_slices)]),
        "image": image + truth,
        "translation": reconstruction,
        "reconstruction": reconstruction,
        "variance": np.zeros_like(image),
        "scores": ((image - reconstruction + quality * truth) ** 2).astype(np.float32),
        "truth": truth,
        "brainmask": brainmask,
    }


def write_part(path: Path, run: dict, maps: dict[str, dict]) -> None:
    """Write splits of a single part each."""
    write_maps(path, run, {split: [part] for split, part in maps.items()})


def write_run(folder, quality: float = 2.0, seed: int = 0, n_test: int = N_TEST) -> None:
    maps = {"test": make_maps(n_test, quality, seed), "val": make_maps(3, quality, seed + 1)}
    folder.mkdir(exist_ok=True)
    write_part(folder / "error_maps.npz", RUN, maps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, in_process):
    """A folder with three scored runs; `fewer` lacks a slice."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "good", quality=5)
    write_run(folder / "poor", quality=1, seed=5)
    write_run(folder / "fewer", n_test=N_TEST - 1)
    for name in ("good", "poor", "fewer"):
        done = in_process(TEST, "--rescore", name, cwd=folder)
        assert done.code == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def rescored(runs, in_process):
    """Score `good` again, given its error_maps.npz instead of its folder."""
    before = {name: (runs / "good" / name).read_bytes() for name in ("metrics.json", "per_slice.csv")}
    done = in_process(TEST, "--rescore", "good/error_maps.npz", cwd=runs)
    assert done.code == 0, done.stderr
    assert {name: (runs / "good" / name).read_bytes() for name in before} == before
    return done


def read_metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def read_column(folder, column: str) -> np.ndarray:
    with (folder / "per_slice.csv").open(encoding="utf-8") as file:
        return np.array([float(row[column]) for row in csv.DictReader(file)])


# ----------------------------------------------------------------------------------------------------------
# Rescoring


def test_rescoring_keeps_the_run_and_writes_all_results(runs, rescored):
    files = {path.name for path in (runs / "good").iterdir() if not path.name.startswith("events")}
    assert files == {"error_maps.npz", "figures", "metrics.json", "per_slice.csv"}
    metrics = read_metrics(runs / "good")
    assert {key: metrics[key] for key in RUN} == RUN
    assert metrics["n_slices"] == N_TEST
    assert "Cyclic UNet" in rescored.stdout


def test_the_table_by_lesion_size(runs, rescored):
    area, metrics = read_column(runs / "good", "lesion_area"), read_metrics(runs / "good")
    order = np.argsort(area)
    assert len(set(area)) == N_TEST
    members = {"small": order[:3], "medium": order[3:5], "large": order[5:]}
    for size, third in members.items():
        block = metrics["by_lesion_size"][size]
        values = [read_column(runs / "good", key)[third].mean() for key in ("auprc", "oracle_dice")]
        assert [block["auprc"], block["oracle_dice"]] == pytest.approx(values, rel=1e-4)
        bounds = f"{area[third].min():.0f} … {area[third].max():.0f} px"
        for method, shown in (("Cyclic UNet", block), ("intensity", third_of_baseline(metrics, size))):
            (row,) = [line for line in rescored.stdout.splitlines() if re.match(f"{size} .*{method}", line)]
            assert bounds in row
            assert int(row.split("px")[1].split()[0]) == len(third)
            cells = [f"{shown[key]:.3f}" for key in ("auprc", *(f"{choice}_dice" for choice in THRESHOLDS))]
            assert row.split()[-4:] == cells
    for block in (metrics, metrics["baseline_intensity"]):  # the total is the thirds' weighted mean
        thirds = block["by_lesion_size"].values()
        total = sum(third["n_slices"] * third["auprc"] for third in thirds)
        assert total / N_TEST == pytest.approx(block["auprc_per_slice_mean"])


def third_of_baseline(metrics: dict, size: str) -> dict:
    return metrics["baseline_intensity"]["by_lesion_size"][size]


def test_tensorboard_has_figures_curves_and_scalars(runs, rescored):
    """Each appears once, although the run was scored twice."""
    accumulator = EventAccumulator(str(runs / "good"))
    accumulator.Reload()
    tags = accumulator.Tags()
    figures = {path.stem for path in (runs / "good/figures").iterdir()}
    assert set(tags["images"]) == figures == FIGURES
    assert all(len(accumulator.Images(tag)) == 1 for tag in figures)
    assert len([tag for tag in tags["tensors"] if "precision_recall/" in tag]) == 4
    (event,) = accumulator.Scalars("results/validation_dice")
    assert event.value == pytest.approx(read_metrics(runs / "good")["validation"]["dice"])


def contents(folder) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_full_disk_leaves_the_earlier_results(in_process, tmp_path):
    """Limits on the file size simulate a disk that fills up at several points of the run."""
    write_run(tmp_path / "run")
    rescore = functools.partial(in_process, TEST, "--rescore", tmp_path / "run", cwd=tmp_path, pictures=True)
    assert rescore().code == 0
    before, unlimited = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 4_000, 30_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            done = rescore()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert done.code == 2, done.stderr
        assert done.stderr.endswith("run cannot be written to (File too large): check --rescore\n")
        assert contents(tmp_path) == before
    assert rescore().code == 0
    kept = [name for name in before if "tfevents" not in name.name]
    assert {name: contents(tmp_path)[name] for name in kept} == {name: before[name] for name in kept}


def test_maps_in_parts_are_scored_as_one(runs, in_process, tmp_path):
    maps = {"test": make_maps(N_TEST, 5, 0), "val": make_maps(3, 5, 1)}
    rows = {"test": (slice(0, 3), slice(3, 4), slice(4, None)), "val": (slice(0, 1), slice(1, None))}
    parts = {
        split: [{key: array[of_part] for key, array in group.items()} for of_part in rows[split]]
        for split, group in maps.items()
    }
    write_maps(tmp_path / "error_maps.npz", RUN, parts)
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path, pictures=True)
    assert done.code == 0, done.stderr
    assert read_metrics(tmp_path) == read_metrics(runs / "good")
    assert (tmp_path / "per_slice.csv").read_text() == (runs / "good/per_slice.csv").read_text()
    with np.load(tmp_path / "error_maps.npz") as file:
        stored = np.concatenate([file[f"test_scores{suffix}"] for suffix in ("", "_1", "_2")])
    np.testing.assert_array_equal(stored, maps["test"]["scores"])


@pytest.mark.parametrize("key", ["scores", "image", "truth", "names"])
def test_a_damaged_later_part_leaves_the_earlier_results(in_process, tmp_path, key):
    write_run(tmp_path)
    assert in_process(TEST, "--rescore", tmp_path, cwd=tmp_path).code == 0
    before = contents(tmp_path)
    del before[Path("error_maps.npz")]
    parts = [make_maps(N_TEST, 2.0, seed) for seed in (0, 1)]
    parts[1][key] = parts[1][key][:2] if key == "names" else parts[1][key].astype(np.int8)
    write_maps(tmp_path / "error_maps.npz", RUN, {"test": parts})
    expect_refusal(
        in_process(TEST, "--rescore", tmp_path, cwd=tmp_path), "cannot be scored", "run modality_cyclic_test"
    )
    after = contents(tmp_path)
    assert {path: after[path] for path in before} == before


def test_maps_in_half_precision_are_scored(in_process, tmp_path):
    maps = make_maps(N_TEST, 2.0, 0)
    half = {key: array.astype(np.float16) if array.dtype.kind == "f" else array for key, array in maps.items()}
    write_part(tmp_path / "error_maps.npz", RUN, {"test": half, "val": half})
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path)
    assert done.code == 0, done.stderr
    exact = evaluate(maps["scores"], maps["truth"], maps["brainmask"], n_resamples=10).summary["auprc"]
    assert read_metrics(tmp_path)["auprc"] == pytest.approx(exact, abs=1e-3)


SPOILT = {
    "truth of whole numbers": {"truth": lambda truth: truth.astype(np.int64)},
    "no brain": {"brainmask": np.zeros_like},
    "a brain mask of floats": {"brainmask": lambda mask: mask.astype(np.float32)},
    "scores of words": {"scores": lambda scores: scores.astype(str)},
    "nothing finite": {"scores": lambda scores: scores * np.nan},
    "a method that nobody knows": {"method": "unet"},
    "a score that nobody knows": {"score": "error"},
    "test maps of another size than those of validation": {key: lambda array: array[:, 1:] for key in MAPS},
}


@pytest.mark.parametrize("how", SPOILT)
def test_invalid_error_maps_leave_the_earlier_results(runs, in_process, tmp_path, how):
    shutil.copytree(runs / "good", tmp_path, dirs_exist_ok=True)
    maps = {split: make_maps(n, 2.0, n) for split, n in (("test", N_TEST), ("val", 3))}
    run = RUN
    for key, spoil in SPOILT[how].items():
        if key in RUN:
            run = RUN | {key: spoil}
        else:
            maps["test"][key] = spoil(maps["test"][key])
    write_part(tmp_path / "error_maps.npz", run, maps)
    before = contents(tmp_path)
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path)
    expect_refusal(done, "error_maps.npz")
    assert contents(tmp_path) == before


def test_scores_that_are_not_finite_are_counted_and_located(in_process, tmp_path):
    maps = make_maps(N_TEST, 2.0, 0)
    maps["scores"][2, 10, 10:13], maps["scores"][5, 11, 11], maps["scores"][5, 0, 0] = np.nan, np.inf, np.nan
    write_part(tmp_path / "error_maps.npz", RUN, {"test": maps})
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path, pictures=True)
    assert done.code == 0, done.stderr
    assert "warning: 4 scores in 2 test slices are not finite, first in S_02_80\n" in done.stdout


@pytest.mark.parametrize("n_test", [1, 2])
def test_one_or_two_slices_are_not_split_by_lesion_size(in_process, tmp_path, n_test):
    write_run(tmp_path, n_test=n_test)
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path, pictures=True)
    assert done.code == 0, done.stderr
    assert "large" not in done.stdout
    assert ("bootstrap interval" in done.stdout) == (n_test == 2)


def test_slices_without_any_lesion_are_scored(in_process, tmp_path):
    """For example, of healthy volunteers: undefined metrics are null."""
    maps = make_maps(N_TEST, 2.0, 0)
    maps["truth"][:] = False
    write_part(tmp_path / "error_maps.npz", RUN, {"test": maps})
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path, pictures=True)
    assert done.code == 0, done.stderr
    assert read_metrics(tmp_path)["lost_lesion_share"] is None
    assert "; no lesions\n" in done.stdout


def test_a_terminal_without_unicode(repository, tmp_path):
    write_run(tmp_path)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / TEST), "--rescore", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Cyclic UNet" in done.stdout


def test_without_validation_slices(in_process, tmp_path):
    write_part(tmp_path / "error_maps.npz", RUN, {"test": make_maps(3, 2.0, 0)})
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path, pictures=True)
    assert done.code == 0, done.stderr
    assert read_metrics(tmp_path)["validation"] is None
    assert len(re.findall("no val slices", done.stdout)) == 2 * (
        2 + 2 * 3
    )  # two thresholds in both tables, both methods


def without(key: str):
    """Return a function that removes an array from a file of error maps."""

    def spoil(path) -> None:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file if name != key}
        np.savez_compressed(path, **arrays)

    return spoil


def cut_a_slice(path) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    arrays["test_truth"] = arrays["test_truth"][1:]
    np.savez_compressed(path, **arrays)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:2000]),
        lambda path: path.write_text("no error maps"),
        without("run"),
        without("test_scores"),
        cut_a_slice,
    ],
    ids=["missing", "cut off", "text", "no description", "no scores", "shapes differ"],
)
def test_damaged_error_maps_are_refused(in_process, tmp_path, spoil):
    write_run(tmp_path)
    spoil(tmp_path / "error_maps.npz")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path)
    expect_silent_refusal(done, "error_maps.npz")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def expect_silent_refusal(done, *phrases: str) -> None:
    expect_refusal(done, f"{TEST}: error: ", *phrases)
    assert done.stdout == ""


# ----------------------------------------------------------------------------------------------------------
# Comparing


def test_comparison_has_a_line_for_every_metric(runs, in_process):
    done = in_process(TEST, "--compare", "good", "poor", cwd=runs)
    assert done.code == 0, done.stderr
    found = re.findall(r"^(\w+) +([+-]\d\.\d{3}) +\[([+-]\d+\.\d{3}), ([+-]\d+\.\d{3})\] +(\d+)$", done.stdout, re.M)
    lines = {metric: (float(d), float(low), float(high), int(n)) for metric, d, low, high, n in found}
    kinds = ("dice", "jaccard", "sensitivity", "precision", "assd", "hd95")
    named = {f"{choice}_{kind}" for choice in THRESHOLDS for kind in kinds} | {"auprc"}
    named |= {f"chosen_{name}" for name in named}
    assert named == {line.split()[0] for line in done.stdout.splitlines()[4:-1]}
    for metric in ("auprc", "oracle_dice", "validation_dice"):
        difference, low, high, n_slices = lines[metric]
        expected = read_column(runs / "good", metric) - read_column(runs / "poor", metric)
        assert difference == pytest.approx(expected.mean(), abs=1e-3)
        assert 0 < low < difference < high  # `good` is better, and seven slices are enough to show it
        assert n_slices == N_TEST


def test_comparison_pairs_slices_by_name_not_by_order(runs, in_process, tmp_path):
    lines = (runs / "poor/per_slice.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "per_slice.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n", encoding="utf-8")
    shutil.copy(runs / "poor/metrics.json", tmp_path)
    done, shuffled = (in_process(TEST, "--compare", runs / "good", b, cwd=runs) for b in ("poor", tmp_path))
    assert shuffled.stdout.splitlines()[2:] == done.stdout.splitlines()[2:]


def test_a_run_does_not_differ_from_itself(runs, in_process):
    done = in_process(TEST, "--compare", "good", "good", cwd=runs)
    rows = done.stdout.splitlines()[4:-1]
    assert len(rows) == 38
    for row in rows:
        assert row.split()[1:4] == ["+0.000", "[+0.000,", "+0.000]"]


@pytest.mark.parametrize(
    ("spoil", "phrase"),
    [
        (lambda path: path.unlink(), "no per_slice.csv in spoilt"),
        (lambda path: path.write_text(""), "spoilt/per_slice.csv is damaged"),
        (lambda path: path.write_text("subject,slice,auprc\nS,80,0.5\n"), "spoilt/per_slice.csv is damaged"),
        (lambda path: path.write_text(path.read_text() + "S,81,many"), "spoilt/per_slice.csv is damaged"),
        (lambda path: path.write_text(path.read_text().replace(",15,", ",16,")), "image size"),
    ],
    ids=["missing", "empty", "no lesion area", "no numbers", "other truth"],
)
def test_invalid_comparisons_are_refused(runs, in_process, tmp_path, spoil, phrase):
    for name in ("good", "spoilt"):
        (tmp_path / name).mkdir()
        for file in ("per_slice.csv", "metrics.json"):
            shutil.copy(runs / "good" / file, tmp_path / name)
    spoil(tmp_path / "spoilt/per_slice.csv")
    expect_silent_refusal(in_process(TEST, "--compare", "good", "spoilt", cwd=tmp_path), phrase)


def test_runs_of_different_slices_are_not_compared(runs, in_process):
    done = in_process(TEST, "--compare", "good", "fewer", cwd=runs)
    expect_silent_refusal(done, "good and fewer", "different slices", "1 of 7", "0 of 6")


@pytest.mark.parametrize("kind", ["flair", "seg"])
def test_runs_of_slices_with_other_contents_are_neither_compared_nor_combined(in_process, tmp_path, kind):
    contents = {"flair": "1", "seg": "2", "brainmask": "3"}
    for name, changed in (("a", {}), ("b", {}), ("c", {kind: "4"})):
        (tmp_path / name).mkdir()
        maps = {"test": make_maps(N_TEST, 2.0, 0), "val": make_maps(3, 2.0, 1)}
        write_part(tmp_path / name / "error_maps.npz", RUN | {"test_set": contents | changed}, maps)
        assert in_process(TEST, "--rescore", name, cwd=tmp_path).code == 0
    for flag in ("--compare", "--combine"):
        assert in_process(TEST, flag, "a", "b", cwd=tmp_path).code == 0
        done = in_process(TEST, flag, "a", "c", cwd=tmp_path)
        expect_refusal(done, f"a and c differ in their {kind} slices: test both on the same data")


def test_rescore_and_compare_exclude_each_other(runs, in_process):
    done = in_process(TEST, "--compare", "good", "poor", "--rescore", "good", cwd=runs)
    expect_silent_refusal(done, "--rescore", "--compare")


def test_comparing_does_not_import_torch(runs, repository):
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print(sorted({'torch', 'monai', 'matplotlib'} & set(sys.modules))))\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [str(repository / TEST), "--compare", "good", "poor"]
    start = f"import sys; sys.argv = {arguments!r}; sys.path.insert(0, {str(repository)!r})\n"
    done = subprocess.run([sys.executable, "-c", start + code], cwd=runs, capture_output=True, text=True, check=True)
    assert "oracle_dice" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# ----------------------------------------------------------------------------------------------------------
# The chosen score

BLOCK = {"auprc", "auprc_interval", "oracle", "validation", "settings", "constants", "selection"}


def test_the_chosen_score_is_reported_beside_the_published_one(runs, rescored):
    metrics = read_metrics(runs / "good")
    baseline = metrics["baseline_intensity"]
    for block in (metrics["chosen"], baseline["chosen"]):
        assert block.keys() >= BLOCK
        assert block["validation"]["dice"] <= block["oracle"]["dice"] <= 1
    maps = make_maps(N_TEST, 5, 0)
    published = evaluate(maps["scores"], maps["truth"], maps["brainmask"]).summary
    del published["validation"], published["healthy"]
    assert {key: metrics[key] for key in published} == published
    rows = [line.split("  ")[0] for line in rescored.stdout.splitlines() if line.startswith(("intensity", "Cyclic"))]
    assert rows[:4] == ["intensity (flair)", "intensity (flair), chosen", "Cyclic UNet", "Cyclic UNet, chosen"]
    columns = (read_column(runs / "good", f"{prefix}auprc") for prefix in ("", "chosen_"))
    for values, block in zip(columns, (metrics, metrics["chosen"]), strict=True):
        assert values.mean() == pytest.approx(block["auprc_per_slice_mean"], rel=1e-4)


FIXED = {"sign": "dark", "norm": "squared", "match": "none", "smoothing": "median", "rim": "2"}


def fixed(**options: str) -> list[str]:
    return [f"--config.score_model.scoring.{key}={value}" for key, value in options.items()]


def test_options_that_the_user_fixes_are_kept(in_process, tmp_path):
    write_run(tmp_path)
    done = in_process(TEST, "--rescore", tmp_path, *fixed(**FIXED), cwd=tmp_path)
    assert done.code == 0, done.stderr
    settings = read_metrics(tmp_path)["chosen"]["settings"]
    assert {key: str(settings[key]) for key in FIXED} == FIXED | {"rim": "2.0"}
    assert read_metrics(tmp_path)["baseline_intensity"]["chosen"]["settings"]["sign"] == "dark"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sign": "up"}, "score_model.scoring.sign='up' is unknown: choose one of bright, dark, both"),
        ({"rim": "0,many"}, "score_model.scoring.rim='many' is not a number from 0 to 32"),
        ({"sgin": "both"}, "did you mean 'score_model.scoring.sign'?"),
    ],
)
def test_unknown_score_options_are_refused_before_any_output(in_process, tmp_path, options, said):
    write_run(tmp_path)
    before = contents(tmp_path)
    expect_silent_refusal(in_process(TEST, "--rescore", tmp_path, *fixed(**options), cwd=tmp_path), said)
    assert contents(tmp_path) == before


def spoilt_val(how: str) -> dict:
    val = make_maps(3, 2.0, 1)
    if how == "without a lesion":
        val["truth"][:] = False
    elif how == "of one slice":
        val = {key: values[:1] for key, values in val.items()}
    elif how == "of one subject":
        val["names"] = np.array([f"S_{i}" for i in (70, 71, 75)])
    elif how == "with NaN":
        val["reconstruction"][1, 10:20, 10:20] = np.nan
    elif how == "without a healthy pixel":
        val["truth"] = val["brainmask"].copy()
    return val


@pytest.mark.parametrize(
    "how", ["without a lesion", "of one slice", "of one subject", "with NaN", "without a healthy pixel"]
)
def test_uninformative_validation_slices(in_process, tmp_path, how):
    write_part(tmp_path / "error_maps.npz", RUN, {"test": make_maps(N_TEST, 2.0, 0), "val": spoilt_val(how)})
    done = in_process(TEST, "--rescore", tmp_path, *fixed(rim="0"), cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "Warning" not in done.stderr
    chosen = read_metrics(tmp_path)["chosen"]
    assert chosen["settings"]["norm"] != "standardised"  # it needs several draws
    if how == "without a lesion":
        assert chosen["selection"] is None
        assert chosen["settings"]["sign"] == "bright"
        assert chosen["validation"] is read_metrics(tmp_path)["validation"] is None
        assert "no lesions in the val slices: using the robust score" in done.stdout
    elif how == "of one subject":
        assert chosen["selection"]["resampled"] == "slices"
    assert 0 <= chosen["auprc"] <= 1


@pytest.mark.parametrize(("rim", "null"), [("0", "published"), ("16", "chosen")])
def test_one_score_of_two_has_validation_lesions_in_its_region(in_process, tmp_path, rim, null):
    """They are on the rim that this score leaves out, and the threshold `healthy` takes the place of `validation`."""
    test, val = make_maps(N_TEST, 2.0, 0), make_maps(3, 2.0, 1)
    val["truth"][:] = val["brainmask"]
    val["truth"][:, 5:27, 5:27] = False
    if null == "chosen":
        val["truth"][:, 6, 6:26] = True
    write_part(tmp_path / "error_maps.npz", RUN, {"test": test, "val": val})
    done = in_process(TEST, "--rescore", tmp_path, *fixed(rim=rim), cwd=tmp_path, pictures=True)
    assert done.code == 0, done.stderr
    metrics = read_metrics(tmp_path)
    blocks = {"published": metrics, "chosen": metrics["chosen"]}
    assert [name for name, block in blocks.items() if block["validation"] is None] == [null]
    assert all(block["healthy"] for block in blocks.values())
    assert "no val lesions" in done.stdout


def test_training_slices_calibrate_the_score_without_validation_slices(in_process, tmp_path):
    train = make_maps(5, 0.0, 3)
    train["truth"][:] = False
    for maps in ({}, {"train": train}):
        write_part(tmp_path / "error_maps.npz", RUN, {"test": make_maps(N_TEST, 2.0, 0), **maps})
        done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path)
        assert done.code == 0, done.stderr
        chosen = read_metrics(tmp_path)["chosen"]
        assert (chosen is None) == (not maps)
        assert ("no score can be chosen" in done.stdout) == (not maps)
    assert chosen["validation"] is None
    assert len(chosen["constants"]["usual"]) > 1


def test_one_way_scores_use_the_target_modality(in_process, tmp_path):
    run = RUN | {"method": "one_way_unet"}
    maps = {split: make_maps(n, 2.0, n) for split, n in (("test", N_TEST), ("val", 3))}
    write_part(tmp_path / "error_maps.npz", run, maps)
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path)
    assert "no score can be chosen" in done.stdout  # these maps lack the reference image
    assert read_metrics(tmp_path)["chosen"] is None
    found = []
    for scale in (1, 5):
        for group in maps.values():
            group["reference"] = (group["reconstruction"] + group["truth"]).astype(np.float32)
            group["image"] = scale * group["image"]
        write_part(tmp_path / "error_maps.npz", run, maps)
        assert in_process(TEST, "--rescore", tmp_path, *fixed(sign="bright", rim="0"), cwd=tmp_path).code == 0
        found.append(read_metrics(tmp_path)["chosen"]["auprc"])
    assert found[0] == found[1] > 0.9  # independent of the input image


def test_a_scan_with_unusual_contrast_is_named(in_process, tmp_path):
    maps = {split: make_maps(n, 2.0, n) for split, n in (("test", N_TEST), ("val", 3))}
    for group in maps.values():
        group["image"] = group["reconstruction"] + 0.1 * group["image"]
    maps["test"]["image"][2] *= 3
    write_part(tmp_path / "error_maps.npz", RUN, maps)
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path)
    assert re.findall(r"warning: (\w+) has (\d)\.\d+ times the usual contrast", done.stdout) in (
        [("S_02", "2")],
        [("S_02", "3")],
    )


def test_old_results_are_printed_and_compared(runs, in_process, tmp_path):
    """Earlier versions wrote no chosen score."""
    shutil.copytree(runs / "good", tmp_path / "old")
    metrics = read_metrics(tmp_path / "old")
    del metrics["chosen"], metrics["baseline_intensity"]["chosen"]
    (tmp_path / "old/metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    done = in_process("evaluation.tables", tmp_path / "old", runs / "poor", cwd=runs)
    assert done.code == 0, done.stderr
    assert done.stdout.count("Cyclic UNet, chosen  ") == 1


# ----------------------------------------------------------------------------------------------------------
# Combining runs


@pytest.fixture(scope="module")
def combined(runs, in_process):
    """Combine two runs of the same slices and the intensity; return the results folder and stdout."""
    folder = runs / "results"
    folder.mkdir()
    for name, quality in (("a", 2.0), ("b", 1.8)):
        (folder / name).mkdir()
        rng = np.random.default_rng(9 if name == "b" else 8)
        maps = {split: make_maps(n, quality, seed) for split, n, seed in (("test", N_TEST, 0), ("val", 3, 1))}
        for group in maps.values():  # independent errors of the same image
            noise = rng.normal(size=group["image"].shape)
            group["reconstruction"] = (group["image"] - quality * group["truth"] + noise).astype(np.float32)
        write_part(folder / name / "error_maps.npz", RUN, maps)
        assert in_process(TEST, "--rescore", folder / name, *fixed(rim="0"), cwd=runs).code == 0
    done = in_process(TEST, "--combine", folder / "a", folder / "b", "intensity", cwd=runs)
    assert done.code == 0, done.stderr
    (found,) = folder.glob("combined__*")
    return found, done.stdout


def test_a_combination_can_be_rescored_and_compared(combined, runs, in_process):
    folder, stdout = combined
    metrics, alone = read_metrics(folder), [read_metrics(runs / "results" / name) for name in "ab"]
    assert metrics["method"] == "combined"
    assert metrics["auprc"] > max(one["chosen"]["auprc"] for one in alone) - 0.02
    assert f"results: {folder}" in stdout
    assert "combined runs" in stdout
    for command in (("--rescore", folder), ("--compare", folder, runs / "results/a")):
        done = in_process(TEST, *command, cwd=runs)
        assert done.code == 0, done.stderr
    assert read_metrics(folder)["auprc"] == metrics["auprc"]


def test_a_combination_is_the_sum_of_standardised_scores(combined, runs):
    folder, _ = combined
    members = read_metrics(folder)["members"]
    assert len(members) >= 2
    total = 0
    for member in members:
        path = runs / "results" / Path(member["run"].replace("intensity", "a")).name
        with np.load(path / "error_maps.npz") as file:
            splits = [{key: file[f"{split}_{key}"] for key in ("names", *MAPS)} for split in ("test", "val")]
        settings, constants = chosen_score(member)
        if member["run"] == "intensity":
            splits = [intensity_maps(group, settings.sign) for group in splits]
        assert settings.rim == 0
        scores, val = (anomaly_map(group, settings, constants) for group in splits)
        healthy = val[splits[1]["brainmask"] & ~splits[1]["truth"]]
        middle, high = np.quantile(healthy, [0.5, 0.95])
        assert member["weight"] == pytest.approx(1 / (high - middle))
        total = total + scores / (high - middle)
    with np.load(folder / "error_maps.npz") as file:
        np.testing.assert_allclose(file["test_scores"], total, rtol=1e-4, atol=1e-5)


def write_different_run(what: str, folder) -> None:
    """Write a run that differs from `write_run`'s in `what`."""
    maps = {"test": make_maps(N_TEST, 2.0, 0), "val": make_maps(3, 2.0, 1)}
    run = RUN | ({"input": "t2"} if what == "input" else {})
    if what == "size":
        maps = {
            split: {key: array if key == "names" else array[:, 2:30, 2:30] for key, array in group.items()}
            for split, group in maps.items()
        }
    elif what == "names":
        maps["test"]["names"] = np.array([f"T_{i:02d}_80" for i in range(N_TEST)])
    elif what == "truth":
        maps["val"]["truth"][0, 20, 20] = True
    elif what == "splits":
        del maps["val"]
    folder.mkdir()
    write_part(folder / "error_maps.npz", run, maps)


@pytest.fixture(scope="module")
def first(tmp_path_factory, in_process):
    """A read-only folder with the runs `first`, which is scored, and `unscored`."""
    folder = tmp_path_factory.mktemp("combine")
    for name in ("first", "unscored"):
        write_run(folder / name)
    assert in_process(TEST, "--rescore", "first", *fixed(rim="0"), cwd=folder).code == 0
    return folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("size", "differ in the truth of their test slices"),
        ("names", "differ in the names of their test slices"),
        ("truth", "differ in the truth of their val slices"),
        ("input", "have different inputs, flair and t2"),
        ("splits", "has val slices"),
    ],
)
def test_runs_that_do_not_match_are_not_combined(first, in_process, tmp_path, what, said):
    write_different_run(what, tmp_path / "other")
    assert in_process(TEST, "--rescore", tmp_path / "other", *fixed(rim="0"), cwd=tmp_path).code == 0
    before = contents(tmp_path)
    expect_silent_refusal(in_process(TEST, "--combine", first / "first", tmp_path / "other", cwd=tmp_path), said)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("runs_given", "said"),
    [
        (["first"], "takes 2 to 10 different runs"),
        (["first", "first"], "takes 2 to 10 different runs"),
        (["intensity", "intensity"], "takes 2 to 10 different runs"),
        (["first", "nothing"], "no error_maps.npz in nothing"),
        (["first", "unscored"], "no metrics.json in unscored"),
    ],
)
def test_invalid_combinations_are_refused(first, in_process, runs_given, said):
    expect_silent_refusal(in_process(TEST, "--combine", *runs_given, cwd=first), said)
    assert {path.name for path in first.iterdir()} == {"first", "unscored"}

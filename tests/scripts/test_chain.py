"""The scripts from raw volumes to scores, on six phantoms and networks trained for a few steps."""

import csv
import json
import re
import shutil
from hashlib import sha256
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from sklearn.metrics import average_precision_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datasets.brats2021 import BraTS2021Dataset
from evaluation.results import THRESHOLDS

pytestmark = pytest.mark.xdist_group("scripts")  # one process, so that the chain runs once

TRAIN, TEST = "modality_cyclic_train.py", "modality_cyclic_test.py"
UNETS = "unet_forward_phantom_t2_flair__unet_backward_phantom_t2_flair"
MASKED = "masked__unet_backward_phantom_t2_flair"
NO_FLAGS = "unet_forward_brats_t2_flair__unet_backward_brats_t2_flair"
RESULTS = {"cyclic_unet": UNETS, "mmccd": f"{MASKED}__ddim5_stride8"}
DATA = ("--dataset=phantom", "--data_dir=datasets/data")
# Flags of the run `mmccd`, without its sampling flags.
MMCCD = (*DATA, "--model_name=diffusion", "--experiment_name_forward=masked")

SEGMENTATION = ("dice", "jaccard", "sensitivity", "precision", "assd")
SCORES = {"n_slices", "auprc", "auroc", "oracle", "validation"}
N_TEST = 3
IMAGE_SIZE = 32


@pytest.fixture(scope="module")
def results(workspace, chain) -> dict[str, Path]:
    """Return the results folder of each method."""
    return {method: workspace / "experiments/results" / name for method, name in RESULTS.items()}


@pytest.fixture
def run_mmccd(in_process, workspace, chain, tmp_path):
    """Return a function that tests MMCCD with further flags and returns its metrics and error maps."""

    def run(*flags: str, name: str, stride: int | None = 8) -> tuple[dict, dict]:
        # Link the experiments into a folder of this test, so that tests cannot overwrite each other's results.
        for experiment in ("masked", "unet_backward_phantom_t2_flair"):
            link = tmp_path / experiment
            if not link.exists():
                link.symlink_to(workspace / "experiments" / experiment)
        sweep = [f"--config.score_model.sampling.stride={stride}"] if stride else []
        done = in_process(TEST, *MMCCD, *sweep, f"--logdir={tmp_path}", *flags, cwd=workspace)
        assert done.code == 0, done.stderr
        folder = tmp_path / "results" / name
        return read_metrics(folder), read_maps(folder)

    return run


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def read_maps(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "error_maps.npz") as file:
        return dict(file)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_paths(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if key != "checkpoints"}


def test_a_test_run_records_the_contents_of_its_weights_and_slices(workspace, chain):
    folder = workspace / "experiments/results" / UNETS
    metrics, record = read_metrics(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for direction, path in metrics["checkpoints"].items():
        assert metrics["weights"][direction] == sha256((workspace / path).read_bytes()).hexdigest()
    kinds = ("flair", "seg", "brainmask")
    expected = BraTS2021Dataset(workspace / "datasets/data", "test", kinds, 16).fingerprint
    assert expected == record["data"]["test"]
    assert expected["contents"] == metrics["test_set"]


# ----------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(
    ("run", "name", "model_name", "process", "direction"),
    [
        ("forward", "unet_forward_phantom_t2_flair", "unet", "forward", "flair → t2"),
        ("backward", "unet_backward_phantom_t2_flair", "unet", "backward", "t2 → flair"),
        ("masked", "masked", "diffusion", "forward", "flair → t2"),
    ],
)
def test_training_writes_the_files_of_an_experiment(workspace, chain, run, name, model_name, process, direction):
    folder = workspace / "experiments" / name
    checkpoints = {f"{kind}{step:06d}.pt" for kind in ("model", "ema_0.5_", "opt") for step in (2, 4)}
    files = {path.name for path in folder.iterdir()}
    events = {file for file in files if file.startswith("events.out.tfevents.")}
    assert files - events == {".lock", "config.json", "log.txt", "progress.csv", *checkpoints}
    assert events

    record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (record["model_name"], record["training_process"]) == (model_name, process)
    assert record["dataset"] == "phantom"
    assert record["config"]["data"]["image_size"] == IMAGE_SIZE
    assert record["config"]["score_model"]["model"]["channel_mult"] == [1, 1]
    assert record["config"]["score_model"]["training"]["iterations"] == 4

    log = (folder / "log.txt").read_text(encoding="utf-8")
    for text in (log, chain[run].stdout):  # the full configuration is printed before training starts
        assert direction in text
        assert text.index("image_size: 32") < text.index("saved ema_0.5_000002.pt") < text.index("000004.pt")
    assert "no CUDA device" in chain["forward"].stdout

    rows = read_rows(folder / "progress.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert {row["learning_rate"] for row in rows} == {"0.01"}
    assert all(float(row["images_per_second"]) > 0 for row in rows)

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    logged = accumulator.Scalars("loss")
    assert [event.step for event in logged] == [1, 2, 3, 4]
    assert [event.value for event in logged] == pytest.approx([float(row["loss"]) for row in rows], rel=1e-4)
    assert {"learning_rate", "images_per_second"} < set(accumulator.Tags()["scalars"])
    (preview,) = accumulator.Tags()["images"]
    assert [event.step for event in accumulator.Images(preview)] == [2, 4]
    picture = accumulator.Images(preview)[-1]
    assert (picture.height, picture.width) == (IMAGE_SIZE, 3 * IMAGE_SIZE)


# ----------------------------------------------------------------------------------------------------------
# Testing


@pytest.mark.parametrize("method", RESULTS)
def test_results_have_the_documented_files(results, method):
    folder = results[method]
    files = {path.name for path in folder.iterdir()}
    events = {file for file in files if file.startswith("events.out.tfevents.")}
    assert files - events == {"config.json", "metrics.json", "per_slice.csv", "error_maps.npz", "figures"}
    assert events
    figures = {path.name for path in (folder / "figures").iterdir()}
    names = ("slices", "chosen_slices", "precision_recall", "dice_threshold", "histograms")
    assert figures == {f"{name}.png" for name in names}
    picture = matplotlib.image.imread(folder / "figures/slices.png")[..., :3]
    height, width, _ = picture.shape
    assert width >= 800  # five columns
    assert height >= 150 * N_TEST  # one row per slice
    assert len(np.unique((picture * 255).round().astype(int).reshape(-1, 3), axis=0)) > 200
    assert 0.05 < (picture == 1).all(-1).mean() < 0.95  # not blank, and with margins


@pytest.mark.parametrize("method", RESULTS)
def test_rescoring_needs_only_the_error_maps(results, in_process, tmp_path, method):
    shutil.copy(results[method] / "error_maps.npz", tmp_path)
    done = in_process(TEST, "--rescore", tmp_path, cwd=tmp_path)
    assert done.code == 0, done.stderr
    for name in ("metrics.json", "per_slice.csv"):
        assert (tmp_path / name).read_bytes() == (results[method] / name).read_bytes()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        path.name for path in (results[method] / "figures").iterdir()
    }


@pytest.mark.parametrize("method", RESULTS)
def test_metrics_have_the_documented_keys(results, method):
    metrics = read_metrics(results[method])
    assert metrics["method"] == method
    assert metrics["trained_steps"] == {"forward": 4, "backward": 4}
    for block in (metrics, metrics["baseline_intensity"]):
        assert set(block) >= SCORES
        assert block["n_slices"] == N_TEST
        assert 0 < block["auprc"] < 1
        assert block["auprc_interval"][0] <= block["auprc"] <= block["auprc_interval"][1]
        for choice in ("oracle", "validation"):
            assert set(block[choice]) >= {"threshold", *SEGMENTATION}
            low, high = block[choice]["dice_interval"]
            assert 0 <= low <= block[choice]["dice"] <= high <= 1


def test_both_methods_report_the_same_baseline(results):
    one, other = (read_metrics(folder) for folder in results.values())
    assert one["baseline_intensity"] == other["baseline_intensity"]
    assert one["auprc"] != other["auprc"]


@pytest.mark.parametrize("method", RESULTS)
def test_metrics_can_be_recomputed_from_the_error_maps(results, method):
    """Recompute the metrics independently, from error_maps.npz alone."""
    metrics, maps = read_metrics(results[method]), read_maps(results[method])
    for split, n in {"test": N_TEST, "val": 1}.items():
        for key in ("scores", "image", "translation", "reconstruction"):
            assert maps[f"{split}_{key}"].shape == (n, IMAGE_SIZE, IMAGE_SIZE)
            assert np.isfinite(maps[f"{split}_{key}"]).all()
        assert maps[f"{split}_truth"].any(axis=(1, 2)).all()
    if method == "cyclic_unet":
        error = (maps["test_image"] - maps["test_reconstruction"]) ** 2
        np.testing.assert_allclose(maps["test_scores"], error, rtol=1e-5, atol=1e-6)

    for key, block in {"scores": metrics, "image": metrics["baseline_intensity"]}.items():
        sign = block.get("sign", 1)
        maps["test_scored"], maps["val_scored"] = (sign * maps[f"{split}_{key}"] for split in ("test", "val"))
        masked_scores, truth = mask_scores(maps, "test", "scored"), maps["test_truth"]
        ranked = maps["test_brainmask"] | truth
        assert block["auprc"] == pytest.approx(average_precision_score(truth[ranked], masked_scores[ranked]))
        assert block["auroc"] == pytest.approx(roc_auc_score(truth[ranked], masked_scores[ranked]))
        assert block["chance"] == pytest.approx(truth[ranked].mean())
        oracle, validation = (block[choice]["threshold"] for choice in ("oracle", "validation"))
        assert block["oracle"]["dice"] == pytest.approx(dice(masked_scores, truth, oracle).mean())
        assert block["oracle"]["dice"] == pytest.approx(best_dice(masked_scores, truth))
        assert block["validation"]["dice"] == pytest.approx(dice(masked_scores, truth, validation).mean())
        # The validation threshold maximises Dice on the validation slices.
        val_scores, val_truth = mask_scores(maps, "val", "scored"), maps["val_truth"]
        assert dice(val_scores, val_truth, validation).mean() == pytest.approx(best_dice(val_scores, val_truth))


def mask_scores(maps: dict[str, np.ndarray], split: str, key: str) -> np.ndarray:
    """Return scores, lowered to -1e9 outside the brain mask eroded by 1 px (at 32 px)."""
    cross = np.array([[[0, 1, 0], [1, 1, 1], [0, 1, 0]]])
    scores = maps[f"{split}_{key}"].astype(np.float64)
    return np.where(binary_erosion(maps[f"{split}_brainmask"], cross), scores, -1e9)


def dice(scores: np.ndarray, truth: np.ndarray, threshold: float) -> np.ndarray:
    prediction = scores >= threshold
    both = (prediction & truth).sum((1, 2))
    return 2 * both / (prediction.sum((1, 2)) + truth.sum((1, 2)))


def best_dice(scores: np.ndarray, truth: np.ndarray) -> float:
    return max(dice(scores, truth, threshold).mean() for threshold in np.unique(scores[scores > -1e9]))


@pytest.mark.parametrize("method", RESULTS)
def test_per_slice_has_a_row_for_every_test_slice(results, workspace, method):
    rows = read_rows(results[method] / "per_slice.csv")
    assert len(rows) == N_TEST
    files = {path.name for path in (workspace / "datasets/data/test/flair").iterdir()}
    assert {f"{row['subject']}_flair_{row['slice']}.npy" for row in rows} == files
    maps, metrics = read_maps(results[method]), read_metrics(results[method])
    assert [f"{row['subject']}_{row['slice']}" for row in rows] == maps["test_names"].tolist()
    expected = dice(mask_scores(maps, "test", "scores"), maps["test_truth"], metrics["validation"]["threshold"])
    assert [float(row["validation_dice"]) for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [int(row["lesion_area"]) for row in rows] == maps["test_truth"].sum((1, 2)).tolist()


@pytest.mark.parametrize(("method", "label"), [("cyclic_unet", "Cyclic UNet"), ("mmccd", "MMCCD")])
def test_the_printed_table_matches_the_metrics(chain, results, method, label):
    metrics, printed = read_metrics(results[method]), chain[method].stdout
    rows = {"intensity (flair)": metrics["baseline_intensity"], label: metrics}
    rows |= {f"{start}, chosen": block["chosen"] for start, block in rows.items()}
    for start, block in rows.items():
        (row,) = [line for line in printed.splitlines() if line.startswith(f"{start}  ")]
        cells = [f"{block['auprc']:.3f}", *(f"{block[key]['dice']:.3f}" for key in THRESHOLDS)]
        assert re.findall(r"(\d\.\d{3}) \[\d\.\d{3}, \d\.\d{3}\]", row) == cells
    assert "4 + 4" in row  # training steps of each translator
    assert re.search(rf"chance-level AUPRC {metrics['chance']:.3f}", printed)
    assert "lesion pixels outside the scored region" in printed
    assert "95 %" in printed
    assert str(Path("experiments/results") / RESULTS[method]) in printed


def test_batching_does_not_change_error_maps(run_mmccd, results):
    expected = read_maps(results["mmccd"])
    for batch_size in (1, 7):
        override = f"--config.score_model.sampling.batch_size={batch_size}"
        _, maps = run_mmccd("--timestep_respacing=5", override, name=f"{MASKED}__ddim5_stride8")
        assert maps["test_scores"].dtype == np.float32
        for key in ("test_scores", "val_scores", "test_translation"):
            np.testing.assert_allclose(maps[key], expected[key], rtol=1e-6, atol=1e-5)


def test_computing_maps_in_parts_changes_nothing(run_mmccd, results, monkeypatch):
    monkeypatch.setattr("evaluation.results.PART_SLICES", 2)
    metrics, maps = run_mmccd("--timestep_respacing=5", name=f"{MASKED}__ddim5_stride8")
    assert len(maps["test_names"]) == 2
    expected = read_maps(results["mmccd"])
    for key in ("names", "scores", "translation", "healthy"):
        joined = np.concatenate([maps[f"test_{key}"], maps[f"test_{key}_1"]])
        if key == "names":
            assert joined.tolist() == expected["test_names"].tolist()
        else:
            np.testing.assert_allclose(joined, expected[f"test_{key}"], rtol=1e-6, atol=1e-5)
    assert metrics["auprc"] == pytest.approx(read_metrics(results["mmccd"])["auprc"], abs=1e-6)


def test_scores_are_reproducible_and_depend_on_the_seed(run_mmccd, results):
    first = read_metrics(results["mmccd"])
    again, _ = run_mmccd("--timestep_respacing=5", name=f"{MASKED}__ddim5_stride8")
    assert without_paths(again) == without_paths(first)
    other, _ = run_mmccd("--timestep_respacing=5", "--seed=1", name=f"{MASKED}__ddim5_seed1_stride8")
    assert other["auprc"] != first["auprc"]
    assert other["baseline_intensity"] == first["baseline_intensity"]


def test_ancestral_sampling_differs_from_ddim(run_mmccd):
    ddim, ddim_maps = run_mmccd("--timestep_respacing=4", name=f"{MASKED}__ddim4_stride8")
    ancestral, maps = run_mmccd(
        "--use_ddim", "False", "--timestep_respacing", "4", name=f"{MASKED}__ancestral4_stride8"
    )
    assert set(ancestral) == set(ddim)
    assert np.abs(maps["test_scores"] - ddim_maps["test_scores"]).max() > 1e-4


def test_respacing_accepts_the_syntax_of_guided_diffusion(run_mmccd):
    metrics, _ = run_mmccd("--timestep_respacing=ddim4", name=f"{MASKED}__ddim4_strided_stride8")
    assert metrics["method"] == "mmccd"


def test_sampling_presets(run_mmccd, workspace):
    """With bands of 8 px, `fast` has stride 4 and `paper` stride 1; flags override a preset."""
    fast, maps = run_mmccd("--sampling=fast", name=f"{MASKED}__fast", stride=None)
    assert fast["sampling"] == "fast"
    score = "--config.score_model.sampling.score"
    spelling = ("--timestep_respacing=trailing2", f"{score}=standardised", "--smooth=median5")
    _, spelt_out = run_mmccd(*spelling, name=f"{MASKED}__fast", stride=4)
    assert np.array_equal(maps["test_scores"], spelt_out["test_scores"])
    others = {"errors": "", "reconstructions": "_reconstructions"}
    of_kind = {
        kind: run_mmccd(
            *("--sampling=fast", f"{score}={kind}", "--smooth=none"),
            name=f"{MASKED}__ddim2_trailing_stride4{suffix}",
            stride=None,
        )
        for kind, suffix in others.items()
    }
    deviation, variance = (maps["test_image"] - maps["test_reconstruction"]) ** 2, maps["test_variance"]
    close = {"rtol": 1e-3, "atol": 1e-4}
    np.testing.assert_allclose(of_kind["reconstructions"][1]["test_scores"], deviation, **close)
    np.testing.assert_allclose(of_kind["errors"][1]["test_scores"], deviation + variance, **close)
    np.testing.assert_allclose(maps["test_scores"], deviation / (variance + fast["usual_error"]), **close)
    unsmoothed, _ = run_mmccd(
        *("--sampling=fast", "--smooth=none"), name=f"{MASKED}__ddim2_trailing_stride4_standardised", stride=None
    )
    assert fast["unsmoothed"]["auprc"] == unsmoothed["auprc"] != fast["auprc"]
    assert unsmoothed["unsmoothed"] is None
    run_mmccd(*spelling, name=f"{MASKED}__ddim2_trailing_stride8_standardised_median5")
    _, paper = run_mmccd("--sampling=paper", "--timestep_respacing=2", name=f"{MASKED}__ddim2", stride=None)
    _, spelt_out = run_mmccd("--timestep_respacing=2", name=f"{MASKED}__ddim2", stride=1)
    assert np.array_equal(paper["test_scores"], spelt_out["test_scores"])


def test_network_passes_are_counted_and_fast_is_suggested(chain, results):
    """Each of the 8 bands that hides part of a brain costs 5 forward steps and 1 backward pass."""
    brainmask = np.concatenate([read_maps(results["mmccd"])[f"{split}_brainmask"] for split in ("test", "val")])
    rows, columns = (brainmask.any(axis).reshape(4, 4, 8).any(2).sum() for axis in (2, 1))
    metrics, printed = read_metrics(results["mmccd"]), chain["mmccd"].stdout
    assert metrics["network_passes"] == 6 * (rows + columns)
    assert f"{6 * (rows + columns)} network passes, on 1 × cpu in float32" in printed
    assert "--sampling fast" in printed
    assert "--sampling fast" not in chain["cyclic_unet"].stdout
    assert read_metrics(results["cyclic_unet"])["network_passes"] == 2 * 4
    *_, bar = [line for line in chain["mmccd"].stderr.splitlines() if line.startswith("scoring ")]
    assert "100%" in bar
    assert "pass/s" in bar


def test_bfloat16_maps_are_close_to_float32(run_mmccd, results):
    metrics, maps = run_mmccd("--timestep_respacing=5", "--config.precision=bfloat16", name=RESULTS["mmccd"])
    assert metrics["precision"] == "bfloat16"
    expected = read_maps(results["mmccd"])["test_scores"]
    assert 0 < np.abs(maps["test_scores"] - expected).max() < 0.05 * expected.max()


def test_bare_state_dicts_need_no_experiment(workspace, chain, results, in_process, tiny, tmp_path):
    for process, experiment in (("forward", "masked"), ("backward", "unet_backward_phantom_t2_flair")):
        source = workspace / "experiments" / experiment / "ema_0.5_000004.pt"
        shutil.copy(source, tmp_path / f"{process}_weights.pt")
    flags = [f"--checkpoint_{process}={tmp_path / process}_weights.pt" for process in ("forward", "backward")]
    sampling = ("--model=diffusion", "--timestep_respacing=5")
    done = in_process(TEST, *tiny, *flags, *sampling, f"--logdir={tmp_path / 'logs'}", cwd=workspace)
    assert done.code == 0, done.stderr
    (folder,) = (tmp_path / "logs/results").iterdir()
    assert folder.name == "forward_weights__backward_weights__ddim5_stride8"
    metrics, expected = read_metrics(folder), read_metrics(results["mmccd"])
    assert metrics.pop("trained_steps") == {"forward": None, "backward": None}
    assert expected.pop("trained_steps")
    assert without_paths(metrics) == without_paths(expected)


@pytest.mark.parametrize("folders", ["none", "empty"])
def test_a_validation_threshold_needs_validation_slices(workspace, results, in_process, tmp_path, folders):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test").symlink_to(workspace / "datasets/data/test")
    if folders == "empty":  # preprocessing creates these for an empty list
        for kind in ("flair", "t2", "seg", "brainmask"):
            (tmp_path / "data/val" / kind).mkdir(parents=True)
    experiments = workspace / "experiments"
    flags = [
        f"--checkpoint_{process}={experiments / f'unet_{process}_phantom_t2_flair' / 'ema_0.5_000004.pt'}"
        for process in ("forward", "backward")
    ]
    done = in_process(TEST, *DATA, *flags, f"--data_dir={tmp_path / 'data'}", f"--logdir={tmp_path}", cwd=workspace)
    assert done.code == 0, done.stderr
    metrics, expected = read_metrics(tmp_path / "results" / UNETS), read_metrics(results["cyclic_unet"])
    for block, full in ((metrics, expected), (metrics["baseline_intensity"], expected["baseline_intensity"])):
        assert block["validation"] is None
        assert block["oracle"] == full["oracle"]
    assert "no validation slices" in done.stdout
    assert "no val slices" in done.stdout  # in the table instead of the Dice


# ----------------------------------------------------------------------------------------------------------
# Drawings


def test_the_drawings_of_the_docs(workspace, chain, in_process, as_subprocess, repository, tmp_path):
    names = {"diffusion_forward_phantom_t2_flair": "masked"}
    names |= {name: name for name in UNETS.split("__")}
    for name, experiment in names.items():
        (tmp_path / name).symlink_to(workspace / "experiments" / experiment)
    fast = (*DATA, "--model_name=diffusion", "--sampling=fast", f"--logdir={tmp_path}")
    done = in_process(TEST, *fast, cwd=workspace)
    assert done.code == 0, done.stderr
    flags = (f"--logdir={tmp_path}", f"--output_dir={tmp_path}", "--slice=1")
    done = as_subprocess(repository / "docs/drawings.py", *flags, cwd=workspace)
    assert done.code == 0, done.stderr
    assert "Warning" not in done.stderr
    drawings = {"cycle": (1.55, 7.85), "masked_diffusion": (3.15, 8.55), "standardised": (1.45, 5.7)}
    for name, shape in drawings.items():
        assert f"drew {tmp_path / name}.png" in done.stdout
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        assert picture.shape[0] / picture.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.02)
        assert len(np.unique((picture * 255).round().astype(int).reshape(-1, 3), axis=0)) > 200
        assert 0.2 < (picture == 1).all(-1).mean() < 0.95  # slices on a white background


# ----------------------------------------------------------------------------------------------------------
# Defaults


def test_the_defaults_are_those_of_the_paper(workspace, no_flags):
    for process in ("forward", "backward"):
        folder = workspace / "experiments" / f"unet_{process}_brats_t2_flair"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        assert config["data"] == {"data_dir": "./datasets/data", "image_size": 128, "input": "flair", "trans": "t2"}
        assert config["score_model"]["model"]["channel_mult"] == [1, 1, 2, 3, 4]
        state = torch.load(folder / "ema_0.9999_000001.pt", weights_only=True)
        assert state["input_blocks.0.0.weight"].shape == (32, 1, 3, 3)
        assert state["middle_block.0.in_layers.2.weight"].shape == (128, 128, 3, 3)

    folder = workspace / "experiments/results" / NO_FLAGS
    metrics = read_metrics(folder)
    assert metrics["method"] == "cyclic_unet"
    assert metrics["trained_steps"] == {"forward": 1, "backward": 1}
    assert metrics["n_slices"] == N_TEST
    assert read_maps(folder)["test_scores"].shape == (N_TEST, 128, 128)
    assert metrics["baseline_intensity"]["auprc"] > 2 * metrics["chance"]
    assert "Cyclic UNet" in no_flags["test"].stdout
    assert NO_FLAGS in no_flags["test"].stdout

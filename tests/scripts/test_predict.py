"""Prediction on a user's own scans: scores equal the test script's, and results keep the scan's grid and header."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine, from_matvec
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from datasets.records import NORMALISATION
from evaluation.metrics import scored_region
from evaluation.results import chosen_score
from evaluation.scores import anomaly_map, smooth_scores
from scoring.scan import (
    REPORT_SLICES,
    RESULT_SUFFIXES,
    axial_axis,
    draw_report,
    is_result,
    pick_slices,
    read_scan,
    score_scan,
)
from tests.scripts.conftest import expect_refusal
from utils.grid import SliceGeometry

pytestmark = pytest.mark.xdist_group("predict")  # one worker, so that its fixtures are built once

PREDICT, TEST = "modality_cyclic_predict.py", "modality_cyclic_test.py"
FROZEN = ("validation", "healthy")  # thresholds
SHAPE = (32, 32, 14)  # in-plane, the tiny networks' image size: no resizing
SPACING = 5.0  # mm
AFFINE = from_matvec(np.diag([-SPACING, -SPACING, SPACING]), [80, 90, -30])
GRID = SliceGeometry("LPS", (SPACING,) * 3, SHAPE[:2])
LESION = apply_affine(AFFINE, [19, 12, 7])  # mm

FORWARD, BACKWARD = "unet_forward_phantom_t2_flair", "unet_backward_phantom_t2_flair"
MMCCD = (
    "--model_name=diffusion",
    "--experiment_name_forward=masked",
    "--timestep_respacing=5",
    "--config.score_model.sampling.stride=8",
)
STANDARDISED = (*MMCCD, "--config.score_model.sampling.score=standardised", "--smooth=median3")
METHODS = {"cyclic_unet": (), "mmccd": MMCCD, "standardised": STANDARDISED}
RESULTS = {
    "cyclic_unet": f"{FORWARD}__{BACKWARD}",
    "mmccd": f"masked__{BACKWARD}__ddim5_stride8",
    "standardised": f"masked__{BACKWARD}__ddim5_stride8_standardised_median3",
}


def head(seed: int, modality: str = "flair", shape=SHAPE, affine=AFFINE) -> np.ndarray:
    """Return a skull-stripped int16 head with texture and a lesion; its anatomy does not depend on the grid."""
    position = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    offset = (position - apply_affine(AFFINE, (np.array(SHAPE) - 1) / 2)) / [62, 70, 28]
    texture = 400 + 80 * np.sin(position / 9 + seed).sum(-1) + 60 * offset[..., 1]
    if modality == "t2":
        texture = 900 - texture
    texture[lesion(shape, affine)] = 2500
    return np.where((offset**2).sum(-1) < 1, texture, 0).astype(np.int16)


def lesion(shape=SHAPE, affine=AFFINE) -> np.ndarray:
    position = apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    return np.linalg.norm(position - LESION, axis=-1) < 13


def save(path: Path, volume: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(volume, affine)
    image.set_sform(affine, 4)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, workspace, chain, as_subprocess, in_process, repository) -> Path:
    """A working directory with three subjects and the chain's translators, as if trained on their grid."""
    folder = tmp_path_factory.mktemp("predict")
    for part, subject, seed in (("training", "A", 0), ("validation", "B", 1), ("testing", "C", 2)):
        for kind in ("flair", "t2"):
            save(folder / f"raw/{subject}/{subject}_{kind}.nii.gz", head(seed, kind))
        save(folder / f"raw/{subject}/{subject}_seg.nii.gz", lesion().astype(np.uint8))
        (folder / f"raw/brats_split_{part}.txt").write_text(f"{subject}\n")
    preprocess = repository / "datasets/brats_preprocess.py"
    flags = ("--modality=flair,t2", "--data_dir=raw", "--output_dir=slices", "--workers=1", "--slices", "0", "14")
    done = as_subprocess(preprocess, *flags, cwd=folder)
    assert done.code == 0, done.stderr
    for name in (FORWARD, BACKWARD, "masked"):
        target = folder / "experiments" / name
        target.mkdir(parents=True)
        shutil.copy(workspace / "experiments" / name / "ema_0.5_000004.pt", target)
        record = json.loads((workspace / "experiments" / name / "config.json").read_text())
        record["data"]["grid"] = GRID.to_json()
        (target / "config.json").write_text(json.dumps(record))
    for flags in METHODS.values():
        done = in_process(TEST, "--dataset=phantom", "--data_dir=slices", *flags, cwd=folder)
        assert done.code == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def predict(workdir, in_process) -> Callable:
    """Call the script in `workdir` on the CPU, with the published score unless the flags select another."""

    def run(scan: Path | str, output_dir: Path | str, *flags: object, pictures: bool = False):
        paths = (f"--scan={scan}", f"--output_dir={output_dir}")
        if not any(str(flag).startswith(("--scoring", "--combined")) for flag in flags):
            paths += ("--scoring=published",)
        return in_process(PREDICT, "--dataset=phantom", *paths, *flags, cwd=workdir, pictures=pictures)

    return run


@pytest.fixture(scope="module")
def results(workdir, predict) -> dict[str, tuple[Path, str]]:
    """Results folder and stdout of subject C's prediction, by method."""
    outputs = {}
    for method, flags in METHODS.items():
        done = predict("raw/C/C_flair.nii.gz", f"out_{method}", *flags, pictures=True)
        assert done.code == 0, done.stderr
        assert "Warning" not in done.stderr
        outputs[method] = workdir / f"out_{method}", done.stdout
    return outputs


def load(folder: Path, name: str, result: str = "anomaly") -> nibabel.Nifti1Image:
    return nibabel.load(folder / f"{name}_{result}.nii.gz")


def voxels(image: nibabel.Nifti1Image) -> np.ndarray:
    return np.asarray(image.dataobj)


# ----------------------------------------------------------------------------------------------------------
# Results


@pytest.mark.parametrize("method", METHODS)
def test_the_anomaly_map_of_a_test_slice_equals_the_test_scripts_scores(workdir, results, method):
    folder, _ = results[method]
    anomaly = voxels(load(folder, "C_flair"))
    with np.load(workdir / "experiments/results" / RESULTS[method] / "error_maps.npz") as maps:
        (name,) = maps["test_names"].tolist()
        slice_scores = anomaly[:, :, int(name.removeprefix("C_"))]
        inside = scored_region(maps["test_brainmask"])[0]
        assert 100 < np.count_nonzero(inside) < np.count_nonzero(maps["test_brainmask"])
        scores = smooth_scores(maps["test_scores"], "median3" if method == "standardised" else "none")[0]
        np.testing.assert_allclose(slice_scores[inside], scores[inside], rtol=1e-5, atol=1e-5)
    assert not slice_scores[~inside].any()
    assert np.count_nonzero(anomaly.any(axis=(0, 1))) == np.count_nonzero(head(2).any(axis=(0, 1)))


@pytest.mark.parametrize("method", METHODS)
def test_the_mask_marks_scores_at_or_above_the_validation_threshold(workdir, results, method):
    folder, stdout = results[method]
    path = workdir / "experiments/results" / RESULTS[method] / "metrics.json"
    threshold = json.loads(path.read_text())["validation"]["threshold"]
    assert f"threshold: {threshold:.6g}, the validation threshold in experiments/results/{RESULTS[method]}" in stdout
    mask = voxels(load(folder, "C_flair", "mask"))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, voxels(load(folder, "C_flair")) >= threshold)
    assert 0 < mask.mean() < 1
    assert f"{mask.sum() * SPACING**3 / 1000:.1f} ml at or above the threshold" in stdout
    assert "network passes, on 1 × cpu" in stdout


def test_the_report_is_an_image(results):
    folder, stdout = results["cyclic_unet"]
    picture = matplotlib.image.imread(folder / "C_flair_report.png")
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture.std() > 0.05
    assert f"{folder.name}/C_flair_report.png" in stdout
    assert {path.name for path in folder.iterdir()} == {
        f"C_flair_{result}" for result in ("anomaly.nii.gz", "mask.nii.gz", "report.png")
    }


@pytest.mark.parametrize("kind", ["plain", "codes", "nifti2, scaled", "big-endian"])
def test_results_keep_the_scans_grid_and_header(workdir, predict, tmp_path, kind):
    volume = head(2)
    image_class = nibabel.Nifti2Image if kind == "nifti2, scaled" else nibabel.Nifti1Image
    header = image_class.header_class(endianness=">" if kind == "big-endian" else "<")
    image = image_class(volume, AFFINE, header)
    image.set_sform(AFFINE, 2 if kind == "codes" else 1)
    image.set_qform(AFFINE, 0 if kind == "codes" else 3)
    image.header.set_xyzt_units("mm", "msec" if kind == "codes" else "sec")
    image.header["cal_max"] = 1234
    if kind == "nifti2, scaled":
        image.header.set_slope_inter(0.5, 0)
    nibabel.save(image, tmp_path / "scan.nii")
    done = predict(tmp_path / "scan.nii", tmp_path / "out")
    assert done.code == 0, done.stderr
    scan = nibabel.load(tmp_path / "scan.nii").header
    for result, dtype in (("anomaly", np.float32), ("mask", np.uint8)):
        found = load(tmp_path / "out", "scan", result)
        assert type(found) is image_class
        assert found.shape == SHAPE
        for key in ("sform_code", "qform_code", "xyzt_units", "srow_x", "quatern_b", "qoffset_y", "pixdim"):
            np.testing.assert_array_equal(found.header[key], scan[key])
        np.testing.assert_array_equal(found.affine, nibabel.load(tmp_path / "scan.nii").affine)
        assert found.get_data_dtype().newbyteorder("=") == dtype
        assert found.header["cal_max"] == 0
        assert voxels(found).max() > 0
    expected = voxels(load(workdir / "out_cyclic_unet", "C_flair"))
    np.testing.assert_allclose(voxels(load(tmp_path / "out", "scan")), expected, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------
# Chosen scores and combined runs

CHOSEN = [
    ("cyclic_unet", {"sign": "bright", "norm": "squared", "smoothing": "none", "match": "none", "rim": "0"}),
    ("cyclic_unet", {"sign": "both", "calibration": "none", "smoothing": "median", "outside": "left_out", "rim": "2"}),
    ("mmccd", {"sign": "both", "norm": "standardised", "match": "affine", "outside": "zeros", "rim": "4"}),
    ("mmccd", {"neighbours": "2", "outside": "left_out", "smoothing": "gaussian", "width": "0.05", "match": "scan"}),
]


def rescore(workdir: Path, in_process: Callable, method: str, **options: str) -> dict:
    """Rescore a test run with some options fixed; return its metrics."""
    folder = workdir / "experiments/results" / RESULTS[method]
    flags = (f"--config.score_model.scoring.{key}={value}" for key, value in options.items())
    done = in_process(TEST, "--rescore", folder, *flags, cwd=workdir)
    assert done.code == 0, done.stderr
    return json.loads((folder / "metrics.json").read_text())


def slice_of(maps: dict) -> int:
    (name,) = maps["names"].tolist()
    return int(name.removeprefix("C_"))


def error_maps(folder: Path) -> dict:
    with np.load(folder / "error_maps.npz") as file:
        return {key.removeprefix("test_"): file[key] for key in file if key.startswith("test_")}


@pytest.mark.parametrize(("method", "options"), CHOSEN)
def test_the_chosen_score_of_a_slice_equals_the_test_runs(workdir, predict, in_process, tmp_path, method, options):
    chosen = rescore(workdir, in_process, method, **options)["chosen"]
    settings, constants = chosen_score(chosen)
    maps = error_maps(workdir / "experiments/results" / RESULTS[method])
    number = slice_of(maps)
    flags = (*METHODS[method], "--scoring=chosen", "--slices", number, number + 1)
    done = predict("raw/C/C_flair.nii.gz", tmp_path, *flags)
    assert done.code == 0, done.stderr
    assert f"threshold: {chosen['validation']['threshold']:.6g}, the validation threshold in" in done.stdout
    assert "score: chosen on validation slices, " in done.stdout
    region = scored_region(maps["brainmask"], settings.rim)
    expected = np.where(region, anomaly_map(maps, settings, constants), 0)[0]
    found = voxels(load(tmp_path, "C_flair"))
    np.testing.assert_allclose(found[:, :, number], expected, rtol=1e-4, atol=1e-4)
    assert expected.any()
    assert not np.delete(found, number, axis=2).any()


def test_the_chosen_score_is_the_default_and_is_printed(workdir, in_process, tmp_path):
    rescore(workdir, in_process, "cyclic_unet", rim="0")
    flags = ("--dataset=phantom", "--scan=raw/C/C_flair.nii.gz", f"--output_dir={tmp_path}")
    done = in_process(PREDICT, *flags, cwd=workdir)
    assert done.code == 0, done.stderr
    assert "score: chosen on validation slices, " in done.stdout
    assert "whole brain" in done.stdout
    done = in_process(PREDICT, *flags, "--scoring=published", cwd=workdir)
    assert "score: published\n" in done.stdout


def test_prediction_reproduces_the_scores_of_a_combined_run(workdir, in_process, predict, tmp_path):
    runs = [f"experiments/results/{RESULTS[method]}" for method in ("cyclic_unet", "mmccd")]
    for method in ("cyclic_unet", "mmccd"):
        rescore(workdir, in_process, method, sign="both", match="none", rim="0")
    done = in_process(TEST, "--combine", *runs, "intensity", cwd=workdir)
    assert done.code == 0, done.stderr
    (folder,) = (workdir / "experiments/results").glob("combined__*")
    maps = error_maps(folder)
    number = slice_of(maps)
    flags = (f"--combined={folder}", "--slices", number, number + 1)
    done = predict("raw/C/C_flair.nii.gz", tmp_path, *flags)
    assert done.code == 0, done.stderr
    found = voxels(load(tmp_path, "C_flair"))[:, :, number]
    np.testing.assert_allclose(found, maps["scores"][0], rtol=1e-4, atol=1e-4)
    assert found.any()
    moved = shutil.copytree(workdir / "experiments", tmp_path / "moved")
    replace_weights(moved)
    flags = (f"--combined={folder}", f"--logdir={moved}")
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", *flags)
    expect_refusal(done, "with other weights", f"{FORWARD}/ema_0.5_000004.pt", "combine the runs again")
    for flags, message in (
        ((f"--combined={runs[0]}",), "is not a combined run"),
        ((f"--combined={folder}", "--scoring=published"), "leave out --scoring published"),
    ):
        done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", *flags)
        assert done.code == 2
        assert message in done.stderr


# ----------------------------------------------------------------------------------------------------------
# Orientation and grid


@pytest.mark.parametrize("axcodes", ["RAS", "LIP", "SRA"])
def test_results_do_not_depend_on_the_order_of_axes(results, predict, tmp_path, axcodes):
    folder, _ = results["cyclic_unet"]
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(axcodes))
    turned = nibabel.Nifti1Image(head(2), AFFINE).as_reoriented(turn)
    save(tmp_path / "turned.nii.gz", voxels(turned), turned.affine)
    assert predict(tmp_path / "turned.nii.gz", tmp_path).code == 0
    for result in ("anomaly", "mask"):
        found = load(tmp_path, "turned", result)
        assert "".join(nibabel.aff2axcodes(found.affine)) == axcodes
        expected = load(folder, "C_flair", result).as_reoriented(turn)
        np.testing.assert_allclose(found.affine, expected.affine)
        np.testing.assert_array_equal(voxels(found), voxels(expected))


TILTED = np.array([[1, 0, 0], [0, np.cos(0.1), -np.sin(0.1)], [0, np.sin(0.1), np.cos(0.1)]])
OTHER_GRIDS = {
    "2.5 mm": ((64, 64, 28), np.diag([2.5, -2.5, 2.5])),
    "thick coronal slices": ((50, 28, 9), np.array([[3.2, 0, 0], [0, 0, -20.0], [0, 2.8, 0]])),
    "oblique": ((48, 52, 26), TILTED @ np.diag([-3.4, -3.4, 3.0])),
}


@pytest.mark.parametrize("name", OTHER_GRIDS)
def test_the_anomaly_is_at_the_same_position_on_another_grid(workdir, results, predict, tmp_path, name):
    shape, axes = OTHER_GRIDS[name]
    middle = apply_affine(AFFINE, (np.array(SHAPE) - 1) / 2)
    affine = from_matvec(axes, middle - axes @ ((np.array(shape) - 1) / 2))
    scan = save(tmp_path / "scan.nii.gz", head(2, shape=shape, affine=affine), affine)
    done = predict(scan, tmp_path)
    assert done.code == 0, done.stderr
    found = load(tmp_path, "scan")
    assert found.shape == shape
    np.testing.assert_array_equal(found.affine, nibabel.load(scan).affine)
    anomaly = voxels(found)
    assert not anomaly[head(2, shape=shape, affine=affine) == 0].any()
    weight = np.where(anomaly >= 0.5 * anomaly.max(), anomaly, 0)
    centre = (weight[..., None] * apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))).sum((0, 1, 2))
    voxel = max(SPACING, *np.linalg.norm(axes, axis=0))
    assert np.linalg.norm(centre / weight.sum() - LESION) < voxel
    # The same on the training grid: these networks cannot reproduce the lesion.
    reference = voxels(load(results["cyclic_unet"][0], "C_flair"))
    assert reference[lesion()].mean() > 3 * reference[(head(2) != 0) & ~lesion()].mean()


# ----------------------------------------------------------------------------------------------------------
# Flags


def test_slices_are_counted_along_the_scans_own_axial_axis(results, predict, tmp_path):
    folder, _ = results["cyclic_unet"]
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt("IRA"))
    turned = nibabel.Nifti1Image(head(2), AFFINE).as_reoriented(turn)
    save(tmp_path / "turned.nii.gz", voxels(turned), turned.affine)
    assert axial_axis(turned.affine) == 0
    done = predict(tmp_path / "turned.nii.gz", tmp_path, "--slices", 4, 7)
    assert done.code == 0, done.stderr
    assert "6 network passes" in done.stdout  # forward and back
    expected = voxels(load(folder, "C_flair").as_reoriented(turn)).copy()
    expected[:4] = expected[7:] = 0
    np.testing.assert_allclose(voxels(load(tmp_path, "turned")), expected, atol=1e-5)
    assert expected.any()


THIN = (*SHAPE[:2], 56)  # four slices per slice of the training grid


def thin_affine() -> np.ndarray:
    """Return `AFFINE` with slices a quarter as thick: every fourth coincides with one of `AFFINE`'s."""
    return from_matvec(AFFINE[:3, :3] @ np.diag([1, 1, 0.25]), AFFINE[:3, 3])


def test_selected_thin_slices_score_as_in_the_whole_scan(predict, tmp_path):
    """Even if no slice of the training grid is among them: the score then comes from the slices on either side."""
    scan = save(tmp_path / "thin.nii.gz", head(2, shape=THIN, affine=thin_affine()), thin_affine())
    found = {}
    for slices in ((), (30, 31), (27, 34), (28, 29)):
        done = predict(scan, tmp_path / "out", *(("--slices", *slices) if slices else ()))
        assert done.code == 0, done.stderr
        found[slices] = voxels(load(tmp_path / "out", "thin"))
    whole = found.pop(())
    for slices, selected in found.items():
        inside = (..., slice(*slices))
        assert whole[inside].any()
        np.testing.assert_allclose(selected[inside], whole[inside], rtol=1e-4, atol=1e-5)
        assert not np.delete(selected, range(*slices), axis=2).any()


@pytest.mark.parametrize("in_a_folder", [False, True])
def test_slices_with_only_stray_voxels_are_refused(predict, tmp_path, in_a_folder):
    """Specks between two slices of the training grid, far from the brain; a folder's other scans are still scored."""
    volume, slices, scans = head(2, shape=THIN, affine=thin_affine()), ("--slices", 49, 52), tmp_path / "scans"
    volume[:, :, 46:] = 0
    volume[[9, 20], [12, 7], [49, 50]] = 400
    bad = save(scans / "bad.nii.gz", volume, thin_affine())
    if in_a_folder:
        save(scans / "good.nii.gz", np.repeat(head(2)[:, :, 7:8], THIN[2], axis=2), thin_affine())
    done = predict(scans if in_a_folder else bad, tmp_path / "out", *slices)
    assert done.code == (1 if in_a_folder else 2), done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line == f"{PREDICT}: error: {bad} has no brain in --slices 49 52"
    written = {path.name for path in tmp_path.glob("out/*")}
    assert written == ({f"good{end}" for end in RESULT_SUFFIXES} if in_a_folder else set())


@pytest.mark.parametrize("method", METHODS)
def test_scores_do_not_depend_on_the_batch_size(results, predict, tmp_path, method):
    folder, _ = results[method]
    batch_size = "--config.score_model.sampling.batch_size=3"
    done = predict("raw/C/C_flair.nii.gz", tmp_path, batch_size, "--slices", 5, 8, *METHODS[method])
    assert done.code == 0, done.stderr
    expected = voxels(load(folder, "C_flair"))[:, :, 5:8]
    np.testing.assert_allclose(voxels(load(tmp_path, "C_flair"))[:, :, 5:8], expected, rtol=1e-4, atol=1e-5)


def test_a_threshold_by_flag_needs_no_test_run(experiments, results, predict, tmp_path):
    anomaly = voxels(load(results["cyclic_unet"][0], "C_flair"))
    threshold = float(np.quantile(anomaly[anomaly > 0], 0.9))
    forget_the_test(experiments)
    flags = (f"--threshold={threshold!r}", f"--logdir={experiments}")
    done = predict("raw/C/C_flair.nii.gz", tmp_path, *flags)
    assert done.code == 0, done.stderr
    assert ", from --threshold" in done.stdout
    np.testing.assert_array_equal(voxels(load(tmp_path, "C_flair", "mask")), anomaly >= threshold)


def test_the_standardised_score_needs_a_test_run_even_with_a_threshold(experiments, predict, tmp_path):
    """The test run provides the error floor, a term of the score."""
    flags = ("--threshold=3", f"--logdir={experiments}", "--slices", 7, 8, *STANDARDISED)
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", *flags)
    assert done.code == 0, done.stderr
    assert "threshold: 3, from --threshold" in done.stdout
    (metrics,) = (experiments / "results").glob("*standardised*/metrics.json")
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"validation": None, "healthy": None}))
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", *flags)
    assert done.code == 0, done.stderr
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "none", *flags[1:])
    assert done.code == 2
    assert done.stderr.endswith("to find its score and threshold, or give --threshold\n")
    forget_the_test(experiments)
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "none", *flags)
    expect_refusal(done)
    assert done.stderr.endswith("to find its score and threshold\n")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def experiments(workdir, tmp_path) -> Path:
    """A copy of the experiments that a test may modify."""
    return shutil.copytree(workdir / "experiments", tmp_path / "copy")


def test_the_threshold_is_found_in_a_copy_of_the_experiments(experiments, predict, tmp_path):
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", f"--logdir={experiments}", "--slices", 7, 8)
    assert done.code == 0, done.stderr


def test_a_test_run_of_an_earlier_version_is_used_with_a_warning(experiments, predict, tmp_path):
    rewrite(experiments, weights={})
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", f"--logdir={experiments}", "--slices", 7, 8)
    assert done.code == 0, done.stderr
    assert "metrics.json is from an earlier version, which did not record the weights" in done.stdout


@pytest.mark.parametrize("by_name", [False, True])
def test_the_healthy_threshold_by_name_or_without_a_validation_threshold(experiments, predict, tmp_path, by_name):
    path = experiments / "results" / RESULTS["cyclic_unet"] / "metrics.json"
    threshold = json.loads(path.read_text())["healthy"]["threshold"]
    if not by_name:
        rewrite(experiments, validation=None)
    flags = ("--threshold=healthy",) if by_name else ()
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", f"--logdir={experiments}", "--slices", 7, 8, *flags)
    assert done.code == 0, done.stderr
    assert f"threshold: {threshold:.6g}, the healthy threshold in" in done.stdout


def train_on(experiments: Path) -> None:
    shutil.copy(experiments / FORWARD / "ema_0.5_000004.pt", experiments / FORWARD / "ema_0.5_000006.pt")


def replace_weights(experiments: Path, name: str = FORWARD) -> None:
    """Write other weights under the name of those that were tested, as a training with --overwrite does."""
    path = experiments / name / "ema_0.5_000004.pt"
    state = torch.load(path)
    state[next(iter(state))] *= 1.01
    torch.save(state, path)


def forget_the_test(experiments: Path) -> None:
    shutil.rmtree(experiments / "results")


def rewrite(experiments: Path, **changes: object) -> None:
    path = experiments / "results" / RESULTS["cyclic_unet"] / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


STALE = {
    "never tested": (forget_the_test, ["no metrics.json in", RESULTS["cyclic_unet"]]),
    "trained on since": (train_on, ["with other weights", "ema_0.5_000004.pt", f"{FORWARD}/ema_0.5_000006.pt"]),
    "trained again": (replace_weights, ["with other weights than are now in", f"{FORWARD}/ema_0.5_000004.pt"]),
    "backward trained again": (
        lambda folder: replace_weights(folder, BACKWARD),
        ["with other weights than are now in", f"{BACKWARD}/ema_0.5_000004.pt"],
    ),
    "no validation slices": (
        lambda folder: rewrite(folder, validation=None, healthy=None),
        ["no validation or healthy threshold"],
    ),
    "nothing predicted": (
        lambda folder: rewrite(
            folder, **{name: {"threshold": None, "dice": 0.0, "dice_interval": [None, None]} for name in FROZEN}
        ),
        ["no validation or healthy threshold"],
    ),
    "sampled otherwise": (
        lambda folder: rewrite(folder, sampling_settings={"smooth": "none", "seed": 7}),
        ["computed with other sampling settings"],
    ),
    "damaged": (lambda folder: rewrite(folder, checkpoints="?"), ["metrics.json is damaged"]),
    **{
        f"a threshold that is {value!r}": (
            lambda folder, value=value: rewrite(
                folder, validation={"threshold": value, "dice": 0.5, "dice_interval": [0.4, 0.6]}
            ),
            ["metrics.json is damaged"],
        )
        for value in (float("nan"), float("inf"), -1.0, 1e-60, 1e60, True, "3")
    },
}


@pytest.mark.parametrize("why", STALE)
def test_a_missing_or_stale_threshold_is_refused(experiments, predict, tmp_path, why):
    spoil, phrases = STALE[why]
    spoil(experiments)
    flags = (f"--logdir={experiments}", "--input=flair", "--config.score_model.sampling.batch_size=4")
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", *flags)
    command = (
        f"run python modality_cyclic_test.py --dataset=phantom --input=flair --logdir={experiments} "
        "--config.score_model.sampling.batch_size=4 to find a threshold, or give --threshold"
    )
    expect_refusal(done, *phrases, command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("eta", 0.5),
        ("use_ddim", False),
        ("timestep_respacing", "ddim5"),
        ("stride", 4),
        ("score", "reconstructions"),
        ("smooth", "median3"),
    ],
)
def test_a_threshold_for_other_sampling_settings_is_refused(experiments, predict, tmp_path, key, value):
    path = experiments / "results" / RESULTS["mmccd"] / "metrics.json"
    metrics = json.loads(path.read_text())
    assert metrics["sampling_settings"][key] != value
    metrics["sampling_settings"][key] = value
    path.write_text(json.dumps(metrics))
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", f"--logdir={experiments}", *METHODS["mmccd"])
    expect_refusal(done, f"{path} was computed with other sampling settings: run python modality_cyclic_test.py")
    assert not (tmp_path / "out").exists()


VARIANTS = {
    "eta": ("mmccd", "--config.score_model.sampling.eta=0.5"),
    "seed": ("mmccd", "--seed=1"),
    "timesteps": ("mmccd", "--timestep_respacing=ddim5"),
    "checkpoint": ("cyclic_unet", "--checkpoint_forward={experiments}/{forward}/ema_0.5_000002.pt"),
}


@pytest.mark.parametrize("what", VARIANTS)
def test_each_setting_and_checkpoint_has_its_own_threshold(
    experiments, workspace, workdir, in_process, predict, tmp_path, what
):
    """Other test runs do not overwrite it, and other predictions do not use it."""
    method, variant = VARIANTS[what]
    shutil.copy(workspace / "experiments" / FORWARD / "ema_0.5_000002.pt", experiments / FORWARD)
    variant = variant.format(experiments=experiments, forward=FORWARD)
    flags = (f"--logdir={experiments}", *METHODS[method])
    scan, slices = "raw/C/C_flair.nii.gz", ("--slices", 7, 8)
    done = predict(scan, tmp_path / "out", *flags, variant, *slices)
    assert done.code == 2
    assert "no metrics.json in" in done.stderr
    before = (experiments / "results" / RESULTS[method] / "metrics.json").read_bytes()
    done = in_process(TEST, "--dataset=phantom", "--data_dir=slices", *flags, variant, cwd=workdir)
    assert done.code == 0, done.stderr
    assert (experiments / "results" / RESULTS[method] / "metrics.json").read_bytes() == before
    thresholds = set()
    for more in ((), (variant,)):
        done = predict(scan, tmp_path / "out", *flags, *more, *slices)
        assert done.code == 0, done.stderr
        thresholds.add(*[line for line in done.stdout.splitlines() if line.startswith("threshold: ")])
    assert len(thresholds) == 2


def change_data(experiments: Path, names: tuple[str, ...], **changes: object) -> None:
    """Edit the records of the slices that the translators were trained on."""
    for name in names:
        path = experiments / name / "config.json"
        record = json.loads(path.read_text())
        record["data"] |= changes
        path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("names", "grid", "phrase"),
    [
        ((BACKWARD,), GRID.to_json() | {"spacing": [1, 1, 1]}, "do not match: the grid of their slices is"),
        ((FORWARD, BACKWARD), {"axcodes": "LPS"}, f"{FORWARD}/config.json is damaged (data.grid"),
    ],
)
def test_grids_that_differ_or_are_invalid_are_refused(experiments, predict, tmp_path, names, grid, phrase):
    change_data(experiments, names, grid=grid)
    done = predict("raw/C/C_flair.nii.gz", tmp_path / "out", f"--logdir={experiments}")
    assert done.code == 2
    assert phrase in done.stderr
    assert "Traceback" not in done.stderr


def test_a_scan_is_normalised_as_the_training_slices_were(experiments, workdir, results, predict, tmp_path):
    """The quantiles come from the experiments, not from slices in the data set's default folder."""
    made_with = NORMALISATION | {"percentage_upper": 0.7}
    record = workdir / "datasets/phantom/subjects/X.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"made_with": made_with, "files": {}}))
    scan, flags = "raw/C/C_flair.nii.gz", (f"--logdir={experiments}", "--threshold=1", "--slices", 7, 8)
    for quantiles, same in ((NORMALISATION, True), (made_with, False)):
        change_data(experiments, (FORWARD, BACKWARD), normalisation=quantiles)
        done = predict(scan, tmp_path, *flags)
        assert done.code == 0, done.stderr
        found, expected = (voxels(load(folder, "C_flair"))[:, :, 7] for folder in (tmp_path, results["cyclic_unet"][0]))
        assert np.allclose(found, expected, rtol=1e-4, atol=1e-4) == same


# ----------------------------------------------------------------------------------------------------------
# Folders and processes


def test_a_damaged_scan_in_a_folder_does_not_stop_the_others(workdir, results, predict, tmp_path):
    for name, subject in (("a.nii.gz", "C"), ("b.nii.gz", "B")):
        shutil.copy(workdir / f"raw/{subject}/{subject}_flair.nii.gz", tmp_path / name)
    (tmp_path / "aa.nii").write_bytes(b"cut off")
    (tmp_path / ".hidden.nii").write_bytes(b"what file managers leave")
    (tmp_path / "note.txt").write_text("no scan")
    (tmp_path / "c_mask.nii").write_bytes(b"a mask of someone's")
    for _ in range(2):  # the second run skips the results that the first wrote among the scans
        done = predict(tmp_path, tmp_path)
        assert done.code == 1
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        assert len(lines) == 1
        assert lines[0].startswith(f"{PREDICT}: error: {tmp_path / 'aa.nii'} cannot be read")
        assert done.stdout.count("ml at or above the threshold") == 2
        written = {path.name for path in tmp_path.iterdir() if "_" in path.name} - {"c_mask.nii"}
        assert written == {
            f"{name}_{result}" for name in "ab" for result in ("anomaly.nii.gz", "mask.nii.gz", "report.png")
        }
    expected = voxels(load(results["cyclic_unet"][0], "C_flair"))
    np.testing.assert_array_equal(voxels(load(tmp_path, "a")), expected)


def test_another_scan_of_the_same_name_is_refused(workdir, predict, monkeypatch, tmp_path):
    """Results are replaced only if they come from the same voxels, whatever the scan's folder and compression."""
    for subject in ("B", "C"):
        (tmp_path / subject).mkdir()
        shutil.copy(workdir / f"raw/{subject}/{subject}_flair.nii.gz", tmp_path / subject / "flair.nii.gz")
    (tmp_path / "D").mkdir()
    (tmp_path / "D/flair.nii").write_bytes(gzip.decompress((tmp_path / "C/flair.nii.gz").read_bytes()))
    out, slices = tmp_path / "out", ("--slices", 7, 8)

    def written(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    assert predict(tmp_path / "C/flair.nii.gz", out, *slices).code == 0
    for scan in ("C/flair.nii.gz", "D/flair.nii", "C"):  # the last is a folder
        done = predict(tmp_path / scan, out, *slices, "--threshold=3")
        assert done.code == 0, done.stderr
    before = written(out)
    for scan in ("B/flair.nii.gz", "B"):
        done = predict(tmp_path / scan, out, *slices)
        expect_refusal(done, "out/flair_anomaly.nii.gz is not marked as a result of", "B/flair.nii.gz", "--output_dir")
        assert "passes" not in done.stdout
    assert written(out) == before

    def meanwhile(*args: object) -> np.ndarray:
        shutil.copytree(out, tmp_path / "late", dirs_exist_ok=True)
        return score_scan(*args)

    monkeypatch.setattr("scoring.scan.score_scan", meanwhile)
    done = predict(tmp_path / "B/flair.nii.gz", tmp_path / "late", *slices)
    expect_refusal(done, "late/flair_anomaly.nii.gz is not marked as a result of")
    assert written(tmp_path / "late") == before


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.randoms(use_true_random=False))
def test_a_damaged_result_is_nobodys_or_the_same_scans(results, workdir, tmp_path, rng):
    content = bytearray(gzip.decompress((results["cyclic_unet"][0] / "C_flair_mask.nii.gz").read_bytes()))
    intact, description = bytes(content), slice(148, 228)
    for _ in range(rng.randint(0, 3)):
        content[rng.choice([rng.randrange(352), rng.randrange(148, 200)])] = rng.randrange(256)
    (tmp_path / "damaged.nii").write_bytes(content[: rng.choice([len(content), rng.randrange(400)])])
    scans = [workdir / f"raw/{subject}/{subject}_flair.nii.gz" for subject in "CB"]
    found = [is_result(tmp_path / "damaged.nii", scan) for scan in scans]
    assert found in ([True, False], [False, False])
    if found[0]:
        assert content[description] == intact[description]
    elif content == intact:
        assert (tmp_path / "damaged.nii").stat().st_size < len(intact)


def test_two_processes_predict_the_same_as_one(workdir, results, repository, tmp_path):
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node=2"]
    flags = ("--dataset=phantom", "--gpu_id=cpu", "--scan=raw/C/C_flair.nii.gz", f"--output_dir={tmp_path}")
    flags += ("--scoring=published",)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [*command, str(repository / PREDICT), *flags],
        cwd=workdir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "on 2 × cpu" in done.stdout
    assert done.stdout.count("ml at or above the threshold") == 1
    expected = voxels(load(results["cyclic_unet"][0], "C_flair"))
    np.testing.assert_allclose(voxels(load(tmp_path, "C_flair")), expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Warnings


def skull_and_brain(litres: float, air: int = 0) -> np.ndarray:
    """Return an ellipsoid of this volume in a field of 240 × 240 × 200 mm, with 4 mm voxels."""
    position = (np.moveaxis(np.indices((60, 60, 50)), 0, -1) - [29.5, 29.5, 24.5]) * 4
    radius = (litres * 1e6 * 3 / 4 / np.pi) ** (1 / 3)
    inside = np.linalg.norm(position * [1, 0.9, 1 / 0.9], axis=-1) < radius
    rng = np.random.default_rng(0)
    return np.where(inside, rng.integers(300, 600, inside.shape), air * rng.integers(1, 20, inside.shape))


@pytest.mark.parametrize(
    ("litres", "air", "warned"),
    [(1.0, 0, False), (1.5, 0, False), (1.9, 0, False), (2.6, 0, True), (3.6, 0, True), (1.5, 1, True)],
)
def test_a_scan_that_is_not_skull_stripped_gives_a_warning(tmp_path, litres, air, warned):
    affine = np.diag([-4.0, -4, 4, 1])
    path = save(tmp_path / "head.nii.gz", skull_and_brain(litres, air).astype(np.int16), affine)
    scan = read_scan(path, SliceGeometry("LPS", (4.0,) * 3, (60, 60)), NORMALISATION, None)
    assert len(scan.warnings) == warned
    if warned:
        (warning,) = scan.warnings
        assert warning.startswith("more than 2.2 litres are non-zero, more than any brain: skull-strip it")


def test_a_cropped_brain_and_a_header_without_orientation_give_warnings(tmp_path, predict):
    wide = SHAPE[0] + 40
    affine = from_matvec(np.diag([-SPACING * SHAPE[0] / wide * 2, -SPACING, SPACING]), [0, 0, 0])
    volume = np.repeat(head(2), 3, axis=0)
    image = nibabel.Nifti1Image(volume, None)
    image.header.set_zooms((abs(affine[0, 0]), SPACING, SPACING))
    nibabel.save(image, tmp_path / "wide.nii.gz")
    done = predict(tmp_path / "wide.nii.gz", tmp_path, "--slices", 7, 8)
    assert done.code == 0, done.stderr
    assert "of the brain is outside the 32 × 32 px field of view" in done.stdout
    assert "the header has no orientation (sform and qform codes are 0); assuming LAS" in done.stdout


# ----------------------------------------------------------------------------------------------------------
# The report's slices


@pytest.mark.parametrize("axcodes", ["LPS", "RAI", "IRA", "PSL"])
def test_the_report_shows_slices_anterior_up_and_numbered_as_in_the_file(tmp_path, axcodes):
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt(axcodes))
    anomaly = np.zeros(SHAPE, np.float32)
    anomaly[18:21, 10:12, 4] = 8
    anomaly[18:21, 10:12, 9] = 3
    turned, turned_anomaly = (nibabel.Nifti1Image(volume, AFFINE).as_reoriented(turn) for volume in (head(2), anomaly))
    path = save(tmp_path / "scan.nii.gz", voxels(turned), turned.affine)
    scan, scores = read_scan(path, GRID, NORMALISATION, None), voxels(turned_anomaly)
    figure = draw_report(scan, scores, 5.0, "errors")
    first, second, scores_of_first = figure.axes[:3]
    numbers = [4, 9] if "S" in axcodes else [9, 4]
    assert first.get_title() == f"slice {numbers[0]}\n1.5 cm² marked, score ≤ 8"
    assert second.get_title() == f"slice {numbers[1]}\n0.0 cm² marked, score ≤ 3"
    rows, columns = np.nonzero(scores_of_first.images[0].get_array())
    left, front = np.argwhere(head(2)[:, :, [4, 9]].any(axis=2)).min(axis=0) - 2  # the first pixels shown
    shown = set(zip((columns + left).tolist(), (rows + front).tolist(), strict=True))
    assert shown == {(i, j) for i in (18, 19, 20) for j in (10, 11)}


def test_the_report_picks_slices_that_are_apart():
    marked = np.array([0, 5, 9, 8, 0, 0, 3, 0, 0, 0])
    scores = np.array([0, 2, 3, 9, 1, 0, 1, 2, 4, 0.5])
    assert pick_slices(marked, scores, 2) == [2, 6, 8, 4]
    assert pick_slices(marked, scores, 0) == [2, 3, 1, 6, 8, 7]
    assert len(pick_slices(np.ones(50), np.ones(50), 1)) == REPORT_SLICES
    assert pick_slices(np.zeros(5), np.zeros(5), 1) == [2]  # nothing marked: the middle slice


# ----------------------------------------------------------------------------------------------------------
# Invalid scans and arguments

SCAN = "--scan=raw/C/C_flair.nii.gz"
MISTAKES = {
    "no scan": ([], ["--scan"]),
    "no output": ([SCAN, "--output_dir"], ["--output_dir"]),
    "not there": (["--scan=raw/nobody.nii.gz"], ["raw/nobody.nii.gz does not exist"]),
    "another file": (["--scan=raw/brats_split_testing.txt"], ["no NIfTI volume", "testing.txt"]),
    "folder without volumes": (["--scan=raw"], ["no NIfTI volume", "raw"]),
    "text": (["--scan=bad/text.nii"], ["bad/text.nii cannot be read"]),
    "4D": (["--scan=bad/series.nii.gz"], ["bad/series.nii.gz must hold one 3D volume", "(8, 8, 8, 2)"]),
    "empty": (["--scan=bad/empty.nii.gz"], ["bad/empty.nii.gz cannot be scored", "every voxel is 0"]),
    "constant": (["--scan=bad/constant.nii.gz"], ["bad/constant.nii.gz cannot be scored", "quantiles"]),
    "speckled": (["--scan=bad/speckled.nii.gz"], ["bad/speckled.nii.gz cannot be scored", "quantiles are both 1"]),
    "not a number": (["--scan=bad/nan.nii.gz"], ["bad/nan.nii.gz cannot be scored", "not finite"]),
    "flat": (["--scan=bad/flat.nii.gz"], ["bad/flat.nii.gz cannot be scored", "is singular"]),
    "two of one name": (["--scan=bad/twice"], ["a.nii", "a.nii.gz have the same name", "rename"]),
    "remote scan": (["--scan=gs://bucket/a.nii"], ["copy it here first"]),
    "slices beyond": ([SCAN, "--slices", "3", "15"], ["--slices 3 15 exceeds", "14 axial slices"]),
    "slices reversed": ([SCAN, "--slices", "7", "3"], ["--slices must satisfy", "7 and 3"]),
    "slices below 0": ([SCAN, "--slices", "-1", "3"], ["--slices"]),
    "slices without brain": ([SCAN, "--slices", "0", "1"], ["no brain in --slices 0 1"]),
    "threshold no number": ([SCAN, "--threshold=high"], ["--threshold", "'high'"]),
    "threshold nan": ([SCAN, "--threshold=nan"], ["--threshold", "'nan'"]),
    "threshold inf": ([SCAN, "--threshold=inf"], ["--threshold", "'inf'"]),
    "threshold 0": ([SCAN, "--threshold=0"], ["--threshold", "'0'", "above 0"]),
    "output is a file": ([SCAN, "--output_dir=bad/text.nii"], ["--output_dir bad/text.nii is a file"]),
    "output below a file": ([SCAN, "--output_dir=bad/text.nii/x"], ["--output_dir", "cannot be written to"]),
    "threshold 0 in single precision": ([SCAN, "--threshold=1e-46"], ["'1e-46'", "above 0 in single precision"]),
    "threshold infinite in single precision": (
        [SCAN, "--threshold=1e39"],
        ["'1e39' is not", "a finite number above 0"],
    ),
    "affine in metres": (["--scan=bad/metres.nii.gz"], ["cannot be scored", "0.005 × 0.005 × 0.005 mm", "use mm"]),
    "another's mask": ([SCAN, "--output_dir=bad/masks"], ["C_flair_mask.nii.gz", "not marked as a result of raw/C"]),
    "another's anomaly": ([SCAN, "--output_dir=bad/anomaly"], ["C_flair_anomaly.nii.gz is not marked", "overwritten"]),
    "another's report": ([SCAN, "--output_dir=bad/report"], ["C_flair_report.png is not marked", "overwritten"]),
    "a folder in the way": ([SCAN, "--output_dir=bad/folder"], ["C_flair_report.png is not marked", "move it away"]),
    "no experiment": ([SCAN, "--logdir=nowhere"], [f"no experiment '{FORWARD}'", "train it first"]),
    "no slices flag": ([SCAN, "--data_dir=slices"], ["unknown argument", "--data_dir"]),
    "flag mistyped": ([SCAN, "--treshold=1"], ["did you mean '--threshold'?"]),
    "device": ([SCAN, "--gpu_id=foo"], ["--gpu_id", "'foo'"]),
}


@pytest.fixture(scope="module")
def invalid_scans(workdir) -> Path:
    volume = head(2)
    speckled = (volume != 0).astype(np.int16)  # after resampling, more than a tenth of the voxels are brighter
    speckled[::4, ::4] *= 2
    bad = workdir / "bad"
    for name, voxels, affine in (
        ("empty", volume * 0, AFFINE),
        ("constant", (volume != 0).astype(np.int16), AFFINE),
        ("speckled", speckled, AFFINE @ np.diag([0.8, 0.8, 1, 1])),
        ("nan", np.where(volume > 400, np.nan, volume).astype(np.float32), AFFINE),
        ("series", np.ones((8, 8, 8, 2), np.int16), AFFINE),
        ("twice/a", volume, AFFINE),
        ("metres", volume, np.diag([0.001, 0.001, 0.001, 1]) @ AFFINE),
        ("anomaly/C_flair_anomaly", volume.astype(np.float32), AFFINE),
    ):
        save(bad / f"{name}.nii.gz", voxels, affine)
    save(bad / "twice/a.nii", volume)
    flat = nibabel.Nifti1Image(volume, None)
    flat.header["sform_code"], flat.header["srow_x"], flat.header["srow_y"] = 1, [1, 0, 0, 0], [1, 0, 0, 0]
    flat.header["srow_z"] = [0, 0, 1, 0]
    flat.to_filename(bad / "flat.nii.gz")
    (bad / "text.nii").write_text("not a volume")
    save(bad / "masks/C_flair_mask.nii.gz", (volume != 0).astype(np.uint8))
    (bad / "report").mkdir()
    (bad / "report/C_flair_report.png").write_bytes(b"a picture of someone's")
    (bad / "folder/C_flair_report.png").mkdir(parents=True)
    return workdir


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_before_anything_is_written(invalid_scans, results, in_process, mistake):
    args, phrases = MISTAKES[mistake]
    before = {path: path.stat().st_mtime_ns for path in invalid_scans.rglob("*")}
    done = in_process(PREDICT, "--dataset=phantom", "--output_dir=new", *args, cwd=invalid_scans)
    expect_refusal(done, f"{PREDICT}: ", *phrases)
    assert {path: path.stat().st_mtime_ns for path in invalid_scans.rglob("*")} == before


def test_a_named_pipe_is_refused(predict, tmp_path):
    """Reading it would block forever."""
    os.mkfifo(tmp_path / "C_flair.nii.gz")
    done = predict(tmp_path / "C_flair.nii.gz", tmp_path / "out")
    expect_refusal(done, "C_flair.nii.gz is not a regular file")


def test_scans_may_have_any_name(workdir, results, predict, tmp_path):
    names = ("$\\nonsense_{$", "a$b", "caf\udce9")
    (tmp_path / "scans").mkdir()
    for name in names:
        shutil.copy(workdir / "raw/C/C_flair.nii.gz", tmp_path / f"scans/{name}.nii.gz")
    done = predict(tmp_path / "scans", tmp_path / "out", "--slices", 7, 8, pictures=True)
    assert done.code == 0, done.stderr
    for name in names:
        assert (tmp_path / "out" / f"{name}_report.png").is_file()

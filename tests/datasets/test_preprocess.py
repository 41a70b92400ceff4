"""Preprocessing: normalisation, choice of slices, and the command line on tiny volumes."""

import contextlib
import fcntl
import gzip
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.brats2021 import BraTS2021Dataset, find_slices
from datasets.cohorts import read_brats
from datasets.records import find_complete, load_records, read_lesion_flags, read_preprocessing, store
from datasets.splits import LIST_NAMES, read_list, split_off_validation, split_subjects
from datasets.subject import choose_slices, normalise
from tests.fuzz import spoil_json
from tests.scripts.conftest import REPOSITORY, Done, expect_refusal, run_here, run_process
from utils.cli import UserError

pytestmark = pytest.mark.xdist_group("preprocess")  # one process, so that cohorts are made once

SCRIPT = "datasets/brats_preprocess.py"
SHAPE = (24, 20, 12)
KINDS = ("flair", "t1", "t2", "seg")

# The tests preprocess slices [4, 9), to which the comments refer.
TUMOURS = {  # by slice: label and number of pixels
    "P_train": {2: (1, 9), 5: (4, 3)},  # healthy on 4, 6, 7, 8
    "P_sick": dict.fromkeys(range(12), (1, 1)),  # never healthy
    "P_val": {4: (1, 2), 6: (4, 8), 7: (2, 8), 9: (1, 40)},  # largest on 6, the first of two equal slices
    "P_test": {8: (2, 5), 3: (1, 30)},  # largest on 8
    "P_well": {3: (1, 30), 9: (2, 30)},  # no tumour in the range
}
SPLITS = {"train": ["P_train", "P_sick"], "val": ["P_val"], "test": ["P_test", "P_well"]}
CHOSEN = {"train": {"P_train": [4, 6, 7, 8]}, "val": {"P_val": [6]}, "test": {"P_test": [8]}}


# ----------------------------------------------------------------------------------------------------------
# Tiny cohorts


def save(path: Path, volume: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)


def make_subject(data_dir: Path, name: str, tumour: dict, shape: tuple = SHAPE, seed: int = 0) -> None:
    """Write int16 modalities, each with its own brain box and some negative voxels, and a uint8 seg."""
    rng = np.random.default_rng(seed)
    for border, modality in enumerate(("flair", "t1", "t2"), start=2):
        volume = np.zeros(shape, np.int16)
        inside = (slice(border, -border), slice(2, -border), slice(1, -1))
        volume[inside] = rng.integers(-30, 900, volume[inside].shape)
        save(data_dir / name / f"{name}_{modality}.nii.gz", volume)
    seg = np.zeros(shape, np.uint8)
    for z, (label, n_pixels) in tumour.items():
        seg[5:15, 5:15, z].flat[:n_pixels] = label  # basic slicing gives a view, so this writes to seg
    save(data_dir / name / f"{name}_seg.nii.gz", seg)


def write_lists(folder: Path, splits: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, subjects in splits.items():
        (folder / LIST_NAMES[part]).write_text("".join(f"{subject}\n" for subject in subjects))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Write the subjects of TUMOURS and the lists of SPLITS. Shared: copy the folder to change it."""
    data_dir = tmp_path_factory.mktemp("cohort")
    for seed, (name, tumour) in enumerate(TUMOURS.items()):
        make_subject(data_dir, name, tumour, seed=seed)
    write_lists(data_dir, SPLITS)
    return data_dir


def run_script(*args: object, cwd: Path = REPOSITORY) -> Done:
    return run_here(SCRIPT, "--workers=1", *args, cwd=cwd)


def preprocess(data_dir: Path, output_dir: Path, *args: object) -> Done:
    """Run the script, which must succeed, by default on slices [4, 9)."""
    result = run_script("--data_dir", data_dir, "--output_dir", output_dir, "--slices", 4, 9, *args, cwd=data_dir)
    assert (result.code, result.stderr) == (0, "")
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raw(data_dir: Path, subject: str, kind: str) -> np.ndarray:
    return np.asarray(nibabel.load(data_dir / subject / f"{subject}_{kind}.nii.gz").dataobj)


def untouched(data_dir: Path) -> None:
    pass


# ----------------------------------------------------------------------------------------------------------
# Normalisation

# 101 brain voxels, so that the 0.02 and 0.9 quantiles are exactly the third and the 91st smallest.
LADDER = np.concatenate([np.zeros(50), np.arange(1, 102)])
LADDER_BELOW_0 = np.concatenate([np.arange(-50, 0), np.zeros(50), np.arange(1, 52)])


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_normalise_matches_its_closed_form(dtype):
    image = normalise(LADDER.astype(dtype).reshape(1, 151, 1), 0.02, 0.9)
    assert image.dtype == np.float32
    assert image.shape == (1, 151, 1)
    value = dict(zip(LADDER, image.ravel(), strict=True))
    assert [value[0], value[1], value[2], value[3]] == [-3, -3, -3, -3]
    assert value[47] == 0
    assert value[91] == 3
    assert value[101] == pytest.approx(3 + 6 * 10 / 88)
    assert value[4] == pytest.approx(-3 + 6 / 88)
    assert (np.diff(image.ravel()[52:]) > 0).all()  # strictly, above the lower quantile


def test_normalise_counts_negative_voxels_as_brain():
    value = dict(zip(LADDER_BELOW_0, normalise(LADDER_BELOW_0.astype(np.int16), 0.02, 0.9), strict=True))
    assert [value[-50], value[-49], value[-48]] == [-3, -3, -3]
    assert value[-47] == pytest.approx(-3 + 6 / 89)
    assert value[-1] == pytest.approx(-3 + 6 * 47 / 89)
    assert value[0] == -3  # background stays the minimum, although some voxels were below it
    assert value[41] == 3


def test_normalise_ignores_the_amount_of_background_and_the_unit():
    rng = np.random.default_rng(0)
    brain = rng.uniform(1, 1000, 500)
    image = normalise(brain, 0.1, 0.8)
    np.testing.assert_allclose(normalise(np.append(brain, np.zeros(5000)), 0.1, 0.8)[:500], image)
    np.testing.assert_allclose(normalise(brain * 7.5, 0.1, 0.8), image, atol=1e-6)


@pytest.mark.parametrize(
    ("volume", "message"),
    [
        ([0, 0], "every voxel is 0"),
        ([0, 5, 5], "both 5"),
        ([0, 9.67e24, 9.67e24 * (1 + 1e-7)], "both 9.67"),  # a constant after the rounding of resampling
        ([1, np.nan], "not finite"),
        ([1, np.inf], "not finite"),
    ],
)
def test_normalise_refuses_invalid_volumes(volume, message):
    with pytest.raises(ValueError, match=message):
        normalise(np.array(volume, dtype=np.float64), 0.02, 0.9)


# ----------------------------------------------------------------------------------------------------------
# Choice of slices


@pytest.mark.parametrize(
    ("areas", "usable", "train", "test"),
    [
        ([0, 2, 0, 5], [1, 1, 1, 1], [0, 2], [3]),
        ([3, 5, 5, 0], [1, 1, 1, 1], [3], [1]),
        ([0, 0, 0, 0], [1, 0, 1, 1], [0, 2, 3], []),
        ([1, 1, 1, 1], [1, 1, 1, 1], [], [0]),
        ([1, 9, 2, 0], [1, 0, 1, 0], [], [2]),
    ],
)
def test_choose_slices(areas, usable, train, test):
    seg = np.zeros((4, 5, 4), np.uint8)
    for index in range(4):
        seg[1:4, :3, index] = 4 * (np.arange(9) < areas[index]).reshape(3, 3)
    usable = np.array(usable, bool)
    assert choose_slices("train", seg, usable) == train
    assert choose_slices("test", seg, usable) == choose_slices("val", seg, usable) == test
    assert choose_slices("train", seg, usable, "all") == train
    shown = usable.nonzero()[0].tolist()
    assert choose_slices("test", seg, usable, "all") == choose_slices("val", seg, usable, "all") == shown


# ----------------------------------------------------------------------------------------------------------
# The command line


def test_command_line_writes_the_expected_slices(cohort, tmp_path):
    result = preprocess(cohort, tmp_path / "out", "--modality", "flair,t2", "--percentage_lower", 0.1)

    expected = {}
    for part, subjects in CHOSEN.items():
        for subject, indices in subjects.items():
            volumes = {kind: raw(cohort, subject, kind) for kind in KINDS}
            stacks = {kind: normalise(volumes[kind], 0.1, 0.9) for kind in ("flair", "t2")}
            stacks["seg"] = volumes["seg"]
            stacks["brainmask"] = ((volumes["flair"] != 0) | (volumes["t2"] != 0)).astype(np.uint8)
            for kind, stack in stacks.items():
                for z in indices:
                    expected[f"{part}/{kind}/{subject}_{kind}_{z}.npy"] = stack[:, :, z]

    paths = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.npy")]
    written = {path.as_posix(): np.load(tmp_path / "out" / path) for path in paths}
    assert sorted(written) == sorted(expected)
    for path, image in expected.items():
        assert written[path].dtype == (np.float32 if path.split("/")[1] in ("flair", "t2") else np.uint8)
        np.testing.assert_array_equal(written[path], image, err_msg=path)
    assert set(np.unique(written["val/seg/P_val_seg_6.npy"])) == {0, 4}

    assert "5 of 5 subjects" in result.stdout
    assert "train: subjects read: 2, slices written: 4\n" in result.stdout
    assert "val: subjects read: 1, slices written: 1\n" in result.stdout
    assert "test: subjects read: 2, slices written: 1\n" in result.stdout
    assert "train: left out, no tumour-free slice in slices 4 to 8: 1 (P_sick)\n" in result.stdout
    assert "test: left out, no tumour in slices 4 to 8: 1 (P_well)\n" in result.stdout
    assert "--slices 3 9 would include 1 of the subjects left out\n" in result.stdout
    assert "warning: t2 is 0 in more than 10% of the brain: 5 (P_sick, P_test, P_train, P_val, P_well)" in result.stdout


def test_all_test_slices_show_brain_with_or_without_a_tumour(cohort, finished, tmp_path):
    data_dir, out = Path(shutil.copytree(cohort, tmp_path / "raw")), tmp_path / "out"
    for border, modality in enumerate(("flair", "t1", "t2"), start=1):  # brains of the same slices
        save(data_dir / "P_low" / f"P_low_{modality}.nii.gz", raw(cohort, "P_val", modality) * (np.arange(12) < 7))
        save(data_dir / "P_void" / f"P_void_{modality}.nii.gz", raw(cohort, "P_val", modality) * (np.arange(12) < 4))
        healthy = np.roll(raw(cohort, "P_val", modality), border, axis=0)
        save(data_dir / "P_healthy" / f"P_healthy_{modality}.nii.gz", healthy)
    for name in ("P_low", "P_void", "P_healthy"):
        save(data_dir / name / f"{name}_seg.nii.gz", np.zeros(SHAPE, np.uint8))
    lists = {"train": SPLITS["train"], "val": ["P_val", "P_low"], "test": ["P_test", "P_well", "P_void", "P_healthy"]}
    write_lists(data_dir, lists)
    result = preprocess(data_dir, out, "--test_slices", "all")

    numbers = {
        name: sorted(int(path.stem.rpartition("_")[2]) for path in out.glob(f"*/seg/{name}_*"))
        for names in lists.values()
        for name in names
    }
    every = [4, 5, 6, 7, 8]
    assert numbers == CHOSEN["train"] | {
        **{"P_sick": [], "P_val": every, "P_low": [4, 5, 6]},
        **{"P_test": every, "P_well": every, "P_void": [], "P_healthy": every},
    }
    largest = {name: data for name, data in contents(finished).items() if name.endswith(".npy")}
    assert largest.items() <= contents(out).items()
    assert "test: left out, no brain in slices 4 to 8: 1 (P_void)\n" in result.stdout
    assert "--slices 3 9 would include 1 of the subjects left out\n" in result.stdout
    assert "val: left out" not in result.stdout
    assert "--test_slices" not in result.stdout
    assert {record.made_with["test_slices"] for record in load_records(out).values()} == {"all"}
    # P_well's lesions are outside the slices.
    healthy = dict.fromkeys(("P_low", "P_void", "P_healthy"), False)
    assert read_lesion_flags(out) == dict.fromkeys(TUMOURS, True) | healthy


@pytest.mark.parametrize(
    ("subjects", "splits", "said"),
    [
        ({"A": {5: (1, 3)}, "B": {}}, {"val": ["A"], "test": ["A2", "B"]}, True),  # B is healthy
        ({"A": {5: (1, 3)}, "B": {2: (1, 3)}}, {"val": ["A"], "test": ["A2", "B"]}, False),  # a lesion elsewhere
        ({"A": {5: (1, 3)}, "B": {2: (1, 3)}}, {"val": ["B"], "test": ["A"]}, True),  # nobody is left in val
        ({"A": {5: (1, 3)}, "B": dict.fromkeys(range(12), (1, 1))}, {"train": ["B"], "test": ["A"]}, False),
    ],
)
def test_summary_names_the_flag_that_keeps_subjects_without_a_tumour(tmp_path, subjects, splits, said):
    for seed, name in enumerate(("A", "A2", "B")):
        make_subject(tmp_path / "raw", name, subjects[name[0]], seed=seed)
    write_lists(tmp_path / "raw", {"train": [], "val": [], "test": []} | splits)
    line = "--test_slices all keeps val and test subjects without a tumour, healthy ones included\n"
    for _ in range(2):  # also if the subjects have already been preprocessed
        assert (line in preprocess(tmp_path / "raw", tmp_path / "out").stdout) is said
    assert line not in preprocess(tmp_path / "raw", tmp_path / "all", "--test_slices", "all").stdout


def test_brain_mask_is_the_union_of_the_requested_modalities(cohort, tmp_path):
    preprocess(cohort, tmp_path / "two", "--modality", "t1,t2")
    preprocess(cohort, tmp_path / "one", "--modality", "t2")
    name = "val/brainmask/P_val_brainmask_6.npy"
    t1, t2 = (raw(cohort, "P_val", modality)[:, :, 6] != 0 for modality in ("t1", "t2"))
    assert (t1 & ~t2).any()
    np.testing.assert_array_equal(np.load(tmp_path / "two" / name), t1 | t2)
    np.testing.assert_array_equal(np.load(tmp_path / "one" / name), t2)


def test_quantiles_are_computed_over_the_whole_volume(tmp_path):
    make_subject(tmp_path / "raw", "A", {})
    flair = raw(tmp_path / "raw", "A", "flair")
    flair[:, :, :4] *= 20  # brighter outside the range of slices
    save(tmp_path / "raw" / "A" / "A_flair.nii.gz", flair)
    write_lists(tmp_path / "raw", {"train": ["A"], "val": [], "test": []})
    preprocess(tmp_path / "raw", tmp_path / "out", "--modality", "flair")
    image = np.load(tmp_path / "out/train/flair/A_flair_4.npy")
    np.testing.assert_array_equal(image, normalise(flair, 0.02, 0.9)[:, :, 4])


def test_scaled_and_uncompressed_volumes_are_read(cohort, tmp_path):
    data_dir = tmp_path / "raw"
    shutil.copytree(cohort, data_dir)
    plain = preprocess(data_dir, tmp_path / "plain").stdout
    for kind, slope, inter in (("flair", 2.0, 0.0), ("t1", 1.0, 40.0), ("seg", 1.0, 0.0)):
        path = data_dir / "P_val" / f"P_val_{kind}.nii.gz"
        volume = raw(data_dir, "P_val", kind)
        path.unlink()
        image = nibabel.Nifti1Image((volume - inter).astype(volume.dtype), np.eye(4))
        image.header.set_slope_inter(slope, inter)
        nibabel.save(image, path.with_suffix(""))
    assert preprocess(data_dir, tmp_path / "scaled").stdout == plain.replace("plain", "scaled")
    for kind, volume in (("flair", raw(cohort, "P_val", "flair") * 2.0), ("t1", raw(cohort, "P_val", "t1"))):
        image = np.load(tmp_path / f"scaled/val/{kind}/P_val_{kind}_6.npy")
        np.testing.assert_array_equal(image, normalise(volume, 0.02, 0.9)[:, :, 6])
    seg = "val/seg/P_val_seg_6.npy"
    assert (tmp_path / "scaled" / seg).read_bytes() == (tmp_path / "plain" / seg).read_bytes()


def rename(path: Path, suffix: str) -> None:
    """Give a gzipped volume another suffix, without changing the file."""
    path.rename(path.with_name(path.name.replace(".nii.gz", suffix)))


UNUSUAL = {  # the kind, the change, the sentence
    "trailing axes": (
        "t1",
        lambda path: save(path, np.asarray(nibabel.load(path).dataobj)[..., None, None]),
        "t1: the volume has trailing axes of length 1, which are left out",
    ),
    "gzipped, by its name not": (
        "t1",
        lambda path: rename(path, ".nii"),
        "t1: the file is gzipped, contrary to its name",
    ),
    "not gzipped, by its name so": (
        "flair",
        lambda path: path.write_bytes(gzip.decompress(path.read_bytes())),
        "flair: the file is not gzipped, contrary to its name",
    ),
    "labels nearly whole": (
        "seg",
        lambda path: save(path, np.asarray(nibabel.load(path).dataobj) * np.float32(1.00588)),
        "seg: labels up to 0.05 off whole numbers are rounded",
    ),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_volumes_give_the_same_slices_and_a_warning(cohort, finished, tmp_path, case):
    kind, change, sentence = UNUSUAL[case]
    data_dir, out = Path(shutil.copytree(cohort, tmp_path / "raw")), tmp_path / "out"
    change(data_dir / f"P_val/P_val_{kind}.nii.gz")
    assert f"warning: {sentence}: 1 (P_val); check these volumes\n" in preprocess(data_dir, out).stdout
    slices = {name: data for name, data in contents(finished).items() if name.endswith(".npy")}
    assert {name: data for name, data in contents(out).items() if name.endswith(".npy")} == slices


def test_slices_where_a_modality_shows_no_brain_are_left_out(cohort, tmp_path):
    """In two slices one modality is 0, and in one it is as dark as the lower quantile."""
    data_dir = Path(shutil.copytree(cohort, tmp_path / "raw"))
    for subject, modality, z, change in (
        ("P_train", "t2", 6, lambda brain: 0 * brain),
        ("P_train", "t1", 7, lambda brain: 0 * brain - 30),  # the darkest voxels elsewhere
        ("P_val", "flair", 6, lambda brain: 0 * brain),
    ):
        volume = raw(data_dir, subject, modality).copy()
        volume[..., z] = np.where(volume[..., z], change(volume[..., z]), 0)
        save(data_dir / subject / f"{subject}_{modality}.nii.gz", volume)
    stdout = preprocess(data_dir, tmp_path / "out").stdout
    written = sorted(path.name for path in tmp_path.glob("out/*/seg/*"))
    # 7 has the same number of tumour pixels as 6.
    assert written == [f"P_{which}.npy" for which in ("test_seg_8", "train_seg_4", "train_seg_8", "val_seg_7")]
    assert "warning: t2 has empty slices between others: 1 (P_train)" in stdout


def test_files_depend_neither_on_workers_nor_on_an_earlier_run(cohort, tmp_path):
    preprocess(cohort, tmp_path / "one", "--workers", 1)
    preprocess(cohort, tmp_path / "two", "--workers", 2)
    preprocess(cohort, tmp_path / "again", "--slices", 2, 7, "--percentage_upper", 0.7)
    other_settings = contents(tmp_path / "again")
    preprocess(cohort, tmp_path / "again", "--overwrite")
    assert contents(tmp_path / "one") != other_settings
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "again")


# ----------------------------------------------------------------------------------------------------------
# Running again


def listing(folder: Path) -> dict[Path, int]:
    """Return the modification time of each file and folder."""
    return {path: path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory) -> Path:
    """Preprocess the cohort. Shared: copy the folder to change it."""
    output_dir = tmp_path_factory.mktemp("finished")
    preprocess(cohort, output_dir)
    return output_dir


@pytest.fixture
def output_dir(finished, tmp_path) -> Path:
    """Return a copy of the preprocessed cohort."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.mark.parametrize("modalities", ["t2,flair,t1", "t1,t2,flair"])
def test_running_again_changes_nothing(cohort, output_dir, modalities):
    before = listing(output_dir)
    result = preprocess(cohort, output_dir, "--modality", modalities)
    assert listing(output_dir) == before
    assert "already preprocessed: 5 of 5 subjects\n" in result.stdout
    assert "train: subjects read: 0, slices written: 0, subjects already preprocessed: 2\n" in result.stdout
    assert "train: left out, no tumour-free slice in slices 4 to 8: 1 (P_sick)\n" in result.stdout


def test_generated_lists_are_not_rewritten(unlisted, tmp_path):
    preprocess(unlisted, tmp_path / "out", "--slices", 4, 6)
    before = listing(tmp_path / "out")
    preprocess(unlisted, tmp_path / "out", "--slices", 4, 6)
    assert listing(tmp_path / "out") == before


SLICE = "train/t1/P_train_t1_6.npy"
INCOMPLETE = {
    "slice gone": lambda out: (out / SLICE).unlink(),
    "slice cut off": lambda out: (out / SLICE).write_bytes((out / SLICE).read_bytes()[:100]),
    "slice too many": lambda out: shutil.copy(out / SLICE, out / "train/t1/P_train_t1_5.npy"),
    "no record": lambda out: (out / "subjects/P_train.json").unlink(),
    "record cut off": lambda out: (out / "subjects/P_train.json").write_text('{"made_with": {'),
    "record of another kind": lambda out: (out / "subjects/P_train.json").write_text("[1]"),
    "record of no such test slices": lambda out: edit_records(
        out, lambda record: record.update(test_slices=3), "P_train"
    ),
    "record of half a lesion": lambda out: edit_records(out, lambda record: record.update(lesion=0.5), "P_train"),
    "record of sizes in words": lambda out: (out / "subjects/P_train.json").write_text(
        '{"made_with": {}, "files": {"train/t1/P_train_t1_6.npy": "128 bytes"}}'
    ),
    "half written": lambda out: shutil.copytree(out / "train/t1", out / ".partial"),
    "slices removed by hand": lambda out: [shutil.rmtree(out / part) for part in LIST_NAMES],
    "record of somebody gone": lambda out: (out / "subjects/P_gone.json").write_text(
        (out / "subjects/P_train.json").read_text().replace("P_train", "P_gone")
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_incomplete_subjects_are_made_again_and_the_rest_left_alone(cohort, finished, output_dir, case):
    INCOMPLETE[case](output_dir)
    before = listing(output_dir)
    preprocess(cohort, output_dir)
    assert contents(output_dir) == contents(finished)
    if case != "slices removed by hand":
        after = listing(output_dir)
        others = [path for path in after if path.is_file() and "P_train" not in path.name]
        assert {path: after[path] for path in others} == {path: before[path] for path in others}


def modality_changed(data_dir: Path) -> None:
    save(data_dir / "P_val" / "P_val_t1.nii.gz", raw(data_dir, "P_val", "t1") + 1)


CHANGES = {
    "fewer modalities": (untouched, SPLITS, ("--modality", "t2"), "--modality flair,t1,t2, not t2"),
    "quantile": (untouched, SPLITS, ("--percentage_upper", "0.7"), "--percentage_upper 0.9, not 0.7"),
    "other quantile": (untouched, SPLITS, ("--percentage_lower", "0"), "--percentage_lower 0.02, not 0"),
    "slices": (untouched, SPLITS, ("--slices", "4", "8"), "--slices 4 9, not 4 8"),
    "test slices": (untouched, SPLITS, ("--test_slices", "all"), "--test_slices largest, not all"),
    "subject gone": (untouched, {**SPLITS, "train": ["P_sick"]}, (), "P_train, which is not in any split list now"),
    "other split": (
        untouched,
        {"train": ["P_train"], "val": ["P_val", "P_sick"], "test": ["P_test", "P_well"]},
        (),
        "P_sick, which was in the train split and is now in val",
    ),
    "other volume": (modality_changed, SPLITS, (), "P_val, made from a different t1"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_slices_of_a_different_run_are_refused(cohort, output_dir, tmp_path, case):
    edit, lists, args, difference = CHANGES[case]
    data_dir = Path(shutil.copytree(cohort, tmp_path / "raw"))
    edit(data_dir)
    write_lists(data_dir, lists)
    before = listing(output_dir)
    result = run_script("--data_dir", data_dir, "--output_dir", output_dir, "--slices", 4, 9, *args)
    expect_refusal(result, difference, str(output_dir), "--overwrite", "another --output_dir")
    assert listing(output_dir) == before


def edit_records(output_dir: Path, edit: Callable[[dict], object], subject: str = "*") -> None:
    for path in (output_dir / "subjects").glob(f"{subject}.json"):
        record = json.loads(path.read_text())
        edit(record["made_with"])
        path.write_text(json.dumps(record))


def test_records_of_earlier_versions_count_as_the_largest_slices(cohort, output_dir):
    edit_records(output_dir, lambda made_with: [made_with.pop(key) for key in ("test_slices", "lesion", "rules")])
    before = listing(output_dir)
    assert "already preprocessed: 5 of 5 subjects\n" in preprocess(cohort, output_dir).stdout
    assert read_lesion_flags(output_dir) == {}
    args = ("--data_dir", cohort, "--output_dir", output_dir, "--slices", 4, 9)
    result = run_script(*args, "--test_slices", "all")
    expect_refusal(result, "--test_slices largest, not all", "--overwrite")
    assert listing(output_dir) == before
    edit_records(output_dir, lambda made_with: made_with.update(test_slices="all"))
    expect_refusal(run_script(*args), "--test_slices all, not largest", "--overwrite")


def test_a_slice_that_changed_since_it_was_written_is_named_when_it_is_loaded(finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    kinds = ("flair", "t2")
    BraTS2021Dataset(out, "train", kinds, 16)
    assert "warning" not in capsys.readouterr().out
    path = out / "train/t2/P_train_t2_6.npy"
    np.save(path, np.load(path)[::-1])  # of the same size
    BraTS2021Dataset(out, "train", kinds, 16)
    warning = "warning: slices changed since they were preprocessed: 1, first train/t2/P_train_t2_6.npy\n"
    assert warning in capsys.readouterr().out
    for record in (out / "subjects").iterdir():  # as in earlier versions
        content = json.loads(record.read_text())
        del content["crc32"]
        record.write_text(json.dumps(content))
    BraTS2021Dataset(out, "train", kinds, 16)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "before", "now"),
    [
        ("percentage_lower", 0.02, 0.1),
        ("percentage_upper", 0.9, 0.8),
        ("test_slices", "largest", "all"),
        ("rules", 1, 2),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_slices_of_different_runs_are_neither_trained_nor_tested_on(output_dir, key, before, now, recorded):
    """Records of earlier versions lack some of the keys."""
    if not recorded and key in ("test_slices", "rules"):
        edit_records(output_dir, lambda made_with: made_with.pop(key))
    edit_records(output_dir, lambda made_with: made_with.update({key: before}), "P_train")
    read_preprocessing(output_dir)
    edit_records(output_dir, lambda made_with: made_with.update({key: now}), "P_val")
    for part in ("train", "test"):
        with pytest.raises(UserError, match="mixes slices that do not belong together") as refused:
            BraTS2021Dataset(output_dir, part, ["t1", "seg"], 16, progress=False)
        [other] = {name for name in TUMOURS if f"{name} with {key} {before}" in str(refused.value)}
        assert other != "P_val"
        assert f"P_val with {key} {now}" in str(refused.value)
        assert f"{output_dir} " in str(refused.value)
        assert "--overwrite" in str(refused.value)


SETTINGS = {"percentage_lower": 0.1, "percentage_upper": 0.8, "test_slices": "all", "rules": 2}  # other ones


def test_any_record_is_read_left_out_or_refused_in_one_sentence(output_dir):
    """Damage one of five records. Its settings are those of the others, or the folder is refused."""
    shared = read_preprocessing(output_dir)
    path, outcomes = output_dir / "subjects/P_val.json", dict.fromkeys(("read", "left out", "refused"), 0)
    record = json.loads(path.read_text())
    del record["made_with"]["volumes"]  # else most damage is to checksums, and to sizes of files
    record["files"] = dict([record["files"].popitem()])

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, 10**9).map(random.Random))
    def check(rng):
        changed = dict(rng.sample(sorted(SETTINGS.items()), rng.randrange(2)))
        text = json.dumps(record | {"made_with": record["made_with"] | changed})
        path.write_bytes(spoil_json(text, rng).encode("utf-8", "replace"))
        others = set(TUMOURS) - {"P_val"}
        assert others <= set(find_complete(output_dir)) <= set(TUMOURS)
        assert others <= set(read_lesion_flags(output_dir)) <= set(TUMOURS)
        try:
            found, refusal = read_preprocessing(output_dir), ""
        except UserError as error:
            refusal = str(error)
        if refusal:
            pair = r"P_\w+ with (\w+) .* and P_val with \1 .*"
            assert re.fullmatch(rf"{output_dir} mixes slices .*, {pair}: preprocess again with --overwrite", refusal)
            outcomes["refused"] += 1
            return
        assert found["normalisation"] == shared["normalisation"]
        assert found["grid"] in (shared["grid"], None)
        outcomes["read" if load_records(output_dir)["P_val"] else "left out"] += 1

    check()
    assert min(outcomes.values()) > 20, f"one-sided examples: {outcomes}"


@pytest.mark.parametrize("recorded", [True, False])
def test_slices_of_other_rules_are_replaced_with_overwrite_only(cohort, finished, output_dir, recorded):
    """Records without rules count as the first version of them."""
    if not recorded:
        edit_records(output_dir, lambda made_with: made_with.pop("rules"))
        assert "already preprocessed: 5 of 5 subjects\n" in preprocess(cohort, output_dir).stdout
    edit_records(output_dir, lambda made_with: made_with.update(rules=2), "P_val")
    before = listing(output_dir)
    result = run_script("--data_dir", cohort, "--output_dir", output_dir, "--slices", 4, 9)
    expect_refusal(result, f"{output_dir} contains P_val, made by another version", "pass --overwrite")
    assert listing(output_dir) == before
    preprocess(cohort, output_dir, "--overwrite")
    assert contents(output_dir) == contents(finished)


def test_overwrite_removes_the_earlier_slices(cohort, output_dir, tmp_path):
    data_dir = Path(shutil.copytree(cohort, tmp_path / "raw"))
    write_lists(data_dir, {"train": ["P_train"], "val": [], "test": ["P_sick"]})
    args = ("--modality", "t1,t2", "--slices", 2, 7)
    preprocess(data_dir, output_dir, *args, "--overwrite")
    preprocess(data_dir, tmp_path / "fresh", *args)
    assert contents(output_dir) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["val/t1ce/P_val_t1ce_6.npy", "val/t1/P_train_t1_6.npy", "train/t1/note_t1_.npy"])
def test_slice_without_a_record_is_refused(cohort, output_dir, name):
    (output_dir / name).parent.mkdir(exist_ok=True)
    (output_dir / name).write_text("")
    before = listing(output_dir)
    result = run_script("--data_dir", cohort, "--output_dir", output_dir, "--slices", 4, 9)
    expect_refusal(result, str(output_dir / name))
    assert listing(output_dir) == before


def test_concurrent_runs_are_refused(cohort, output_dir):
    with (output_dir / ".lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        args = ("--data_dir", cohort, "--output_dir", output_dir, "--slices", 4, 9)
        result = run_process(REPOSITORY / SCRIPT, *args, cwd=REPOSITORY)
    expect_refusal(result, "another process is writing to", str(output_dir))


def run_killed(n: int, output_dir: Path, *args: object) -> int:
    """Run the script in a fork, kill it just before its n-th change to the output folder, and return its exit code.

    The fork's workers inherit the pipe, so it closes only when they have ended.
    """
    steps = itertools.count(1)

    def kill(event: str, args: tuple) -> None:
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        changes = event in ("os.rename", "os.remove", "os.mkdir", "shutil.rmtree")
        if (writes or changes) and str(args[0]).startswith(str(output_dir)) and next(steps) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.addaudithook(kill)
            os._exit(run_here(SCRIPT, "--output_dir", output_dir, *args, cwd=REPOSITORY).code)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def loadable_subjects(output_dir: Path, kinds: tuple[str, str]) -> set[frozenset[str]]:
    """Return the slices of each subject that the dataset finds in an output folder; none in a split that it refuses."""
    subjects = set()
    for part in LIST_NAMES:
        with contextlib.suppress(UserError):
            names = [found["name"] for found in find_slices(output_dir / part, kinds)]
            groups = itertools.groupby(names, lambda name: name.rpartition("_")[0])
            subjects |= {frozenset(group) for _, group in groups}
    return subjects


@pytest.mark.parametrize("overwrite", [False, True])
def test_run_killed_at_any_moment_resumes_to_the_same_files(cohort, finished, tmp_path, overwrite):
    output_dir = tmp_path / "out"
    args = ["--data_dir", cohort, "--slices", 4, 9, "--workers", 2]
    earlier = tmp_path / "earlier"
    preprocess(cohort, earlier, "--slices", 3, 8, "--percentage_upper", 0.7)
    if overwrite:
        shutil.copytree(earlier, output_dir)
        args.append("--overwrite")
    pairs = list(itertools.permutations(("flair", "t1", "t2", "seg", "brainmask"), 2))
    allowed = {pair: loadable_subjects(finished, pair) | loadable_subjects(earlier, pair) for pair in pairs}
    assert all(len(subjects) > 3 for subjects in allowed.values())
    old, new = ({path.read_bytes() for path in folder.glob("*/flair/*")} for folder in (earlier, finished))
    assert not old & new

    for n in np.random.default_rng(0).integers(1, 70, 6):
        assert run_killed(n, output_dir, *args) == -signal.SIGKILL
        present = {path.read_bytes() for path in output_dir.glob("*/flair/*")}
        assert present <= old or present <= new
        assert all(loadable_subjects(output_dir, pair) <= complete for pair, complete in allowed.items())
    assert run_killed(0, output_dir, *args) == 0
    assert contents(output_dir) == contents(finished)


@pytest.mark.parametrize("n", range(1, 13))
def test_interrupted_store_leaves_no_partial_subject(tmp_path, monkeypatch, n):
    """Interrupt each of the moves that put one subject in place."""
    kinds = ("flair", "t1", "seg")
    slices = {f"{kind}/A_{kind}_{z}.npy": np.zeros((2, 2)) for kind in kinds for z in (4, 5, 6, 7)}
    for kind in kinds:
        (tmp_path / "train" / kind).mkdir(parents=True)
    (tmp_path / "subjects").mkdir()
    moves = itertools.count(1)
    replace = Path.replace

    def break_off(path: Path, target: Path) -> None:
        if next(moves) == n:
            raise KeyboardInterrupt
        replace(path, target)

    monkeypatch.setattr(Path, "replace", break_off)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, "train", "A", {}, slices)
    complete = frozenset({"A_4", "A_5", "A_6", "A_7"})
    for pair in itertools.permutations(kinds, 2):
        assert loadable_subjects(tmp_path, pair) <= {complete}
    assert not find_complete(tmp_path)


def test_failed_write_is_reported_and_leaves_no_file(tmp_path):
    """A limit on the file size stands in for a full disk."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        with pytest.raises(UserError, match="cannot be written to \\(File too large\\)"):
            store(tmp_path, "train", "A", {}, {"flair/A_flair_4.npy": np.zeros((100, 100))})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------
# Choice of subjects


@pytest.fixture(scope="module")
def unlisted(tmp_path_factory) -> Path:
    """Write twelve subjects without split lists, each with a tumour on slice 5."""
    data_dir = tmp_path_factory.mktemp("unlisted")
    for index in range(12):
        make_subject(data_dir, f"Q_{index:02d}", {5: (1, 3)}, shape=(16 + index, 12, 7), seed=index)
    return data_dir


def subjects_written(output_dir: Path) -> dict[str, list[str]]:
    return {
        part: sorted({path.name[: -len("_seg_5.npy")] for path in (output_dir / part / "seg").iterdir()})
        for part in LIST_NAMES
    }


def test_without_lists_a_split_is_made_and_written(unlisted, tmp_path):
    preprocess(unlisted, tmp_path / "out", "--slices", 4, 6)
    splits = split_subjects(list(read_brats(unlisted).subjects))
    assert subjects_written(tmp_path / "out") == splits
    assert {part: read_list(tmp_path / "out" / name) for part, name in LIST_NAMES.items()} == splits


def test_without_a_validation_list_it_is_split_off_training(unlisted, tmp_path):
    names = list(read_brats(unlisted).subjects)
    (tmp_path / "train.txt").write_text("\n".join(names[:9]))
    (tmp_path / "test.txt").write_text("\n".join(names[9:11]))
    result = preprocess(
        *(unlisted, tmp_path / "out", "--slices", 4, 6),
        *("--train_split", tmp_path / "train.txt", "--test_split", tmp_path / "test.txt"),
    )
    training, validation = split_off_validation(names[:9])
    assert subjects_written(tmp_path / "out") == {"train": training, "val": validation, "test": names[9:11]}
    assert not list((tmp_path / "out").glob("*.txt"))
    assert "11 of 12 subjects" in result.stdout
    assert "validation split off from training by hash" in result.stdout


def test_lists_in_datasets_are_found_but_those_in_data_dir_take_precedence(unlisted, tmp_path):
    names = list(read_brats(unlisted).subjects)
    args = ("--data_dir", tmp_path / "raw", "--slices", 4, 6, "--output_dir")
    shutil.copytree(unlisted, tmp_path / "raw")
    in_datasets = {"train": names[:2], "val": names[2:3], "test": names[3:4]}
    write_lists(tmp_path / "datasets", in_datasets)
    assert run_script(*args, tmp_path / "first", cwd=tmp_path).code == 0
    assert subjects_written(tmp_path / "first") == in_datasets

    in_data_dir = {"train": names[5:6], "val": names[6:7], "test": names[7:8]}
    write_lists(tmp_path / "raw", in_data_dir)
    assert run_script(*args, tmp_path / "second", cwd=tmp_path).code == 0
    assert subjects_written(tmp_path / "second") == in_data_dir


def test_single_test_subject_is_enough(unlisted, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("Q_03\n")
    splits = [
        *("--train_split", tmp_path / "empty.txt", "--val_split", tmp_path / "empty.txt"),
        *("--test_split", tmp_path / "one.txt"),
    ]
    preprocess(unlisted, tmp_path / "out", "--slices", 4, 6, *splits)
    assert subjects_written(tmp_path / "out") == {"train": [], "val": [], "test": ["Q_03"]}


# ----------------------------------------------------------------------------------------------------------
# Bad input


def append_to_list(part: str, line: str):
    def edit(data_dir: Path) -> None:
        with (data_dir / LIST_NAMES[part]).open("a") as file:
            file.write(f"{line}\n")

    return edit


def remove(*names: str):
    def edit(data_dir: Path) -> None:
        for name in names:
            (data_dir / name).unlink()

    return edit


TRAINING, VALIDATION, TESTING = LIST_NAMES.values()
BAD_INPUT = {
    "no data_dir": (shutil.rmtree, (), "there is no folder"),
    "no subjects": (lambda path: (shutil.rmtree(path), path.mkdir()), (), "no subject in"),
    "no such modality": (untouched, ("--modality", "flair,t22"), "'t22'", "flair, t1, t2", "did you mean 't2'?"),
    "seg as a modality": (untouched, ("--modality", "seg"), "unknown modality 'seg'"),
    "empty modality": (untouched, ("--modality", ""), "unknown modality ''"),
    "modality missing": (remove("P_well/P_well_t1.nii.gz"), (), "P_well_t1.nii.gz is missing"),
    "seg missing": (remove("P_train/P_train_seg.nii.gz"), (), "P_train_seg.nii.gz is missing"),
    "listed, not on disk": (append_to_list("val", "P_gone"), (), VALIDATION, "P_gone"),
    "in two lists": (append_to_list("test", "P_train"), (), "P_train is both in", TRAINING, TESTING),
    "all lists empty": (lambda path: write_lists(path, {"train": [], "val": [], "test": []}), (), "all empty"),
    "no testing list": (remove(TESTING), (), TRAINING, f"no {TESTING}", "--test_split"),
    "no training list": (remove(TRAINING), (), f"no {TRAINING}", "--train_split"),
    "only validation list": (remove(TRAINING, TESTING), (), VALIDATION, "--train_split"),
    "list not there": (untouched, ("--test_split", "nowhere.txt"), "nowhere.txt cannot be read"),
    "too few for a split": (
        lambda path: (remove(*LIST_NAMES.values())(path), [shutil.rmtree(p) for p in sorted(path.iterdir())[2:]]),
        (),
        "3 subjects or more",
    ),
    "percentages swapped": (untouched, ("--percentage_lower", "0.95"), "0 <= lower < upper <= 1", "0.95"),
    "percentages equal": (untouched, ("--percentage_lower", "0.9"), "0 <= lower < upper <= 1"),
    "percentage above 1": (untouched, ("--percentage_upper", "90"), "0 <= lower < upper <= 1"),
    "percentage below 0": (untouched, ("--percentage_lower", "-0.1"), "0 <= lower < upper <= 1"),
    "percentage no number": (untouched, ("--percentage_upper", "nan"), "0 <= lower < upper <= 1"),
    "slices reversed": (untouched, ("--slices", "9", "4"), "START < STOP"),
    "slices empty": (untouched, ("--slices", "5", "5"), "START < STOP"),
    "slices below 0": (untouched, ("--slices", "-1", "5"), "START < STOP"),
    "slices beyond the end": (untouched, ("--slices", "4", "13"), "P_train_t2.nii.gz", "12 slices"),
    "test slices by number": (untouched, ("--test_slices", "3"), "--test_slices", "'3'", "all"),
    "no workers": (untouched, ("--workers", "0"), "--workers must be 1 or more"),
    "mistyped flag": (untouched, ("--modalities", "t2"), "did you mean '--modality'?"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(cohort, tmp_path, case):
    edit, args, *fragments = BAD_INPUT[case]
    data_dir = tmp_path / "raw"
    shutil.copytree(cohort, data_dir)
    edit(data_dir)
    defaults = ("--data_dir", data_dir, "--output_dir", tmp_path / "out", "--slices", "4", "9")
    expect_refusal(run_script(*defaults, *args, cwd=tmp_path), *fragments)
    assert not (tmp_path / "out").exists()


def test_output_dir_that_is_a_file_is_refused(cohort, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = run_script("--data_dir", cohort, "--output_dir", tmp_path / "out", "--slices", 4, 9)
    expect_refusal(result, "cannot be written to")
    assert (tmp_path / "out").read_text() == "mine"


# ----------------------------------------------------------------------------------------------------------
# Bad subjects


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Damage the uncompressed bytes of a volume in a valid gzip file."""
    return lambda path: path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def header(**fields: object) -> Callable[[Path], None]:
    """Damage the header of a volume in a valid gzip file."""

    def change(data: bytes) -> bytes:
        header = nibabel.Nifti1Header(data[:348], check=False)
        for name, value in fields.items():
            header[name] = value
        return header.binaryblock + data[348:]

    return content(change)


def voxels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Replace the voxels in a valid file."""
    return lambda path: save(path, change(np.asarray(nibabel.load(path).dataobj)))


def shift_affine(path: Path) -> None:
    """Shift the affine by 1 mm; the voxels stay the same."""
    affine = np.eye(4)
    affine[0, 3] = 1
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(path).dataobj), affine), path)


def put(kind: type, index: int, value: float) -> Callable[[Path], None]:
    """Convert to another dtype and set one brain voxel."""

    def change(volume: np.ndarray) -> np.ndarray:
        volume = volume.astype(kind)
        volume[volume != 0] = np.where(np.arange((volume != 0).sum()) == index, value, volume[volume != 0])
        return volume

    return voxels(change)


def cut_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def wrong_checksum(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-8] + bytes(4) + data[-4:])


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD_VOLUMES = {  # the kind, the damage, parts of the message
    "no gzip": ("t1", lambda path: path.write_text("a web page"), "cannot be read", "NIfTI"),
    "empty": ("t1", lambda path: path.write_bytes(b""), "cannot be read", "NIfTI"),
    "no NIfTI": ("t2", lambda path: path.write_bytes(gzip.compress(bytes(5000))), "cannot be read", "NIfTI"),
    "gzip cut off": ("t1", cut_bytes, "cannot be read"),
    "checksum": ("t1", wrong_checksum, "cannot be read", "CRC"),
    "voxels cut off": ("t1", content(lambda data: data[:5000]), "is truncated", "11872 bytes", "5000"),
    "bytes too many": ("t1", content(lambda data: data + bytes(16)), "data after", "11872"),
    "impossible header": ("t1", header(datatype=77), "cannot be read"),
    "voxels in the header": ("t1", header(vox_offset=0), "cannot be read", "inside its header"),
    "claims the impossible": ("t1", header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "32767 × 32767 × 32767"),
    "claims too much": ("t1", header(dim=[3, 512, 512, 512, 1, 1, 1, 1]), "is truncated", "268435808 bytes"),
    "no voxels": ("t1", header(dim=[3, 24, 0, 12, 1, 1, 1, 1]), "one 3D volume", "(24, 0, 12)"),
    "axis below 0": ("t1", header(dim=[3, 24, -20, 12, 1, 1, 1, 1]), "one 3D volume", "(24, -20, 12)"),
    "four axes": ("t2", voxels(lambda volume: np.stack([volume, volume], -1)), "one 3D volume", "(24, 20, 12, 2)"),
    "two axes": ("t2", voxels(lambda volume: volume[:, :, 5]), "one 3D volume", "(24, 20)"),
    "other shape": ("t1", voxels(lambda volume: volume[:, :-1]), "shape (24, 19, 12)", "(24, 20, 12)"),
    "other shape of seg": ("seg", voxels(lambda volume: volume[1:]), "shape (23, 20, 12)"),
    "other affine": ("flair", shift_affine, "affine"),
    "other affine of seg": ("seg", shift_affine, "affine"),
    "no affine": ("t2", header(sform_code=1, srow_x=np.nan), "affine is not finite"),
    "NaN": ("t1", put(np.float32, 7, np.nan), "not finite"),
    "Inf": ("t1", put(np.float64, 7, -np.inf), "not finite"),
    "scaling without sense": ("t1", header(scl_slope=1, scl_inter=np.nan), "cannot be read", "intercept"),
    "no brain": ("t1", voxels(np.zeros_like), "every voxel is 0"),
    "constant": ("t1", voxels(lambda volume: np.full_like(volume, -7)), "background is -7, not 0"),
    "constant brain": ("flair", voxels(lambda volume: (volume != 0).astype(np.uint8)), "both 1"),
    "too wide a range": ("t1", voxels(lambda v: np.sign(v) * 1.7e308), "orders of magnitude"),
    "complex": ("t1", voxels(lambda volume: volume.astype(np.complex64)), "real numbers", "complex64"),
    "colours": ("t1", voxels(lambda volume: np.zeros(volume.shape, RGB)), "real numbers"),
    "label 5": ("seg", voxels(lambda seg: seg + np.uint8(5)), "must hold labels", "holds 5"),
    "label outside the slices": ("seg", voxels(lambda seg: seg + np.uint8([9] + 11 * [0])), "must hold labels"),
    "label between": ("seg", voxels(lambda seg: seg + 0.5), "must hold labels", "0.5"),
    "label near none": ("seg", voxels(lambda seg: seg * 0.94), "must hold labels", "holds 0.94"),
    "label between high ones": ("seg", voxels(lambda seg: seg * 3.5), "must hold labels", "holds 3.5"),
    "label below 0": ("seg", voxels(lambda seg: seg.astype(np.int16) - 1), "must hold labels", "-1"),
    "label NaN": ("seg", voxels(lambda seg: seg * np.nan), "must hold labels", "nan"),
}


@pytest.fixture(scope="module")
def damaged_cohort(cohort, tmp_path_factory) -> tuple[Path, Path, Done]:
    """Preprocess the cohort and one subject per bad volume; return the data folder, the output folder and the run."""
    folder = tmp_path_factory.mktemp("spoilt")
    data_dir, output_dir = folder / "raw", folder / "out"
    shutil.copytree(cohort, data_dir)
    names = [f"B{index:02d}" for index in range(len(BAD_VOLUMES))]
    for name, (kind, damage, *_) in zip(names, BAD_VOLUMES.values(), strict=True):
        make_subject(data_dir, name, {5: (1, 3)}, seed=100 + int(name[1:]))
        damage(data_dir / name / f"{name}_{kind}.nii.gz")
    write_lists(data_dir, {**SPLITS, "train": names[::2] + SPLITS["train"], "test": SPLITS["test"] + names[1::2]})
    result = run_script("--data_dir", data_dir, "--output_dir", output_dir, "--slices", 4, 9, "--workers", 2)
    return data_dir, output_dir, result


@pytest.mark.parametrize("case", BAD_VOLUMES)
def test_bad_subject_is_left_out_with_an_explanation(damaged_cohort, case):
    data_dir, output_dir, result = damaged_cohort
    name = f"B{list(BAD_VOLUMES).index(case):02d}"
    kind, _, *fragments = BAD_VOLUMES[case]
    [sentence] = [line for line in result.stderr.splitlines() if name in line]
    assert sentence.startswith(f"brats_preprocess.py: error: {data_dir / name / f'{name}_{kind}.nii.gz'} ")
    assert sentence.endswith(f"{name} is left out: replace the file and run the same command again")
    for fragment in fragments:
        assert fragment in sentence
    assert not [path for path in output_dir.rglob("*") if name in path.name]


def test_bad_subjects_do_not_affect_the_others(damaged_cohort, finished):
    _, output_dir, result = damaged_cohort
    assert result.code == 1
    assert len(result.stderr.splitlines()) == len(BAD_VOLUMES), result.stderr
    n_train = (len(BAD_VOLUMES) + 1) // 2
    assert f"train: subjects read: {n_train + 2}, slices written: 4\n" in result.stdout
    assert f"train: left out, bad volumes: {n_train} (B00, B02, B04, B06, B08 and " in result.stdout
    lists = set(LIST_NAMES.values())
    assert contents(output_dir) == {name: data for name, data in contents(finished).items() if name not in lists}


def test_empty_and_damaged_duplicates_are_left_out_one_by_one(cohort, tmp_path):
    """The damaged file has the size and the stored checksum of the other."""
    data_dir, out = Path(shutil.copytree(cohort, tmp_path / "raw")), tmp_path / "out"
    for name in ("P_sick", "P_well"):
        save(data_dir / name / f"{name}_t1.nii.gz", np.zeros(SHAPE, np.int16))
    data = bytearray((data_dir / "P_val/P_val_t1.nii.gz").read_bytes())
    data[len(data) // 2] ^= 255
    (data_dir / "P_test/P_test_t1.nii.gz").write_bytes(data)
    result = run_script("--data_dir", data_dir, "--output_dir", out, "--slices", 4, 9)
    assert (result.code, result.stderr.count("\n")) == (1, 3)
    for name, reason in (("sick", "every voxel is 0"), ("well", "every voxel is 0"), ("test", "cannot be read")):
        [line] = [line for line in result.stderr.splitlines() if f"P_{name}_t1.nii.gz" in line]
        assert reason in line
    assert sorted(find_complete(out)) == ["P_train", "P_val"]


def test_rerun_makes_a_subject_whose_file_was_replaced(cohort, finished, tmp_path):
    data_dir = Path(shutil.copytree(cohort, tmp_path / "raw"))
    path = data_dir / "P_val" / "P_val_t2.nii.gz"
    intact = path.read_bytes()
    cut_bytes(path)
    command = ("--data_dir", data_dir, "--output_dir", tmp_path / "out", "--slices", 4, 9)
    for _ in range(2):
        result = run_script(*command)
        assert (result.code, result.stderr.count("\n")) == (1, 1)
        assert "P_val_t2.nii.gz cannot be read" in result.stderr
    assert "already preprocessed: 4 of 5 subjects" in result.stdout
    path.write_bytes(intact)
    assert run_script(*command).code == 0
    assert contents(tmp_path / "out") == contents(finished)


def test_subject_with_too_few_slices_is_left_out(cohort, tmp_path):
    data_dir = Path(shutil.copytree(cohort, tmp_path / "raw"))
    for kind in KINDS:
        save(data_dir / "P_train" / f"P_train_{kind}.nii.gz", raw(cohort, "P_train", kind)[:, :, :8])
    result = run_script("--data_dir", data_dir, "--output_dir", tmp_path / "out", "--slices", 4, 9)
    assert (result.code, result.stderr.count("\n")) == (1, 1)
    assert "--slices 4 9 exceeds" in result.stderr
    assert "P_train_t2.nii.gz, which has 8 slices" in result.stderr
    assert len(find_complete(tmp_path / "out")) == 4

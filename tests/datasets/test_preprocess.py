"""Preprocessing: its normalisation and choice of slices, and its command line on tiny volumes."""

import gzip
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from datasets.brats_preprocess import choose_slices, normalise
from datasets.split_traintest import (
    LIST_NAMES,
    find_subjects,
    hash_validation_out_of,
    read_list,
    split_subjects,
)

SCRIPT = Path(__file__).parents[2] / "datasets" / "brats_preprocess.py"
SHAPE = (24, 20, 12)
KINDS = ("flair", "t1", "t2", "seg")

# In the range of slices that the tests ask for, [4, 9): what each subject is there for.
TUMOURS = {  # label and pixels by slice
    "P_train": {2: (1, 9), 5: (4, 3)},  # healthy on 4, 6, 7, 8
    "P_sick": dict.fromkeys(range(12), (1, 1)),  # never healthy
    "P_val": {4: (1, 2), 6: (4, 8), 7: (2, 8), 9: (1, 40)},  # largest on 6, first of two equals
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
    """int16 modalities with a brain box of their own each, some of it below 0, and a uint8 seg."""
    rng = np.random.default_rng(seed)
    for border, modality in enumerate(("flair", "t1", "t2"), start=2):
        volume = np.zeros(shape, np.int16)
        inside = (slice(border, -border), slice(2, -border), slice(1, -1))
        volume[inside] = rng.integers(-30, 900, volume[inside].shape)
        save(data_dir / name / f"{name}_{modality}.nii.gz", volume)
    seg = np.zeros(shape, np.uint8)
    for z, (label, n_pixels) in tumour.items():
        seg[5:15, 5:15, z].flat[:n_pixels] = label  # a view of a basic slice: writes through
    save(data_dir / name / f"{name}_seg.nii.gz", seg)


def write_lists(folder: Path, splits: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, subjects in splits.items():
        (folder / LIST_NAMES[part]).write_text("".join(f"{subject}\n" for subject in subjects))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """The subjects of TUMOURS, with the lists of SPLITS beside them. Not to be changed: copy it."""
    data_dir = tmp_path_factory.mktemp("cohort")
    for seed, (name, tumour) in enumerate(TUMOURS.items()):
        make_subject(data_dir, name, tumour, seed=seed)
    write_lists(data_dir, SPLITS)
    return data_dir


def run_script(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def preprocess(data_dir: Path, output_dir: Path, *args: object) -> subprocess.CompletedProcess:
    """Run on slices [4, 9) with one worker, unless the arguments say otherwise; it must succeed."""
    defaults = ("--data_dir", data_dir, "--output_dir", output_dir, "--slices", 4, 9, "--workers", 1)
    result = run_script(*defaults, *args, cwd=data_dir)
    assert (result.returncode, result.stderr) == (0, "")
    return result


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def raw(data_dir: Path, subject: str, kind: str) -> np.ndarray:
    return np.asarray(nibabel.load(data_dir / subject / f"{subject}_{kind}.nii.gz").dataobj)


# ----------------------------------------------------------------------------------------------------------
# Normalisation

# 101 brain voxels: the 0.02 and 0.9 quantiles are exactly the third and the 91st of them in order.
LADDER = np.concatenate([np.zeros(50), np.arange(1, 102)])
LADDER_BELOW_0 = np.concatenate([np.arange(-50, 0), np.zeros(50), np.arange(1, 52)])


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64])
def test_normalise_has_a_closed_form(dtype):
    image = normalise(LADDER.astype(dtype).reshape(1, 151, 1), 0.02, 0.9)
    assert image.dtype == np.float32
    assert image.shape == (1, 151, 1)
    value = dict(zip(LADDER, image.ravel(), strict=True))
    assert [value[0], value[1], value[2], value[3]] == [-3, -3, -3, -3]
    assert value[47] == 0
    assert value[91] == 3
    assert value[101] == pytest.approx(3 + 6 * 10 / 88)
    assert value[4] == pytest.approx(-3 + 6 / 88)
    assert (np.diff(image.ravel()[52:]) > 0).all()  # strictly, from the lower quantile on


def test_normalise_counts_brain_voxels_below_0():
    value = dict(zip(LADDER_BELOW_0, normalise(LADDER_BELOW_0.astype(np.int16), 0.02, 0.9), strict=True))
    assert [value[-50], value[-49], value[-48]] == [-3, -3, -3]
    assert value[-47] == pytest.approx(-3 + 6 / 89)
    assert value[-1] == pytest.approx(-3 + 6 * 47 / 89)
    assert value[0] == -3  # background, although brighter voxels than it are below
    assert value[41] == 3


def test_normalise_ignores_how_much_background_there_is_and_the_scanners_unit():
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
        ([1, np.nan], "not finite"),
        ([1, np.inf], "not finite"),
    ],
)
def test_normalise_refuses(volume, message):
    with pytest.raises(ValueError, match=message):
        normalise(np.array(volume, dtype=np.float64), 0.02, 0.9)


# ----------------------------------------------------------------------------------------------------------
# Which slices


@pytest.mark.parametrize(
    ("areas", "brain", "train", "test"),
    [
        ([0, 2, 0, 5], [1, 1, 1, 1], [0, 2], [3]),
        ([3, 5, 5, 0], [1, 1, 1, 1], [3], [1]),
        ([0, 0, 0, 0], [1, 0, 1, 1], [0, 2, 3], []),
        ([1, 1, 1, 1], [1, 1, 1, 1], [], [0]),
        ([1, 9, 2, 0], [1, 0, 1, 0], [], [2]),
    ],
)
def test_choose_slices(areas, brain, train, test):
    seg = np.zeros((4, 5, 4), np.uint8)
    brainmask = np.zeros((4, 5, 4), np.uint8)
    for index in range(4):
        seg[1:4, :3, index] = 4 * (np.arange(9) < areas[index]).reshape(3, 3)
        brainmask[0, 0, index] = brain[index]
    assert choose_slices("train", seg, brainmask) == train
    assert choose_slices("test", seg, brainmask) == choose_slices("val", seg, brainmask) == test


# ----------------------------------------------------------------------------------------------------------
# The command line


def test_command_line_writes_the_slices_it_should(cohort, tmp_path):
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

    written = {path: np.load(tmp_path / "out" / path) for path in contents(tmp_path / "out")}
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


def test_brain_mask_is_the_union_of_the_modalities_asked_for(cohort, tmp_path):
    preprocess(cohort, tmp_path / "two", "--modality", "t1,t2")
    preprocess(cohort, tmp_path / "one", "--modality", "t2")
    name = "val/brainmask/P_val_brainmask_6.npy"
    t1, t2 = (raw(cohort, "P_val", modality)[:, :, 6] != 0 for modality in ("t1", "t2"))
    assert (t1 & ~t2).any()
    np.testing.assert_array_equal(np.load(tmp_path / "two" / name), t1 | t2)
    np.testing.assert_array_equal(np.load(tmp_path / "one" / name), t2)


def test_quantiles_are_of_the_whole_volume(tmp_path):
    make_subject(tmp_path / "raw", "A", {})
    flair = raw(tmp_path / "raw", "A", "flair")
    flair[:, :, :4] *= 20  # brighter outside the range of slices
    save(tmp_path / "raw" / "A" / "A_flair.nii.gz", flair)
    write_lists(tmp_path / "raw", {"train": ["A"], "val": [], "test": []})
    preprocess(tmp_path / "raw", tmp_path / "out", "--modality", "flair")
    image = np.load(tmp_path / "out/train/flair/A_flair_4.npy")
    np.testing.assert_array_equal(image, normalise(flair, 0.02, 0.9)[:, :, 4])


def test_scaled_and_uncompressed_volumes_are_understood(cohort, tmp_path):
    data_dir = tmp_path / "raw"
    shutil.copytree(cohort, data_dir)
    plain = preprocess(data_dir, tmp_path / "plain").stdout
    for kind, slope, inter in (("flair", 2.0, 0.0), ("t1", 1.0, 40.0), ("seg", 1.0, 0.0)):
        path = data_dir / "P_val" / f"P_val_{kind}.nii.gz"
        volume = raw(data_dir, "P_val", kind)
        path.unlink()
        image = nibabel.Nifti1Image(volume, np.eye(4))
        image.header.set_slope_inter(slope, inter)
        nibabel.save(image, path.with_suffix(""))
    assert preprocess(data_dir, tmp_path / "scaled").stdout == plain.replace("plain", "scaled")
    flair = raw(cohort, "P_val", "flair")
    for kind, volume in (("flair", flair * 2.0), ("t1", raw(cohort, "P_val", "t1") + 40.0)):
        image = np.load(tmp_path / f"scaled/val/{kind}/P_val_{kind}_6.npy")
        np.testing.assert_array_equal(image, normalise(volume, 0.02, 0.9)[:, :, 6])
    seg = "val/seg/P_val_seg_6.npy"
    assert (tmp_path / "scaled" / seg).read_bytes() == (tmp_path / "plain" / seg).read_bytes()


def test_files_depend_neither_on_workers_nor_on_an_earlier_run(cohort, tmp_path):
    preprocess(cohort, tmp_path / "one", "--workers", 1)
    preprocess(cohort, tmp_path / "two", "--workers", 2)
    preprocess(cohort, tmp_path / "again", "--slices", 2, 7, "--percentage_upper", 0.7)
    other_settings = contents(tmp_path / "again")
    preprocess(cohort, tmp_path / "again")
    preprocess(cohort, tmp_path / "again")
    assert contents(tmp_path / "one") != other_settings
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "again")


@pytest.mark.parametrize(
    ("args", "lists"),
    [
        (("--modality", "t2"), SPLITS),
        ((), {**SPLITS, "train": ["P_sick"]}),
        ((), {"train": ["P_val"], "val": ["P_train"], "test": ["P_test"]}),
    ],
)
def test_slices_of_another_run_are_not_mixed_up_with_the_new_ones(cohort, tmp_path, args, lists):
    preprocess(cohort, tmp_path / "out")
    before = contents(tmp_path / "out")
    write_lists(tmp_path / "lists", lists)
    split_args = [
        item for part, name in LIST_NAMES.items() for item in (f"--{part}_split", tmp_path / "lists" / name)
    ]
    result = run_script(
        "--data_dir", cohort, "--output_dir", tmp_path / "out", "--slices", 4, 9, *split_args, *args
    )
    assert_one_plain_sentence(result, "of an earlier run with other subjects or modalities")
    assert contents(tmp_path / "out") == before


# ----------------------------------------------------------------------------------------------------------
# Which subjects


@pytest.fixture(scope="module")
def unlisted(tmp_path_factory) -> Path:
    """Twelve subjects without split lists; on slice 5 each has a tumour."""
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
    splits = split_subjects(find_subjects(unlisted))
    assert subjects_written(tmp_path / "out") == splits
    assert {part: read_list(tmp_path / "out" / name) for part, name in LIST_NAMES.items()} == splits


def test_without_a_validation_list_it_is_hashed_out_of_training(unlisted, tmp_path):
    names = find_subjects(unlisted)
    (tmp_path / "train.txt").write_text("\n".join(names[:9]))
    (tmp_path / "test.txt").write_text("\n".join(names[9:11]))
    result = preprocess(
        *(unlisted, tmp_path / "out", "--slices", 4, 6),
        *("--train_split", tmp_path / "train.txt", "--test_split", tmp_path / "test.txt"),
    )
    training, validation = hash_validation_out_of(names[:9])
    assert subjects_written(tmp_path / "out") == {"train": training, "val": validation, "test": names[9:11]}
    assert not list((tmp_path / "out").glob("*.txt"))
    assert "11 of 12 subjects" in result.stdout
    assert "validation hashed out of training" in result.stdout


def test_lists_in_datasets_are_found_and_those_in_data_dir_go_first(unlisted, tmp_path):
    names = find_subjects(unlisted)
    args = ("--data_dir", tmp_path / "raw", "--slices", 4, 6, "--workers", 1, "--output_dir")
    shutil.copytree(unlisted, tmp_path / "raw")
    in_datasets = {"train": names[:2], "val": names[2:3], "test": names[3:4]}
    write_lists(tmp_path / "datasets", in_datasets)
    assert run_script(*args, tmp_path / "first", cwd=tmp_path).returncode == 0
    assert subjects_written(tmp_path / "first") == in_datasets

    in_data_dir = {"train": names[5:6], "val": names[6:7], "test": names[7:8]}
    write_lists(tmp_path / "raw", in_data_dir)
    assert run_script(*args, tmp_path / "second", cwd=tmp_path).returncode == 0
    assert subjects_written(tmp_path / "second") == in_data_dir


def test_a_single_test_subject_will_do(unlisted, tmp_path):
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


def assert_one_plain_sentence(result: subprocess.CompletedProcess, *fragments: str) -> None:
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


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


def put(subject: str, kind: str, volume: np.ndarray):
    return lambda data_dir: save(data_dir / subject / f"{subject}_{kind}.nii.gz", volume)


def untouched(data_dir: Path) -> None:
    pass


TRAINING, VALIDATION, TESTING = LIST_NAMES.values()
BAD_INPUT = {
    "no data_dir": (shutil.rmtree, (), "there is no folder"),
    "no subjects": (lambda path: (shutil.rmtree(path), path.mkdir()), (), "no subject in"),
    "no such modality": (
        untouched,
        ("--modality", "flair,t22"),
        "'t22'",
        "flair, t1, t2",
        "did you mean 't2'?",
    ),
    "seg as a modality": (untouched, ("--modality", "seg"), "unknown modality 'seg'"),
    "empty modality": (untouched, ("--modality", ""), "unknown modality ''"),
    "modality missing": (remove("P_well/P_well_t1.nii.gz"), (), "P_well_t1.nii.gz is missing"),
    "seg missing": (remove("P_train/P_train_seg.nii.gz"), (), "P_train_seg.nii.gz is missing"),
    "listed, not on disk": (append_to_list("val", "P_gone"), (), VALIDATION, "P_gone"),
    "in two lists": (append_to_list("test", "P_train"), (), "P_train is both in", TRAINING, TESTING),
    "all lists empty": (
        lambda path: write_lists(path, {"train": [], "val": [], "test": []}),
        (),
        "all empty",
    ),
    "no testing list": (remove(TESTING), (), TRAINING, f"no {TESTING}", "--test_split"),
    "no training list": (remove(TRAINING), (), f"no {TRAINING}", "--train_split"),
    "only validation list": (remove(TRAINING, TESTING), (), VALIDATION, "--train_split"),
    "list not there": (untouched, ("--test_split", "nowhere.txt"), "nowhere.txt cannot be read"),
    "too few for a split": (
        lambda path: (
            remove(*LIST_NAMES.values())(path),
            [shutil.rmtree(p) for p in sorted(path.iterdir())[2:]],
        ),
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
    "no workers": (untouched, ("--workers", "0"), "--workers must be 1 or more"),
    "mistyped flag": (untouched, ("--modalities", "t2"), "did you mean '--modality'?"),
    "shapes differ": (put("P_test", "t1", np.ones((24, 21, 12))), (), "P_test_t1.nii.gz", "(24, 21, 12)"),
    "seg of another shape": (put("P_test", "seg", np.ones((20, 24, 12))), (), "P_test_seg.nii.gz"),
    "four axes": (put("P_val", "t2", np.ones((*SHAPE, 2))), (), "P_val_t2.nii.gz", "3 axes"),
    "no gzip": (
        lambda path: (path / "P_val/P_val_t1.nii.gz").write_text("a web page"),
        (),
        "P_val_t1.nii.gz cannot be read",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_written(cohort, tmp_path, case):
    edit, args, *fragments = BAD_INPUT[case]
    data_dir = tmp_path / "raw"
    shutil.copytree(cohort, data_dir)
    edit(data_dir)
    defaults = ("--data_dir", data_dir, "--output_dir", tmp_path / "out", "--slices", "4", "9")
    assert_one_plain_sentence(run_script(*defaults, *args, cwd=tmp_path), *fragments)
    assert not (tmp_path / "out").exists()


def test_output_dir_that_is_a_file_is_refused(cohort, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = run_script("--data_dir", cohort, "--output_dir", tmp_path / "out", "--slices", 4, 9)
    assert_one_plain_sentence(result, "cannot be written to")
    assert (tmp_path / "out").read_text() == "mine"


def truncated(path: Path) -> None:
    """Header and gzip are sound, but half the voxels are missing."""
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:5000]))


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("t1", truncated, "cannot be read"),
        ("t1", lambda path: save(path, np.zeros(SHAPE, np.int16)), "every voxel is 0"),
        ("t1", lambda path: save(path, np.full(SHAPE, np.nan)), "not finite"),
        ("seg", lambda path: save(path, np.full(SHAPE, 0.5)), "must hold labels"),
        ("seg", lambda path: save(path, np.full(SHAPE, -1, np.int16)), "must hold labels"),
    ],
)
def test_a_failure_among_the_voxels_names_the_file(cohort, tmp_path, kind, damage, message):
    data_dir = tmp_path / "raw"
    shutil.copytree(cohort, data_dir)
    path = data_dir / "P_val" / f"P_val_{kind}.nii.gz"
    damage(path)
    result = run_script("--data_dir", data_dir, "--output_dir", tmp_path / "out", "--slices", 4, 9)
    assert_one_plain_sentence(result, str(path), message)


def test_help_explains_every_flag_without_importing_numpy():
    command = [sys.executable, "-X", "importtime", SCRIPT, "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "utils.cli" in imported
    assert not imported & {"numpy", "nibabel", "tqdm"}
    for flag in (
        "modality",
        "data_dir",
        "output_dir",
        "percentage_upper",
        "percentage_lower",
        "slices",
        "workers",
    ):
        assert f"--{flag} " in result.stdout
    for part in LIST_NAMES:
        assert f"--{part}_split " in result.stdout
    assert "None" not in result.stdout

"""Raw data sets and their preprocessing: both naming schemes of BraTS, and tables of other data sets."""

import contextlib
import csv
import gzip
import io
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.brats2021 import find_slices
from datasets.cohorts import COLUMNS, Cohort, read_brats, read_table, suggest_modality
from datasets.records import RECORDS, read_lesion_flags, read_preprocessing
from datasets.splits import LIST_NAMES, read_list, split_subjects
from datasets.subject import DEPTH, normalise
from tests.scripts.conftest import REPOSITORY, Done, expect_refusal, run_here
from utils.cli import UserError
from utils.grid import SliceGeometry

pytestmark = pytest.mark.xdist_group("cohorts")  # one process, so that the scans are sliced once

NAMED_2023 = {"flair": "t2f", "t2": "t2w", "t1": "t1n", "t1ce": "t1c", "seg": "seg"}
BRATS_GRID = {"axcodes": "LPS", "spacing": [1.0, 1.0, 1.0], "shape": [240, 240]}


def run_script(*args: object, cwd: Path = REPOSITORY) -> Done:
    return run_here("datasets/brats_preprocess.py", *args, cwd=cwd)


def preprocess(*args: object) -> str:
    """Run the script, which must succeed, and return its output."""
    done = run_script(*args, "--workers", 1)
    assert (done.code, done.stderr) == (0, "")
    return done.stdout


def save(path: Path, volume: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1.0, -1, 1, 1]) if affine is None else affine), path)


def written(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.npy"))}


# ----------------------------------------------------------------------------------------------------------
# Both naming schemes of BraTS

SMALL = (24, 20, 12)


def make_brats(data_dir: Path, number: int, named_2023: bool, label: int = 3) -> str:
    """Write a small subject whose voxels depend only on its number; return its name."""
    rng = np.random.default_rng(number)
    name = f"BraTS-GLI-{number:05d}-000" if named_2023 else f"BraTS2021_{number:05d}"
    for kind in NAMED_2023:
        volume = np.zeros(SMALL, np.int16)
        volume[3:-3, 2:-2] = rng.integers(1, 900, volume[3:-3, 2:-2].shape)
        if kind == "seg":
            volume = np.zeros(SMALL, np.uint8)
            volume[8:12, 8:12, 5] = label
        suffix = f"-{NAMED_2023[kind]}" if named_2023 else f"_{kind}"
        save(data_dir / name / f"{name}{suffix}.nii.gz", volume)
    return name


def test_both_naming_schemes_give_the_same_bytes(tmp_path):
    slices = {}
    for named_2023 in (False, True):
        data_dir, out = tmp_path / f"raw{named_2023}", tmp_path / f"out{named_2023}"
        names = [make_brats(data_dir, number, named_2023) for number in range(3)]
        for part, name in zip(LIST_NAMES, names, strict=True):
            (data_dir / LIST_NAMES[part]).write_text(name)
        modalities = ("--modality", "flair,t2,t1,t1ce")
        preprocess("--data_dir", data_dir, "--output_dir", out, "--slices", 4, 7, *modalities)
        slices[named_2023] = {
            path.replace(name, str(number)): content
            for path, content in written(out).items()
            for number, name in enumerate(names)
            if name in path
        }
        assert read_preprocessing(out)["grid"] == {"axcodes": "LPS", "spacing": [1.0, 1.0, 1.0], "shape": [24, 20]}
    assert slices[True] == slices[False]
    assert len(slices[True]) == 6 * (2 + 1 + 1)


def test_both_naming_schemes_can_be_mixed_and_split(tmp_path):
    names = [make_brats(tmp_path / "raw", number, number % 2 == 1) for number in range(4)]
    cohort = read_brats(tmp_path / "raw")
    assert list(cohort.subjects) == sorted(names)
    assert cohort.modalities == ("flair", "t1", "t1ce", "t2")
    args = ("--data_dir", tmp_path / "raw", "--output_dir", tmp_path)
    done = run_here("datasets/split_traintest.py", *args, cwd=tmp_path)
    assert done.code == 0, done.stderr
    listed = {part: read_list(tmp_path / name) for part, name in LIST_NAMES.items()}
    assert listed == split_subjects(names)


def test_missing_volume_is_reported_in_the_naming_scheme_of_its_subject(tmp_path):
    names = [make_brats(tmp_path / "raw", number, named_2023=True) for number in range(3)]
    path = tmp_path / "raw" / names[1] / f"{names[1]}-t1n.nii.gz"
    path.unlink()
    done = run_script("--data_dir", tmp_path / "raw", "--slices", 4, 7, cwd=tmp_path)
    expect_refusal(done, f"{path} is missing")


def test_modality_named_as_in_2023_gets_a_hint(tmp_path):
    make_brats(tmp_path / "raw", 0, named_2023=True)
    done = run_script("--data_dir", tmp_path / "raw", "--modality", "t2f", cwd=tmp_path)
    expect_refusal(done, "unknown modality 't2f'", "the t2f of BraTS 2023 is called flair here")


@pytest.mark.parametrize(
    ("word", "known", "clause"),
    [
        ("t2f", ["flair", "t2"], ", the t2f of BraTS 2023 is called flair here"),
        ("t1c", ["t1ce"], ", the t1c of BraTS 2023 is called t1ce here"),
        ("t2f", ["T1", "t2w"], ", did you mean 't2w'?"),  # no modality is called flair
        ("pet", ["flair", "t2"], ""),
    ],
)
def test_unknown_modality_gets_a_suggestion(tmp_path, word, known, clause):
    assert suggest_modality(word, known) == clause
    for kind in known:
        (tmp_path / kind).mkdir()
    with pytest.raises(UserError) as refused:  # the message that training and testing print
        find_slices(tmp_path, [word])
    assert f"no modality '{word}' in {tmp_path}{clause} (available: " in str(refused.value)


def test_folder_in_neither_naming_scheme_is_refused(tmp_path):
    save(tmp_path / "raw/A/A+flair.nii.gz", np.ones((2, 2, 2), np.uint8))
    with pytest.raises(UserError, match=r"NAME_flair\.nii\.gz or NAME-t2f\.nii\.gz"):
        read_brats(tmp_path / "raw")


# ----------------------------------------------------------------------------------------------------------
# Reading tables


def write_table(folder: Path, text: str | bytes, volumes: tuple[str, ...] = ()) -> Path:
    """Write a table, and empty files next to it; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cohort.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for name in volumes:
        (folder / name).touch()
    return path


def test_table_with_all_columns(tmp_path):
    rows = (
        "\ufeffsubject, T1-post ,FLAIR,Seg,healthy,split,brainmask",
        "b.2,p/b1.nii,/abs/b2.nii,b.nii,no,Train,",
        ",,,,,,",
        '"a_1","p/a,1.nii",a2.nii,,YES,test,m.nii',
        "c,c1.nii,c2.nii,,,val,",
        "d,d1.nii,d2.nii,,no,val,",
    )
    path = write_table(tmp_path / "here", "\r\n".join(rows))
    cohort = read_table(path)
    here = tmp_path / "here"
    assert list(cohort.subjects) == ["a_1", "b.2"]
    assert cohort.modalities == ("FLAIR", "T1-post")
    first, second = cohort.subjects.values()
    assert first.volumes == {"FLAIR": here / "a2.nii", "T1-post": here / "p/a,1.nii", "brainmask": here / "m.nii"}
    assert second.volumes == {"FLAIR": Path("/abs/b2.nii"), "T1-post": here / "p/b1.nii", "seg": here / "b.nii"}
    assert (first.healthy, second.healthy) == (True, False)
    assert cohort.splits == {"train": ["b.2"], "val": [], "test": ["a_1"]}
    assert cohort.excluded == ("c", "d")
    assert cohort.list_folders == ()


@pytest.mark.parametrize(("delimiter", "word"), [(",", None), (";", "semicolons"), ("\t", "tabs")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_separated_by_other_characters_are_read_and_said(tmp_path, capsys, delimiter, word, end):
    cells = ("subject", "FLAIR", "seg"), ("A", '"a, b; and\tc.nii"', "s.nii"), ("B", "b.nii", "")
    path = write_table(tmp_path, end.join(map(delimiter.join, cells)))
    cohort = read_table(path)
    volumes = {"FLAIR": tmp_path / "a, b; and\tc.nii", "seg": tmp_path / "s.nii"}
    assert {name: subject.volumes for name, subject in cohort.subjects.items()} == {"A": volumes}
    assert cohort.excluded == ("B",)
    assert capsys.readouterr().out == (f"{path} is separated by {word}\n" if word else "")


BAD_TABLES = {  # the text, parts of the message
    "no text": (b"subject,a\n\xff\xfe,x", "cannot be read", "save it as UTF-8"),
    "no CSV": ('subject,a,seg\n"A"x,a,s', "cannot be read"),
    "empty": ("\n,,\n", "is empty"),
    "no subject column": ("subjects,a,seg\nA,a,s", "no column subject", "did you mean 'subjects'?"),
    "no rows": ("subject,a,seg\n", "has no subject"),
    "no modality": ("subject,seg\nA,s", "has no modality"),
    "two columns of a name": ("subject,a,a,seg\nA,a,b,s", "two columns 'a'"),
    "two columns of a meaning": ("subject,a,seg,SEG\nA,a,b,s", "two columns 'seg'"),
    "column without a name": ("subject,a,seg,\nA,a,s,", "column ''"),
    "modality with a slash": ("subject,a/b,seg\nA,a,s", "column 'a/b'"),
    "modality with a comma": ('subject,"a,b",seg\nA,a,s', "column 'a,b'"),
    "modality called name": ("subject,Name,seg\nA,a,s", "no modality can be called 'Name'"),
    "subject without a name": ("subject,a,seg\n,a,s", "line 2: subject ''"),
    "subject elsewhere": ("subject,a,seg\n../A,a,s", "line 2: subject '../A'"),
    "subject hidden": ("subject,a,seg\n.A,a,s", "line 2: subject '.A'"),
    "subject like a flag": ("subject,a,seg\n-A,a,s", "line 2: subject '-A'"),
    "subject with a space": ("subject,a,seg\nA 1,a,s", "line 2: subject 'A 1'"),
    "subject with a star": ("subject,a,seg\nA*,a,s", "line 2: subject 'A*'"),
    "subject too long": (f"subject,a,seg\n{'A' * 101},a,s", "line 2: subject 'AAAA"),
    "subject twice": ("subject,a,seg\nA,a,s\nB,a,s\nA,b,", "line 4: subject A appears twice"),
    "subject in two splits": ("subject,a,seg,split\nA,a,s,train\nA,a,s,test", "line 3: subject A appears twice"),
    "one file twice": ("subject,a,b,seg\nA,x,y,s\nB,x,x,s", "line 3: x is both a and b"),
    "too few cells": ("subject,a,seg\nA,a", "line 2 has 2 cells", "3 columns"),
    "too many cells": ("subject,a,seg\nA,a,s,t", "line 2 has 4 cells", "3 columns"),
    "unknown part": ("subject,a,seg,split\nA,a,s,training", "split is 'training'", "did you mean 'train'?"),
    "no part": ("subject,a,seg,split\nA,a,s,train\nB,a,s,", "line 3: split is ''", "train or val or test"),
    "unknown health": ("subject,a,seg,healthy\nA,a,s,maybe", "healthy is 'maybe'", "yes or no"),
    "all excluded": ("subject,a\nA,a", "no subject with a seg or healthy=yes"),
    "column with a line break": ('"a\nb",seg\nA,s', "(it has a b, seg)"),
    "one file twice, with a line break": ('subject,a,b,seg\nA,"x\ny","x\ny",s', "line 4: x y is both a and b"),
    "path with a line break": ('subject,a,seg,split\nA,"x\ny",s,train', "x y is missing"),
    "path missing": ("subject,a,seg,split\nA,a,no.nii,train", "no.nii is missing"),
    "brain mask missing": ("subject,a,seg,brainmask,split\nA,a,s,no.nii,train", "no.nii is missing"),
    "cell without a path": ("subject,a,b,seg,split\nA,a,,s,train", "has no b for A", "--modality"),
    "modality of no column": ("subject,c,seg,split\nA,a,s,train", "the data have c", "--modality=a"),
    "too few for a split": ("subject,a,seg\nA,a,s\nB,a,s", "3 subjects or more"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused_before_anything_is_written(tmp_path, case):
    text, *fragments = BAD_TABLES[case]
    flags = [fragment for fragment in fragments if fragment.startswith("--modality=")]
    path = write_table(tmp_path, text, volumes=("a", "b", "s", "t"))
    out = tmp_path / "out"
    done = run_script("--csv", path, "--output_dir", out, *flags, cwd=tmp_path)
    expect_refusal(done, *(fragment for fragment in fragments if fragment not in flags))
    assert not out.exists()


TABLE = (
    ("subject", "FLAIR", "T2", "seg", "brainmask", "healthy", "split"),
    ("A", "a1.nii", "a2.nii", "a3.nii", "", "no", "train"),
    ("B", "b,1.nii", "b2.nii", "", "b4;.nii", "yes", "test"),
    ("C.1", "c1.nii", "c2.nii", "c3.nii", "", "", "val"),
    ("D", "d1.nii", "d2.nii", "", "", "", "val"),
)
CELLS = (
    *("", " ", "x", "../x", '"', '""', "a\nb", "a\rb", "\x00", "yes", "Train", "subject", "Seg", "name", "\ufeff", "A"),
    *(
        "a1.nii",
        "é",
        "\u2028",
        "ſplit",
        "İ",
        "x" * 101,
        "a;b",
        "a\tb",
        ",,,,",
        "-x",
        "\U0001f9e0",
        "healthy",
        "/",
        "nan",
    ),
)
# Bytes that are inserted into the file.
PIECES = [*(cell.encode() for cell in CELLS), b",", b";", b"\t", b"\r", b"\n", b"\xff", b"\xef\xbb\xbf", b'"' * 200_000]


@st.composite
def tables(draw) -> bytes:
    """Draw the bytes of a table in some dialect, with changed cells, rows and bytes."""
    rows = [list(row) for row in TABLE]
    for _ in range(draw(st.integers(0, 2))):
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = draw(st.sampled_from(CELLS) | st.text(max_size=3))
    if draw(st.integers(0, 3)) == 0:
        change = draw(st.sampled_from(("drop a row", "repeat a row", "drop a column", "drop a cell", "blank line")))
        row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, 6))
        if change == "drop a column":
            rows = [cells[:column] + cells[column + 1 :] for cells in rows]
        elif change == "drop a cell":
            del rows[row][column]
        else:
            rows[row : row + 1] = {"drop a row": [], "blank line": [rows[row], []]}.get(change, [rows[row]] * 2)
    dialect = {
        "delimiter": draw(st.sampled_from(",;\t|")),
        "quoting": draw(st.sampled_from((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))),
        "lineterminator": draw(st.sampled_from(("\n", "\r\n", "\r", "\n\n"))),
    }
    csv.writer(text := io.StringIO(newline=""), **dialect).writerows(rows)
    encoding = draw(st.sampled_from(("utf-8", "utf-8", "utf-8-sig", "utf-8-sig", "latin-1", "utf-16")))
    data = text.getvalue().encode(encoding, "replace")
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(data)))
        end = draw(st.sampled_from((place, place, place + 3, len(data))))
        data = data[:place] + draw(st.sampled_from(PIECES) | st.just(b"")) + data[end:]
    return data


def test_any_table_is_refused_or_read(tmp_path):
    path, outcomes = tmp_path / "cohort.csv", {"read": 0, "refused": 0}

    @settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @given(tables())
    def check(data):
        path.write_bytes(data)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                cohort, refusal = read_table(path), ""
        except UserError as error:
            refusal = str(error)
        outcomes["refused" if refusal else "read"] += 1
        if refusal:
            assert str(path) in refusal
        else:
            check_cohort(cohort)

    check()
    assert min(outcomes.values()) > 100, f"one-sided examples: {outcomes}"


def check_cohort(cohort: Cohort) -> None:
    """Check that a table's subjects have unmistakable names, volumes that exist or not, and a split or none."""
    names = [*cohort.subjects, *cohort.excluded]
    assert cohort.subjects
    assert len(set(names)) == len(names)
    assert cohort.modalities
    for name in (*names, *cohort.modalities):
        assert Path(f"{name}.npy").name == f"{name}.npy"
        assert name.isprintable()
        assert name.strip() == name
    assert not {name.lower() for name in cohort.modalities} & {*COLUMNS, "name"}
    for subject in cohort.subjects.values():
        assert subject.healthy or "seg" in subject.volumes
        assert len(set(subject.volumes.values())) == len(subject.volumes)
        assert [path.is_file() for path in subject.volumes.values()] == [False] * len(subject.volumes)
    if cohort.splits:
        assert sorted(name for names in cohort.splits.values() for name in names) == list(cohort.subjects)


GOOD = "subject,a,seg\nA,a,s\nB,a,s\nC,a,s"


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (("--csv", "nowhere.csv"), ("nowhere.csv cannot be read", "--csv")),
        (("--csv", "."), ("cannot be read",)),
        (("--csv", "cohort.csv", "--data_dir", "."), ("--csv and --data_dir both",)),
        (
            ("--csv", "cohort.csv", "--slices", "100", "156"),
            ("--slices 100 156 exceeds the BraTS grid, which has 155 slices",),
        ),
        (("--csv", "cohort.csv", "--modality", "b"), ("unknown modality 'b', the data have a",)),
        (("--csv", "cohort.csv", "--modality", "seg"), ("unknown modality 'seg', the data have a",)),
        (("--csv", "cohort.csv", "--test_split", "list.txt"), ("no brats_split_training.txt",)),
        (("--csv", "cohort.csv", "--test_split", "list.txt", "--train_split", "list.txt"), ("lists D, which",)),
        (("--csv", "split.csv", "--test_split", "list.txt"), ("both the split column", "list.txt")),
    ],
)
def test_flags_that_do_not_fit_a_table_are_refused(tmp_path, args, fragments):
    write_table(tmp_path, GOOD, volumes=("a", "s"))
    (tmp_path / "split.csv").write_text("subject,a,seg,split\nA,a,s,train")
    (tmp_path / "list.txt").write_text("D\n")
    done = run_script("--output_dir", tmp_path / "out", *args, cwd=tmp_path)
    expect_refusal(done, *fragments)
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------
# The same scan twice

WAYS = {  # that one file can be another
    "copy": shutil.copy,
    "symbolic link": lambda source, target: target.symlink_to(source),
    "hard link": lambda source, target: target.hardlink_to(source),
    "gunzipped": lambda source, target: target.write_bytes(gzip.decompress(source.read_bytes())),
    "gzipped again": lambda source, target: target.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), 1)),
}


@pytest.fixture(scope="module")
def brats(tmp_path_factory) -> Path:
    """Write three small subjects, and a table of their files. Shared: copy the folder to change it."""
    folder = tmp_path_factory.mktemp("brats")
    names = [make_brats(folder, number, named_2023=False) for number in range(3)]
    kinds = ("flair", "t1", "seg")
    rows = [",".join((name, *(f"{name}/{name}_{kind}.nii.gz" for kind in kinds))) for name in names]
    write_table(folder, "\n".join(("subject,flair,t1,seg", *rows)))
    return folder


@pytest.mark.parametrize("source", ["--data_dir", "--csv"])
@pytest.mark.parametrize("target", ["BraTS2021_00001/BraTS2021_00001_flair", "BraTS2021_00002/BraTS2021_00002_t1"])
@pytest.mark.parametrize("way", WAYS)
def test_scans_given_twice_are_refused_before_anything_is_written(brats, tmp_path, source, target, way):
    """The copy is the flair of another subject, or the other modality of the same."""
    data_dir, out = Path(shutil.copytree(brats, tmp_path / "raw")), tmp_path / "out"
    original, copy = data_dir / "BraTS2021_00002/BraTS2021_00002_flair.nii.gz", data_dir / f"{target}.nii.gz"
    copy.unlink()
    WAYS[way](original, copy)
    place = data_dir if source == "--data_dir" else data_dir / "cohort.csv"
    args = (source, place, "--modality", "flair,t1", "--slices", 4, 7, "--output_dir", out)
    expect_refusal(run_script(*args, cwd=tmp_path), str(original), str(copy), "are the same scan: give each")
    assert not out.exists()


@pytest.mark.parametrize(
    ("replaced", "spelt"),
    [
        ("BraTS2021_00002/BraTS2021_00002_t1.nii.gz", "BraTS2021_00001/../{}"),
        ("BraTS2021_00001/BraTS2021_00001_flair.nii.gz", "{}"),
        ("BraTS2021_00001/BraTS2021_00001_flair.nii.gz", "{folder}/{}"),
    ],
)
def test_one_file_in_two_spellings_is_refused(brats, tmp_path, replaced, spelt):
    folder, out = Path(shutil.copytree(brats, tmp_path / "raw")), tmp_path / "out"
    original = "BraTS2021_00002/BraTS2021_00002_flair.nii.gz"
    path = folder / "cohort.csv"
    path.write_text(path.read_text().replace(replaced, spelt.format(original, folder=folder)))
    done = run_script("--csv", path, "--output_dir", out, cwd=tmp_path)
    expect_refusal(done, str(folder / original), str(folder / spelt.format(original, folder=folder)), "same scan")
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------------
# Preprocessing tables

RADII = (60, 70, 50)  # mm, the brain's semi-axes towards left, back and top
LESION = (20, -15, 10)  # mm, its centre relative to the brain's
LPS = np.diag([-1.0, -1, 1, 1])  # from LPS to nibabel's RAS, in mm


def head(affine: np.ndarray, shape: tuple, middle: tuple, kind: str) -> np.ndarray:
    """Return one kind of volume of an ellipsoidal brain around `middle` (RAS, mm), [*shape].

    Intensities are linear in space, so that linear interpolation is exact; the lesion is a ball of radius 12 mm.
    """
    indices = np.moveaxis(np.indices(shape), 0, -1)
    offset = nibabel.affines.apply_affine(LPS @ affine, indices) - LPS[:3, :3] @ middle
    brain = ((offset / RADII) ** 2).sum(-1) < 1
    lesion = ((offset - LESION) ** 2).sum(-1) < 12**2
    slopes = {"FLAIR": (1, 0, 2), "T2-w": (0, -1, -2)}
    if kind in slopes:
        return np.where(brain, 500 + offset @ slopes[kind], 0).astype(np.float32)
    return (lesion * 7 if kind == "seg" else brain).astype(np.uint8)


KINDS = ("FLAIR", "T2-w", "seg")
# Affine and shape of each scan, and the centre of its brain in mm.
ROTATED = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(x=0.2) * 4, (-100, -120, -90))
GEOMETRIES = {
    "coarse": (nibabel.affines.from_matvec(np.diag([4, 4, 4]), (-100, -90, 10)), (52, 52, 40), (5, 12, 90)),
    "thick": (  # sagittal: the axes point back, up and left
        nibabel.affines.from_matvec([[0, 0, -5], [-3, 0, 0], [0, 3, 0]], (80, 100, -50)),
        (60, 50, 32),
        (3, 11, 20),
    ),
    "oblique": (ROTATED, (52, 60, 48), (0, 0, 0)),
}


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Write a table of subjects in several geometries, some of them invalid."""
    folder = tmp_path_factory.mktemp("scans")
    rows = ["subject,FLAIR,T2-w,seg,healthy,brainmask,split"]

    def add(
        name: str,
        part: str,
        geometry: str = "coarse",
        healthy: str = "",
        kinds: tuple = KINDS,
        damage: tuple | None = None,  # a kind, and a function of its voxels
        misplace: tuple | None = None,  # a kind, and a factor for its affine
    ) -> None:
        affine, shape, middle = GEOMETRIES[geometry]
        for kind in kinds:
            volume = head(affine, shape, middle, kind)
            if kind not in ("seg", "brainmask"):
                volume *= np.float32(1 + len(rows) / 100)  # no two subjects have the same scan
            if damage and damage[0] == kind:
                volume = damage[1](volume)
            factor = misplace[1] if misplace and misplace[0] == kind else np.eye(4)
            save(folder / name / f"{kind}.nii", volume, factor @ affine)
        cells = {kind: f"{name}/{kind}.nii" if kind in kinds else "" for kind in (*KINDS, "brainmask")}
        rows.append(f"{name},{cells['FLAIR']},{cells['T2-w']},{cells['seg']},{healthy},{cells['brainmask']},{part}")

    for name in GEOMETRIES:
        add(name, "test", name)
    add("thick-train", "train", "thick")
    add("well", "train", "thick", healthy="yes", kinds=("FLAIR", "T2-w"))
    add("well-test", "test", healthy="Yes", kinds=("FLAIR", "T2-w"))
    add("unclear", "train", kinds=("FLAIR", "T2-w"))
    add("masked", "test", kinds=(*KINDS, "brainmask"), damage=("FLAIR", lambda volume: volume + 50))
    add("elsewhere", "train", misplace=("seg", nibabel.affines.from_matvec(np.eye(3), (500, 0, 0))))
    add("not-well", "train", healthy="yes")
    add("half-label", "train", damage=("seg", lambda seg: seg * np.float32(0.5)))
    add("huge", "train", misplace=("FLAIR", np.diag([4, 4, 4, 1])))
    add("outside", "train", damage=("seg", low_slice))
    add("empty", "val", damage=("T2-w", np.zeros_like))
    add("nothing", "val", damage=("FLAIR", np.zeros_like))
    (folder / "cohort.csv").write_text("\n".join(rows))
    return folder


def low_slice(volume: np.ndarray) -> np.ndarray:
    """Return 1 in one slice below the brain, 0 elsewhere."""
    return np.broadcast_to(np.arange(volume.shape[2]) == 2, volume.shape).astype(np.uint8)


@pytest.fixture(scope="module")
def sliced(scans, tmp_path_factory) -> tuple[Path, Done]:
    """Preprocess these subjects; return the output folder and the finished run."""
    out = tmp_path_factory.mktemp("sliced")
    return out, run_script("--csv", scans / "cohort.csv", "--output_dir", out)


def load(out: Path, part: str, kind: str, subject: str) -> tuple[np.ndarray, int]:
    """Return a subject's only slice, and its number."""
    [path] = (out / part / kind).glob(f"{subject}_{kind}_*.npy")
    return np.load(path), int(path.stem.rpartition("_")[2])


@pytest.mark.parametrize("name", [*GEOMETRIES, "masked"])
def test_every_geometry_is_resampled_onto_the_brats_grid(sliced, name):
    """The brain is centred in 240 × 240 × 155 voxels, and the axes point left, back and up."""
    out, _ = sliced
    seg, z = load(out, "test", "seg", name)
    brain, _ = load(out, "test", "brainmask", name)
    voxel = 5 if name == "thick" else 4  # mm, the precision of the brain's border and so of its centre
    middle = np.argwhere(seg).mean(axis=0)
    assert z - (DEPTH - 1) / 2 == pytest.approx(LESION[2], abs=voxel)
    np.testing.assert_allclose(middle - 119.5, LESION[:2], atol=voxel)
    assert (seg.dtype, set(np.unique(seg))) == (np.uint8, {0, 7})
    width = 2 * np.array(RADII[:2]) * np.sqrt(1 - ((z - 77) / RADII[2]) ** 2)
    np.testing.assert_allclose([brain.any(axis=1).sum(), brain.any(axis=0).sum()], width, atol=2 * voxel)

    flair, _ = load(out, "test", "FLAIR", name)
    t2, _ = load(out, "test", "T2-w", name)
    inner = (slice(90, 150), slice(90, 150))
    slopes = [np.gradient(image[inner], axis=axis) for image in (flair, t2) for axis in (0, 1)]
    along_x, flat, _, along_y = (np.median(slope) for slope in slopes)
    assert along_x > 0.01
    assert flat == pytest.approx(0, abs=1e-5)
    assert along_y < -0.01
    np.testing.assert_allclose(slopes[0], along_x, rtol=0.05)


def test_healthy_subjects_are_tumour_free_and_unlabelled_ones_left_out(scans, sliced):
    out, done = sliced
    numbers = {
        name: sorted(int(path.stem.rpartition("_")[2]) for path in (out / "train/seg").glob(f"{name}_seg_*"))
        for name in ("well", "thick-train", "unclear")
    }
    assert numbers["well"] == list(range(70, 90))
    assert numbers["thick-train"] == list(range(70, 76))  # the lesion begins at 77 + 10 - 12
    assert numbers["unclear"] == []
    assert not any(np.load(path).any() for path in (out / "train/seg").glob("well_*"))
    assert "left out, neither a seg nor healthy=yes: 1 (unclear)\n" in done.stdout
    assert "test: left out, no tumour in slices 70 to 89: 1 (well-test)\n" in done.stdout
    assert "--test_slices all keeps val and test subjects without a tumour" in done.stdout
    assert f"split lists: split column of {scans / 'cohort.csv'}\n" in done.stdout
    assert not list(out.glob("*.txt"))


def test_all_slices_of_healthy_test_subjects_are_kept(scans, tmp_path):
    text = (scans / "cohort.csv").read_text().splitlines()
    table, out = scans / "healthy.csv", tmp_path / "out"
    table.write_text("\n".join(line for line in text if line.startswith(("subject", "well", "masked", "not-well"))))
    done = run_script("--csv", table, "--output_dir", out, "--slices", 80, 84, "--test_slices", "all")
    names = [f"{name}_seg_{z}.npy" for name in ("masked", "well-test") for z in range(80, 84)]
    assert sorted(path.name for path in (out / "test/seg").iterdir()) == names
    assert not any(np.load(path).any() for path in (out / "test/seg").glob("well-test_*"))
    assert (done.code, done.stderr.count("\n")) == (1, 1)
    assert "not-well is declared healthy" in done.stderr
    assert read_lesion_flags(out) == {"masked": True, "well": False, "well-test": False}


def test_brain_mask_defines_the_brain(sliced):
    out, _ = sliced
    flair, _ = load(out, "test", "FLAIR", "masked")  # brighter by 50 everywhere, including the background
    brain, _ = load(out, "test", "brainmask", "masked")
    same, _ = load(out, "test", "FLAIR", "coarse")
    assert (flair[brain == 0] == -3).all()
    assert 0.1 < brain.mean() < 0.3
    np.testing.assert_allclose(flair[100:140, 100:140], same[100:140, 100:140], atol=0.02)


def test_bad_subjects_are_left_out_and_the_others_written(sliced):
    out, done = sliced
    assert done.code == 1
    sentences = {
        "elsewhere": "has no label left on the grid of FLAIR.nii",
        "outside": "has a lesion, but all of it is outside the brain of FLAIR.nii",
        "not-well": "not-well is declared healthy",
        "half-label": "whole numbers from 0 to 255, but holds 3.5",
        "huge": "FLAIR.nii cannot be resampled onto the BraTS grid: 85% of its brain would be outside",
        "empty": "T2-w.nii cannot be normalised: every voxel is 0",
        "nothing": "cannot be resampled onto the BraTS grid: every voxel is 0",
    }
    lines = done.stderr.splitlines()
    assert len(lines) == len(sentences), done.stderr
    for name, sentence in sentences.items():
        [line] = [line for line in lines if f"; {name} is left out" in line]
        assert sentence in line
        assert not [path for path in out.rglob("*") if name in path.name]


def test_grid_is_recorded_for_every_subject(sliced):
    out, _ = sliced
    assert read_preprocessing(out)["grid"] == BRATS_GRID
    record = json.loads((out / RECORDS / "well.json").read_text())
    assert record["made_with"]["grid"] == BRATS_GRID
    record["made_with"].pop("grid")
    assert sorted(record["made_with"]["volumes"]) == ["FLAIR", "T2-w"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda made_with: made_with.pop("grid"), None),  # as in records of earlier versions
        (lambda made_with: made_with.update(grid=BRATS_GRID | {"shape": [200, 200]}), None),
        (lambda made_with: made_with.update(modality="T1"), BRATS_GRID),
    ],
)
def test_folder_has_a_grid_only_if_all_subjects_agree(tmp_path, edit, expected):
    (tmp_path / RECORDS).mkdir()
    assert read_preprocessing(tmp_path)["grid"] is None
    for name in "AB":
        made_with = {"grid": BRATS_GRID}
        if name == "B":
            edit(made_with)
        (tmp_path / RECORDS / f"{name}.json").write_text(json.dumps({"made_with": made_with, "files": {}}))
    assert read_preprocessing(tmp_path)["grid"] == expected


def test_second_run_writes_nothing_and_a_changed_table_is_refused(scans, sliced, tmp_path):
    out, _ = sliced
    text = (scans / "cohort.csv").read_text()
    good = [line for line in text.splitlines() if line.startswith(("subject", "well,", "masked"))]
    table, out = scans / "good.csv", tmp_path / "out"
    table.write_text("\n".join(good))
    args = ("--csv", table, "--output_dir", out, "--slices", 80, 82, "--modality")
    preprocess(*args, "FLAIR,T2-w")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "already preprocessed: 2 of 2 subjects" in preprocess(*args, "T2-w,FLAIR")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    table.write_text("\n".join(good).replace("masked/brainmask.nii", ""))
    done = run_script(*args, "FLAIR,T2-w")
    expect_refusal(done, "masked, made from a different brainmask")


# ----------------------------------------------------------------------------------------------------------
# Unusual masks in a table

SMALL_DEPTH = 44
AFFINE, SPACE, MIDDLE = GEOMETRIES["coarse"]
EVERY = ("--slices", 0, SMALL_DEPTH, "--test_slices", "all")


@pytest.fixture
def small_grid(monkeypatch) -> None:
    """Replace the BraTS grid by one with the coarse voxels, which takes a fraction of the time."""
    monkeypatch.setattr("datasets.subject.BRATS_SLICES", SliceGeometry("LPS", (4.0, 4.0, 4.0), (60, 60)))
    monkeypatch.setattr("datasets.subject.DEPTH", SMALL_DEPTH)


def write_two(folder: Path, **volumes: tuple[np.ndarray, np.ndarray]) -> Path:
    """Write a training and a test subject with a FLAIR and these other volumes, [*shape] with their affines."""
    flair = volumes.pop("FLAIR", (head(AFFINE, SPACE, MIDDLE, "FLAIR"), AFFINE))
    rows = [",".join(("subject", "split", "FLAIR", *volumes))]
    for factor, part in enumerate(("train", "test"), start=1):
        save(folder / f"{part}/FLAIR.nii", flair[0] * np.float32(factor), flair[1])
        for kind, (volume, affine) in volumes.items():
            save(folder / f"{part}/{kind}.nii", volume, affine)
        rows.append(",".join((f"{part}er", part, *(f"{part}/{kind}.nii" for kind in ("FLAIR", *volumes)))))
    return write_table(folder, "\n".join(rows))


def numbers(out: Path, part: str) -> list[int]:
    """Return the numbers of a split's slices."""
    return sorted(int(path.stem.rpartition("_")[2]) for path in (out / part / "seg").iterdir())


def test_slices_that_the_segmentation_does_not_cover_are_left_out(tmp_path, small_grid):
    """The segmentation ends below the top of the brain; one on a finer grid covers all of it."""
    seg = head(AFFINE, SPACE, MIDDLE, "seg") // 7 * np.uint8(255)
    fine = nibabel.affines.from_matvec(np.diag([-3, 3, 3]), (110, -100, 0))
    masks = {
        "whole": (seg, AFFINE),
        "cropped": (seg[:, :, :28], AFFINE),
        "finer": (head(fine, (74, 74, 60), MIDDLE, "seg") // 7 * np.uint8(255), fine),
    }
    found, printed = {}, {}
    for name, mask in masks.items():
        table, out = write_two(tmp_path / name, seg=mask), tmp_path / name / "out"
        printed[name] = preprocess("--csv", table, "--output_dir", out, *EVERY)
        found[name] = {part: numbers(out, part) for part in ("train", "test")}
        labels = np.concatenate([np.load(path) for path in (out / "test/seg").iterdir()])
        assert (labels.dtype, set(np.unique(labels))) == (np.uint8, {0, 255})
    uncovered = np.flatnonzero(head(AFFINE, SPACE, MIDDLE, "brainmask").any(axis=(0, 1)))[-5:]
    assert uncovered.tolist() == [28, 29, 30, 31, 32]
    assert found["finer"] == found["whole"]
    assert found["cropped"] == {part: whole[:-5] for part, whole in found["whole"].items()}
    sentence = "warning: seg ends before the brain, and slices that it does not cover are left out: 2 (tester, trainer)"
    assert sentence in printed["cropped"]
    assert "warning" not in printed["whole"] + printed["finer"]


def test_labels_a_hair_off_whole_numbers_are_rounded_and_said(tmp_path, small_grid):
    seg = head(AFFINE, SPACE, MIDDLE, "seg")
    labels, near = ((seg * 1.0).astype(np.float32) for _ in range(2))
    for whole, value in ((1, 0.9882), (2, 2.0235), (3, 3.00003), (255, 254.96)):
        place = tuple(np.argwhere(seg)[whole % 100])
        labels[place], near[place] = whole, value
    slices, said = {}, "warning: seg: labels up to 0.05 off whole numbers are rounded: 2 (tester, "
    for name, mask in {"labels": labels, "near": near}.items():
        table, out = write_two(tmp_path / name, seg=(mask, AFFINE)), tmp_path / name / "out"
        assert (said in preprocess("--csv", table, "--output_dir", out, *EVERY)) is (name == "near")
        slices[name] = written(out)
    assert slices["near"] == slices["labels"]
    for value in (0.94, 3.5, 255.6):
        table = write_two(tmp_path / "far", seg=(np.where(seg, np.float32(value), 0), AFFINE))
        done = run_script("--csv", table, "--output_dir", tmp_path / f"out{value}", *EVERY)
        assert done.code == 1
        assert done.stderr.count(f"must hold labels, whole numbers from 0 to 255, but holds {value}; ") == 2


def test_a_brain_mask_replaces_any_background(tmp_path, small_grid):
    """With one, a background of -1024 gives the same slices as one of 0; without, the subjects are left out."""
    flair = head(AFFINE, SPACE, MIDDLE, "FLAIR")
    mask, seg = ((head(AFFINE, SPACE, MIDDLE, kind), AFFINE) for kind in ("brainmask", "seg"))
    slices = {}
    for background in (0, -1024):
        volume = np.where(flair == 0, background, flair), AFFINE
        table, out = write_two(tmp_path, FLAIR=volume, brainmask=mask, seg=seg), tmp_path / f"out{background}"
        assert "warning" not in preprocess("--csv", table, "--output_dir", out, *EVERY)
        slices[background] = written(out)
    assert slices[-1024] == slices[0] != {}
    bare = write_two(tmp_path, FLAIR=volume, seg=seg)
    done = run_script("--csv", bare, "--output_dir", tmp_path / "bare", *EVERY)
    assert (done.code, done.stderr.count("FLAIR.nii cannot be normalised: its background is -")) == (1, 2)
    assert not written(tmp_path / "bare")


# ----------------------------------------------------------------------------------------------------------
# BraTS scans in a table


def test_brats_scan_is_sliced_unchanged_in_any_orientation(tmp_path):
    """No voxel is interpolated or shifted, with or without a table, whether the axes are LPS or RAS."""
    rng = np.random.default_rng(0)
    volume = np.zeros((240, 240, 155), np.int16)
    brain = (slice(60, 190), slice(40, 200), slice(20, 150))  # off centre
    volume[brain] = rng.integers(1, 900, volume[brain].shape)
    seg = np.zeros(volume.shape, np.uint8)
    seg[90:100, 90:120, 84] = 4
    affine = nibabel.affines.from_matvec(LPS[:3, :3], (0, 239, 0))
    for kind, voxels in (("t2", volume), ("seg", seg)):
        save(tmp_path / f"raw/A/A_{kind}.nii", voxels, affine)
        turned = nibabel.as_closest_canonical(nibabel.Nifti1Image(voxels, affine))
        assert nibabel.aff2axcodes(turned.affine) == ("R", "A", "S")
        nibabel.save(turned, tmp_path / f"turned_{kind}.nii")
    for part in LIST_NAMES:
        (tmp_path / "raw" / LIST_NAMES[part]).write_text("A" if part == "test" else "")
    (tmp_path / "as_is.csv").write_text("subject,t2,seg,split\nA,raw/A/A_t2.nii,raw/A/A_seg.nii,test")
    (tmp_path / "turned.csv").write_text("subject,t2,seg,split\nA,turned_t2.nii,turned_seg.nii,test")
    sources = {
        "brats": ("--data_dir", tmp_path / "raw", "--modality", "t2"),
        "as_is": ("--csv", tmp_path / "as_is.csv"),
        "turned": ("--csv", tmp_path / "turned.csv"),
    }
    outs = {name: tmp_path / name for name in sources}
    for name, source in sources.items():
        preprocess(*source, "--output_dir", outs[name])
        assert read_preprocessing(outs[name])["grid"] == BRATS_GRID
    image = np.load(outs["brats"] / "test/t2/A_t2_84.npy")
    np.testing.assert_array_equal(image, normalise(volume, 0.02, 0.9)[:, :, 84])
    assert written(outs["brats"]) == written(outs["as_is"]) == written(outs["turned"])


def test_subject_name_may_contain_a_modality(tmp_path):
    for kind in ("T1", "T2"):
        (tmp_path / kind).mkdir()
        np.save(tmp_path / kind / f"A_T1_B_{kind}_7.npy", np.zeros((2, 2)))
    [found] = find_slices(tmp_path, ("T1", "T2"))
    assert found["name"] == "A_T1_B_7"

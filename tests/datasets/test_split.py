"""Splits by hash: proportions, stability, fallbacks and command line."""

from itertools import chain
from pathlib import Path

import pytest

from datasets.cohorts import read_brats
from datasets.splits import INTERVALS, LIST_NAMES, read_list, split_off_validation, split_subjects
from tests.scripts.conftest import REPOSITORY, Done, run_here
from utils.cli import UserError

NAMES = [f"BraTS2021_{number:05d}" for number in range(2000)]


def part_of(splits: dict[str, list[str]]) -> dict[str, str]:
    return {subject: part for part, subjects in splits.items() for subject in subjects}


def make_subjects(data_dir: Path, names: list[str]) -> None:
    for name in names:
        (data_dir / name).mkdir(parents=True)
        (data_dir / name / f"{name}_flair.nii.gz").touch()


def run_script(*args: object) -> Done:
    return run_here("datasets/split_traintest.py", *args, cwd=REPOSITORY)


def test_intervals_cover_the_unit_interval_once():
    borders = list(INTERVALS.values())
    assert list(INTERVALS) == list(LIST_NAMES) == ["train", "val", "test"]
    assert borders[0][0] == 0
    assert borders[-1][1] == 1
    assert [high for _, high in borders[:-1]] == [low for low, _ in borders[1:]]


@pytest.mark.parametrize("seed", [0, 1])
def test_proportions_over_many_names(seed):
    splits = split_subjects(NAMES, seed)
    assert sorted(chain.from_iterable(splits.values())) == NAMES
    # Tolerances: four standard deviations of a binomial with n = 2000.
    assert len(splits["train"]) / 2000 == pytest.approx(0.78, abs=0.037)
    assert len(splits["val"]) / 2000 == pytest.approx(0.11, abs=0.028)
    assert len(splits["test"]) / 2000 == pytest.approx(0.11, abs=0.028)


def test_split_is_the_same_on_every_machine():
    # By hand: `printf 'BraTS2021_00004:0' | sha256sum` prints d8e3…, and 0xd8e3 / 0x10000 = 0.847.
    splits = split_subjects(NAMES[:20])
    assert splits["val"] == ["BraTS2021_00004", "BraTS2021_00013", "BraTS2021_00014", "BraTS2021_00017"]
    assert splits["test"] == ["BraTS2021_00001", "BraTS2021_00002", "BraTS2021_00009"]


def test_order_of_the_subjects_is_irrelevant():
    assert split_subjects(reversed(NAMES[:100])) == split_subjects(NAMES[:100])


def test_extra_subject_moves_no_other():
    fewer = part_of(split_subjects(NAMES[:100]))
    for extra in NAMES[100:130]:
        more = part_of(split_subjects([*NAMES[:100], extra]))
        del more[extra]
        assert more == fewer


def test_seed_changes_the_split():
    assert split_subjects(NAMES[:100], seed=0) != split_subjects(NAMES[:100], seed=1)
    assert split_off_validation(NAMES[:100], seed=0) != split_off_validation(NAMES[:100], seed=1)


@pytest.mark.parametrize("count", range(3, 41))
def test_no_part_is_empty(count):
    for start in range(0, 400, 40):
        names = NAMES[start : start + count]
        splits = split_subjects(names)
        assert all(splits.values())
        assert sorted(chain.from_iterable(splits.values())) == names


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_subjects_are_refused(count):
    with pytest.raises(UserError, match=f"3 subjects or more, not {count}"):
        split_subjects(NAMES[:count])


def test_validation_is_split_off_training():
    training, validation = split_off_validation(NAMES)
    assert sorted(training + validation) == NAMES
    assert len(validation) / 2000 == pytest.approx(11 / 89, abs=0.03)
    without_one = split_off_validation(NAMES[:-1])
    assert [set(part) - {NAMES[-1]} for part in (training, validation)] == [set(part) for part in without_one]


def test_validation_has_its_full_share_of_a_training_list_that_was_hashed():
    hashed = split_subjects(NAMES)["train"]
    _, validation = split_off_validation(hashed)
    assert len(validation) / len(hashed) == pytest.approx(11 / 89, abs=0.035)


@pytest.mark.parametrize("count", range(2, 41))
def test_neither_training_nor_validation_is_empty(count):
    for start in range(0, 400, 40):
        training, validation = split_off_validation(NAMES[start : start + count])
        assert training
        assert validation
        assert len(training) + len(validation) == count


def test_single_subject_stays_in_training():
    assert split_off_validation(["A"]) == (["A"], [])
    assert split_off_validation([]) == ([], [])


def test_subjects_are_folders_with_volumes_named_after_them(tmp_path):
    make_subjects(tmp_path, ["B", "A"])
    (tmp_path / "C").mkdir()
    (tmp_path / "C" / "C_t1.nii").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "else_flair.nii.gz").touch()
    (tmp_path / "D_flair.nii.gz").touch()
    assert list(read_brats(tmp_path).subjects) == ["A", "B", "C"]


def test_lists_may_have_a_bom_crlf_spaces_and_duplicates(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffA\r\n\r\n  B \r\nA".encode())
    assert read_list(path) == ["A", "B"]


def test_command_line_writes_the_three_lists(tmp_path):
    make_subjects(tmp_path / "raw", NAMES[:30])
    args = ("--data_dir", tmp_path / "raw", "--output_dir", tmp_path / "lists")
    first = run_script(*args, "--seed", 3)
    assert (first.code, first.stderr) == (0, "")
    written = {part: read_list(tmp_path / "lists" / name) for part, name in LIST_NAMES.items()}
    assert written == split_subjects(NAMES[:30], seed=3)
    for part, subjects in written.items():
        assert f"{part}: {len(subjects)} subjects" in first.stdout

    again = run_script(*args, "--seed", 3)
    assert again.code == 0

    other_seed = run_script(*args, "--seed", 4)
    assert other_seed.code == 2
    assert "already lists other subjects" in other_seed.stderr
    assert {part: read_list(tmp_path / "lists" / name) for part, name in LIST_NAMES.items()} == written


@pytest.mark.parametrize(
    ("names", "args", "message"),
    [
        (None, (), "there is no folder"),
        ([], (), "no subject in"),
        (["A", "B"], (), "3 subjects or more"),
        (NAMES[:5], ("--seed", "x"), "invalid int value"),
        (NAMES[:5], ("--sed", "1"), "did you mean '--seed'"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, names, args, message):
    if names is not None:
        (tmp_path / "raw").mkdir()
        make_subjects(tmp_path / "raw", names)
    result = run_script("--data_dir", tmp_path / "raw", "--output_dir", tmp_path / "lists", *args)
    assert result.code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "lists").exists()

"""`python -m evaluation.tables`: one table for several test runs."""

import json

import pytest

from tests.scripts.conftest import expect_refusal

pytestmark = pytest.mark.xdist_group("scripts")  # with test_chain.py, whose runs are reported

UNETS = "unet_forward_phantom_t2_flair__unet_backward_phantom_t2_flair"
MASKED = "masked__unet_backward_phantom_t2_flair__ddim5_stride8"


def test_the_table_has_both_methods_and_one_baseline(workspace, chain, as_subprocess, repository):
    folders = [workspace / "experiments/results" / name for name in (UNETS, MASKED)]
    done = as_subprocess("-m", "evaluation.tables", *folders, cwd=repository)
    assert done.code == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    methods = ("intensity (flair)", "Cyclic UNet", "MMCCD")
    starts = ("method  ", *(f"{name}{kind}  " for name in methods for kind in ("", ", chosen")))
    positions = []
    for start in starts:
        (position,) = [i for i, line in enumerate(lines) if line.startswith(start)]
        positions.append(position)
    assert positions == sorted(positions)
    # Each row equals the one that the test run printed.
    for run, start in (("cyclic_unet", "Cyclic UNet  "), ("mmccd", "MMCCD, chosen  ")):
        (printed,) = [line for line in chain[run].stdout.splitlines() if line.startswith(start)]
        (row,) = [line for line in lines if line.startswith(start)]
        assert row.split() == printed.split()
    for folder in folders:
        assert str(folder / "figures") in done.stdout


def test_runs_on_different_test_sets_have_separate_tables(workspace, chain, in_process, tmp_path):
    folders = [tmp_path / name for name in ("same", "other", "smaller", "input")]
    path = workspace / "experiments/results" / UNETS / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8"))
    assert set(metrics["test_set"]) == {"flair", "seg", "brainmask"}
    changes = [{}, {"test_set": metrics["test_set"] | {"flair": "other"}}, {"n_slices": 2}, {"test_set": {"t2": "?"}}]
    for folder, change in zip(folders, changes, strict=True):
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(metrics | change), encoding="utf-8")
    done = in_process("evaluation.tables", path.parent, *folders, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "warning: 3 different test sets, a table for each: do not compare scores between tables\n" in done.stdout
    assert done.stdout.count("\nmethod  ") == 3  # that of a run that shares no kind of image is not known to differ
    done = in_process("evaluation.tables", path.parent, folders[0], cwd=tmp_path)
    assert "warning" not in done.stdout
    assert done.stdout.count("method  ") == 1


def test_results_of_an_earlier_version_are_refused(workspace, chain, in_process, tmp_path):
    """Its metrics.json lacks the score, the error floor and the unsmoothed metrics."""
    metrics = json.loads((workspace / "experiments/results" / UNETS / "metrics.json").read_text(encoding="utf-8"))
    for key in ("score", "usual_error", "unsmoothed"):
        del metrics[key]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"sampling_settings": None}), encoding="utf-8")
    done = in_process("evaluation.tables", tmp_path, cwd=tmp_path)
    expect_refusal(done, f"{tmp_path / 'metrics.json'} is damaged", "run modality_cyclic_test.py")
    assert done.stdout == ""


def test_a_folder_without_results_is_refused(in_process, tmp_path):
    for folder in (tmp_path / "not there", tmp_path):
        done = in_process("evaluation.tables", folder, cwd=tmp_path)
        expect_refusal(done, f"no metrics.json in {folder}", "modality_cyclic_test.py")
        assert done.stdout == ""

"""docs/your-own-method.md: the method built from the page's code works with every script."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts.conftest import GRID

pytestmark = pytest.mark.xdist_group("docs")

ROOMS = ("config", "datasets", "evaluation", "guided_diffusion", "models", "scoring", "utils")
# Runs the command lines on stdin in one process, so that torch is imported once.
RUN_ALL = """
import runpy, shlex, sys
for line in sys.stdin:
    sys.argv = shlex.split(line)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{line}: {end.code}")
"""


@pytest.fixture(scope="module")
def page(repository) -> str:
    return (repository / "docs/your-own-method.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project(page, repository, workspace, tmp_path_factory) -> Path:
    """A copy of the project with the page's three snippets applied, the workspace's slices and a scan."""
    folder = tmp_path_factory.mktemp("project")
    for room in ROOMS:
        shutil.copytree(
            repository / room, folder / room, ignore=lambda path, names: [n for n in names if n[-3:] != ".py"]
        )
    for script in repository.glob("modality_cyclic_*.py"):
        shutil.copy(script, folder)
    (folder / "datasets/data").symlink_to(workspace / "datasets/data")
    shutil.copy(sorted(workspace.glob("datasets/RSNA*/*/*_flair.nii.gz"))[-1], folder / "patient_flair.nii.gz")
    module, line, setting = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (folder / "models/cyclic_patch.py").write_text(module, encoding="utf-8")
    for path, before, text in (
        ("models/__init__.py", "METHODS = {\n", line),
        ("config/brats_config.py", "    baselines.noise_timestep", setting),
    ):
        code = (folder / path).read_text(encoding="utf-8")
        assert code.count(before) == 1
        position = code.index(before) + (len(before) if before.endswith("\n") else 0)
        (folder / path).write_text(code[:position] + text + code[position:], encoding="utf-8")
    return folder


def test_the_pages_commands_run(page, project, tiny, short):
    """Train, resume, test, compare, rescore and predict by the page's commands, with the tests' tiny networks."""
    forward, backward, test, compare, predict = re.findall(r"^python (.*)$", page, re.MULTILINE)
    flags, data = " ".join(shlex.quote(flag) for flag in (*tiny, *short)), "--data_dir=datasets/data"
    grid = " ".join(GRID)
    results, unet = (Path(one) for one in compare.split()[-2:])
    run = run_all(
        project,
        f"{forward} {flags} --experiment_name=straight",
        f"{forward} {flags} --config.score_model.training.iterations=2",
        f"{forward} {flags}",
        f"{backward} {flags}",
        f"{test} {data} {grid}",
        *(f"{one.replace('--model_name patch', '')} {flags}" for one in (forward, backward)),
        f"{test.replace('--model_name patch', '')} {data} {grid}",
        compare,
        f"modality_cyclic_test.py --rescore {results} {grid}",
        f"{predict} --slices 76 78",
    )
    assert run.returncode == 0, run.stderr
    assert "resuming from opt000002.pt" in run.stdout
    weights = [
        torch.load(project / f"experiments/{name}/ema_0.5_000004.pt")
        for name in ("straight", results.name.split("__")[0])
    ]
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())
    metrics = json.loads((project / results / "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["method"], metrics["network_passes"]) == ("cyclic_patch", 2 * 4)  # 3 test + 1 validation slice
    assert f"A: {results}" in run.stdout
    assert f"B: {unet}" in run.stdout
    assert len(re.findall(r"^patch cycle ", run.stdout, re.MULTILINE)) >= 2  # by testing and by rescoring
    assert (project / "marked/patient_flair_mask.nii.gz").is_file()


def test_help_lists_the_pages_method(project):
    run = run_all(project, "modality_cyclic_train.py --help")
    assert "patch: patch cycle" in " ".join(run.stdout.split())


def run_all(project: Path, *commands: str) -> subprocess.CompletedProcess:
    """Run command lines one after another in one process."""
    return subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        cwd=project,
        input="\n".join(commands),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

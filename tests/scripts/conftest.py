"""Fixtures and helpers for the tests of the scripts.

Importing torch and MONAI takes seconds, so a few commands run once per session as processes of their own, and all
variations run inside the test process.
"""

import contextlib
import fcntl
import functools
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

REPOSITORY = Path(__file__).resolve().parents[2]
RAW = "datasets/RSNA_ASNR_MICCAI_BraTS2021_TrainingData_16July2021"
SLICES = "datasets/data"

# The smallest network, image and bands for which every option still has an effect.
TINY = (
    "--dataset=phantom",
    f"--data_dir={SLICES}",
    "--config.data.image_size=32",
    "--config.score_model.model.model_channels=16",
    "--config.score_model.model.channel_mult=(1, 1)",
    "--config.score_model.mask.width=8",
    "--config.score_model.mask.stride=8",
    "--config.score_model.sampling.stride=8",
)
SHORT = (
    "--config.score_model.training.iterations=4",
    "--config.score_model.training.batch_size=2",
    "--config.score_model.training.lr=0.01",
    "--config.score_model.training.ema_rate=0.5",
    "--config.score_model.training.log_interval=1",
    "--config.score_model.training.save_interval=2",
)


# A tenth of the scores that validation slices choose from, still with alternatives of most settings. Test runs in this
# process choose among these, unless a test names others.
GRID = tuple(
    f"--config.score_model.scoring.{key}={value}"
    for key, value in {
        "norm": "absolute,standardised",
        "match": "scan,none",
        "smoothing": "gaussian,none",
        "width": "0.03125",
        "outside": "zeros",
        "neighbours": "0",
    }.items()
)


class Done(NamedTuple):
    """Exit code and output of a command."""

    code: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


def run_process(*command: object, cwd: Path) -> Done:
    """Run Python with these arguments on one core, without a GPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def save_blank(figure: Figure, path: Path, **_: object) -> None:
    """Save a single pixel instead of a figure: drawing takes longer than scoring a tiny cohort."""
    matplotlib.image.imsave(path, np.zeros((1, 1, 3)))


def run_here(script: str, *args: object, cwd: Path, pictures: bool = True) -> Done:
    """Run a script or module of the repository in this process, which saves its imports.

    If `pictures` is false, save its figures as single pixels.
    """
    path = str(REPOSITORY / script)
    if script == "modality_cyclic_test.py" and "score_model.scoring." not in " ".join(map(str, args)):
        args = (*GRID, *args)
    before = Path.cwd()
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [path, *map(str, args)]),
        mock.patch.object(threading, "excepthook", threading.excepthook),  # utils.cli.run replaces it
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(Figure, "savefig", Figure.savefig if pictures else save_blank),
    ):
        os.chdir(cwd)
        try:
            if script.endswith(".py"):
                runpy.run_path(path, run_name="__main__")
            else:
                sys.modules.pop(script, None)  # else runpy warns that it is already imported
                runpy.run_module(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        except Exception:
            code = 1
            traceback.print_exc()
        finally:
            os.chdir(before)
    return Done(code, stdout.getvalue(), stderr.getvalue())


def write_random_slices(
    data_dir: Path, counts: dict[str, int], modalities: tuple[str, ...], rng: np.random.Generator
) -> None:
    """Write `counts[split]` noise slices of 48 × 48 px, with a brain in the middle and a lesion in a corner."""
    masks = {"seg": ((0, 24),), "brainmask": 12}  # padding around 24 × 24 px
    first = 0
    for split, n in counts.items():
        for kind in (*modalities, *masks):
            folder = data_dir / split / kind
            folder.mkdir(parents=True)
            for i in range(first, first + n):
                image = np.pad(rng.uniform(-2.5, 3, (46, 46)).astype(np.float32), 1, constant_values=-3)
                if kind in masks:
                    image = np.pad(np.ones((24, 24), np.uint8), masks[kind])
                np.save(folder / f"S{i}_{kind}_80.npy", image)
        first += n


def expect_success(done: Done) -> Done:
    """Assert exit code 0 and no traceback or warning."""
    assert done.code == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return done


def expect_refusal(done: Done, *phrases: str) -> None:
    """Assert exit code 2 and a one-line error that contains all phrases; only progress bars may precede it."""
    assert done.code == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.removesuffix("\n").split("\n") if not line.startswith("\r")]
    assert len(lines) == 1, done.stderr
    assert re.match(r"[\w.]+: error: ", lines[0])
    for phrase in phrases:
        assert phrase in lines[0]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Flags for a tiny network, in training and testing."""
    return TINY


@pytest.fixture(scope="session")
def short() -> tuple[str, ...]:
    """Flags that limit training to a few steps."""
    return SHORT


@pytest.fixture(scope="session")
def in_process() -> Command:
    """Run a script in this process; pass `pictures=True` in tests of its figures."""
    return functools.partial(run_here, pictures=False)


@pytest.fixture(scope="session")
def as_subprocess() -> Command:
    return run_process


def make_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a read-only folder shared by all workers of a session; the first worker that needs it creates it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            partial = root / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(root / name)
    return root / name


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    """A working directory with a phantom cohort at the default path, preprocessed without flags."""
    counts = ("--train", 2, "--val", 1, "--test", 3, "--workers", 1)

    def write_cohort(folder: Path) -> None:
        expect_success(run_process(REPOSITORY / "datasets/phantom.py", "--output_dir", "raw", *counts, cwd=folder))
        (folder / RAW).parent.mkdir()
        (folder / RAW).symlink_to("../raw")
        expect_success(run_process(REPOSITORY / "datasets/brats_preprocess.py", cwd=folder))

    cohort, folder = make_once(tmp_path_factory, "cohort", write_cohort), tmp_path_factory.mktemp("workspace")
    shutil.copytree(cohort / SLICES, folder / SLICES)
    (folder / RAW).symlink_to(cohort / "raw")
    return folder


@pytest.fixture(scope="session")
def no_flags(workspace: Path) -> dict[str, Done]:
    """Train and test with the default (the paper's) settings, except for one iteration and batch size 1."""
    train, test = (f"modality_cyclic_{kind}.py" for kind in ("train", "test"))
    one = ("--config.score_model.training.iterations=1", "--config.score_model.training.batch_size=1")
    return {
        "forward": expect_success(run_here(train, *one, cwd=workspace)),
        "backward": expect_success(run_here(train, "--training_process=backward", *one, cwd=workspace)),
        "test": expect_success(run_process(REPOSITORY / test, cwd=workspace)),
    }


@pytest.fixture(scope="session")
def chain(tmp_path_factory, workspace: Path) -> dict[str, Done]:
    """Train and test both methods with a tiny network; the diffusion experiment is called `masked`."""
    train, test = (f"modality_cyclic_{kind}.py" for kind in ("train", "test"))
    masked = ("--model_name=diffusion", "--experiment_name=masked")
    mmccd = ("--model_name=diffusion", "--experiment_name_forward=masked", "--timestep_respacing=5")
    data = ("--dataset=phantom", f"--data_dir={SLICES}")

    def run_chain(folder: Path) -> None:
        (folder / "datasets").symlink_to(workspace / "datasets")
        ends = {
            "forward": run_process(REPOSITORY / train, *TINY, *SHORT, cwd=folder),
            "backward": run_here(train, *TINY, *SHORT, "--training_process=backward", cwd=folder),
            "masked": run_here(train, *TINY, *SHORT, *masked, cwd=folder),
            "cyclic_unet": run_process(REPOSITORY / test, *data, *GRID, cwd=folder),
            "mmccd": run_here(test, *data, "--config.score_model.sampling.stride=8", *mmccd, cwd=folder),
        }
        (folder / "ends.json").write_text(json.dumps({name: expect_success(end) for name, end in ends.items()}))

    folder = make_once(tmp_path_factory, "chain", run_chain)
    shutil.copytree(folder / "experiments", workspace / "experiments", dirs_exist_ok=True)
    return {name: Done(*end) for name, end in json.loads((folder / "ends.json").read_text()).items()}

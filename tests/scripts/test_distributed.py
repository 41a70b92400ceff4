"""Training and scoring in several processes (torchrun, mpiexec) give the results of a single process."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion import dist_util

pytestmark = pytest.mark.xdist_group("distributed")  # one process, so that everything is trained once

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN, TEST = (str(REPOSITORY / f"modality_cyclic_{kind}.py") for kind in ("train", "test"))
LAUNCHERS = ("torchrun", "mpiexec")
STEPS, HALF = 20, 10
N_TEST = 7
BATCH_SIZE = 5  # two processes get 2 and 3 slices
DATA = ("--dataset=phantom", "--data_dir=data", "--gpu_id=cpu")
TRAINING = (
    f"--config.score_model.training.iterations={STEPS}",
    f"--config.score_model.training.batch_size={BATCH_SIZE}",
    "--config.score_model.training.log_interval=1",
    "--config.score_model.model.norm_groups=4",  # groups of one channel cancel the bias: its gradient would be noise
    f"--config.score_model.training.save_interval={HALF}",
)
# The phantom config has no dropout and uses float32. 20 timesteps are few enough to all be sampled.
DIFFUSION = (
    "--model_name=diffusion",
    "--config.score_model.training.schedule_sampler=loss-second-moment",
    "--config.score_model.diffusion.steps=20",
    "--config.score_model.sampling.timestep_respacing=3",
)
EXPERIMENTS = {"unet_forward_phantom_t2_flair": (), "diffusion_forward_phantom_t2_flair": DIFFUSION}
BACKWARD = "--training_process=backward"  # scoring needs this network, too
SCORING = {
    "cyclic_unet": ("--model_name=unet",),
    "mmccd": ("--model_name=diffusion", "--timestep_respacing=3", "--config.score_model.sampling.stride=8"),
}

# Runs several scripts one after another, so that imports happen once.
MANY = """
import json, runpy, sys
from guided_diffusion import dist_util
dist_util.setup()
shut_down = dist_util.shut_down
dist_util.setup = dist_util.shut_down = lambda: None
for script, *args in json.loads(sys.argv[1]):
    sys.argv = [script, *args]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
shut_down()
"""


def launch(launcher: str, processes: int, *command: object, cwd: Path) -> subprocess.Popen:
    """Start a script in several CPU processes, with output to `cwd/stdout` and `cwd/stderr`."""
    binary = str(Path(sys.executable).with_name(launcher))
    how = ["--standalone", f"--nproc-per-node={processes}"] if launcher == "torchrun" else ["-n", str(processes)]
    python = [] if launcher == "torchrun" else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": str(REPOSITORY)}
    with (cwd / "stdout").open("w") as stdout, (cwd / "stderr").open("w") as stderr:
        return subprocess.Popen(
            [binary, *how, *python, *map(str, command)], cwd=cwd, env=environment, stdout=stdout, stderr=stderr
        )


def run_many(launcher: str, processes: int, commands: list[tuple[str, ...]], cwd: Path) -> str:
    """Run command lines in several processes and return their stdout."""
    (cwd / "many.py").write_text(MANY, encoding="utf-8")
    done = launch(launcher, processes, "many.py", json.dumps(commands), cwd=cwd)
    assert done.wait(timeout=300) == 0, (cwd / "stderr").read_text()
    return (cwd / "stdout").read_text()


def new_folder(folder: Path, data: Path) -> Path:
    """Create a working directory with a link to the slices."""
    folder.mkdir()
    (folder / "data").symlink_to(data)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A few slices that training can learn from: T2 is the negative of FLAIR."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    brain = (y - 24) ** 2 + (x - 24) ** 2 < 20**2
    for split, n in {"train": 9, "val": 2, "test": N_TEST}.items():
        for i in range(n):
            flair = np.where(brain, np.cos(0.2 * x + i) + 0.1 * rng.normal(size=x.shape), -3)
            lesion = brain & ((y - 16 - i) ** 2 + (x - 24) ** 2 < 30)
            kinds = {"flair": flair, "t2": np.where(brain, -flair, -3), "seg": lesion, "brainmask": brain}
            for kind, image in kinds.items():
                (folder / split / kind).mkdir(parents=True, exist_ok=True)
                dtype = np.float32 if kind in ("flair", "t2") else np.uint8
                np.save(folder / split / kind / f"{split}{i}_{kind}_70.npy", image.astype(dtype))
    return folder


@pytest.fixture(scope="module")
def trainings(tiny) -> list[tuple[str, ...]]:
    """Return the training command line of each experiment."""
    return [(TRAIN, *tiny, *DATA, *TRAINING, *flags) for flags in EXPERIMENTS.values()]


@pytest.fixture(scope="module")
def single_process(tmp_path_factory, data, trainings, in_process) -> Path:
    """Train and score everything in one process."""
    folder = new_folder(tmp_path_factory.mktemp("alone") / "here", data)
    for command in [*trainings, (*trainings[0], BACKWARD), *((TEST, *DATA, *flags) for flags in SCORING.values())]:
        done = in_process(*command, cwd=folder)
        assert done.code == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, data, trainings, single_process) -> dict[str, Path]:
    """Train with two processes; under mpiexec, all but the first experiment resume `single_process` halfway."""
    folders = {launcher: new_folder(tmp_path_factory.mktemp(launcher) / "here", data) for launcher in LAUNCHERS}
    for name in list(EXPERIMENTS)[1:]:
        shutil.copytree(single_process / "experiments" / name, folders["mpiexec"] / "experiments" / name)
        for last in (folders["mpiexec"] / "experiments" / name).glob(f"*{STEPS}.pt"):
            last.unlink()
    for launcher, folder in folders.items():
        run_many(launcher, 2, trainings, folder)
    return folders


def losses_of(experiment: Path) -> dict[int, float]:
    with (experiment / "progress.csv").open(newline="", encoding="utf-8") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def read(experiment: Path, name: str) -> dict:
    return torch.load(experiment / name, weights_only=True)


# ----------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_two_processes_train_as_one_does(single_process, two_processes, launcher, name):
    one, two = (folder / "experiments" / name for folder in (single_process, two_processes[launcher]))
    expected, losses = losses_of(one), losses_of(two)
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[STEPS] < 0.9 * losses[1]
    for file in (f"model{STEPS:06d}.pt", f"ema_0.995_{STEPS:06d}.pt"):
        torch.testing.assert_close(read(two, file), read(one, file), rtol=0, atol=1e-4)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_timestep_sampler_gathers_losses_of_all_processes(single_process, two_processes, launcher):
    one, two = (
        read(folder / "experiments" / "diffusion_forward_phantom_t2_flair", f"opt{STEPS:06d}.pt")["schedule"]
        for folder in (single_process, two_processes[launcher])
    )
    assert two["counts"].sum() == STEPS * BATCH_SIZE
    torch.testing.assert_close(two["counts"], one["counts"])
    torch.testing.assert_close(two["history"], one["history"], rtol=1e-4, atol=1e-5)


def test_only_the_first_process_writes_and_prints(single_process, two_processes):
    for name in EXPERIMENTS:
        one, two = (folder / "experiments" / name for folder in (single_process, two_processes["torchrun"]))
        files = [
            sorted("events" if "tfevents" in path.name else path.name for path in folder.iterdir())
            for folder in (one, two)
        ]
        assert files[0] == files[1]
        lines = [(folder / "log.txt").read_text(encoding="utf-8").splitlines() for folder in (one, two)]
        assert len(lines[0]) == len(lines[1])
    stdout = (two_processes["torchrun"] / "stdout").read_text()
    assert stdout.count("done, all in") == stdout.count("9 slices, kept in memory") == len(EXPERIMENTS)
    assert stdout.count(f"saved ema_0.995_{STEPS:06d}.pt") == len(EXPERIMENTS)
    assert "on 2 × cpu in float32" in stdout
    stderr = (two_processes["torchrun"] / "stderr").read_text()
    assert stderr.count("reading train: 100%") == len(EXPERIMENTS)


# ----------------------------------------------------------------------------------------------------------
# Scoring


@pytest.fixture(scope="module")
def scored_by_three(tmp_path_factory, data, single_process) -> Path:
    folder = new_folder(tmp_path_factory.mktemp("three") / "here", data)
    (folder / "experiments").mkdir()
    for experiment in (single_process / "experiments").glob("*_*"):
        (folder / "experiments" / experiment.name).symlink_to(experiment)
    run_many("torchrun", 3, [(TEST, *DATA, *flags) for flags in SCORING.values()], folder)
    return folder


@pytest.mark.parametrize("method", SCORING)
def test_three_processes_score_as_one_does(single_process, scored_by_three, method):
    one, three = (
        {metrics["method"]: path.parent for path, metrics in read_metrics(folder).items()}[method]
        for folder in (single_process, scored_by_three)
    )
    with np.load(one / "error_maps.npz") as expected, np.load(three / "error_maps.npz") as maps:
        assert set(maps) == set(expected)
        assert [len(maps[key]) for key in maps if key.endswith("test_scores")] == [N_TEST]
        for key, array in expected.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(maps[key], array, rtol=0, atol=1e-6 * np.abs(array).max())
            elif key != "run":  # `run` is compared below, as part of metrics.json
                np.testing.assert_array_equal(maps[key], array)
    metrics, expected = (dict(flatten(json.loads((run / "metrics.json").read_text()))) for run in (three, one))
    assert set(metrics) == set(expected)
    for path, value in expected.items():
        if isinstance(value, float):  # e.g. a threshold, which is one pixel's score
            assert metrics[path] == pytest.approx(value, rel=1e-3, abs=1e-6), path
        else:
            assert metrics[path] == value, path
    assert sorted(path.name for path in three.iterdir() if "tfevents" not in path.name) == sorted(
        path.name for path in one.iterdir() if "tfevents" not in path.name
    )
    assert len(list(three.glob("*tfevents*"))) == len(list(one.glob("*tfevents*")))


def flatten(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the path and value of every leaf of nested dicts and lists."""
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten(value, f"{path}/{key}")
    else:
        yield path, tree


def read_metrics(folder: Path) -> dict[Path, dict]:
    return {
        path: json.loads(path.read_text(encoding="utf-8"))
        for path in (folder / "experiments/results").glob("*/metrics.json")
    }


def test_the_table_is_printed_once(scored_by_three):
    stdout = (scored_by_three / "stdout").read_text()
    assert stdout.count("\nresults: ") == stdout.count("on 3 × cpu") == len(SCORING)


# ----------------------------------------------------------------------------------------------------------
# Signals and crashes


@contextlib.contextmanager
def running(launcher: str, *command: object, cwd: Path) -> Iterator[subprocess.Popen]:
    """Start two processes and terminate them when the block ends."""
    process = launch(launcher, 2, *command, cwd=cwd)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(found, process: subprocess.Popen) -> None:
    """Wait for `found()`, for two minutes at most, and fail if the process ends first."""
    for _ in range(1200):
        if found():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise TimeoutError


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_saves_once_and_the_same_command_resumes(tmp_path, data, tiny, in_process, launcher):
    folder = new_folder(tmp_path / "here", data)
    experiment = folder / "experiments/unet_forward_phantom_t2_flair"
    command = (TRAIN, *tiny, *DATA, *TRAINING, "--config.score_model.training.save_interval=100000")
    forever = "--config.score_model.training.iterations=100000"
    with running(launcher, *command, forever, cwd=folder) as process:
        wait_for(lambda: (experiment / "progress.csv").exists() and len(losses_of(experiment)) > 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    (saved,) = experiment.glob("opt*.pt")
    step = int(saved.stem.removeprefix("opt"))
    log = (experiment / "log.txt").read_text(encoding="utf-8")
    assert log.count("stopped by SIGTERM: run the same command again to resume") == 1
    assert log.count("saved ") == 1
    assert (folder / "stdout").read_text().count("stopped by SIGTERM") == 1
    longer = f"--config.score_model.training.iterations={step + 3}"
    done = in_process(*command, longer, cwd=folder)  # in one process
    assert done.code == 0, done.stderr
    assert f"resuming from opt{step:06d}.pt" in done.stdout
    assert list(losses_of(experiment)) == list(range(1, step + 4))


# Communicates forever, as training does; given `raise`, the second process fails.
TALK = """
import os, sys, time
from pathlib import Path
from guided_diffusion import dist_util
dist_util.setup()
Path(f"pid{dist_util.rank()}").write_text(str(os.getpid()))
while True:
    dist_util.any_of(False)
    time.sleep(0.01)
    if sys.argv[1] == "raise" and dist_util.rank() == 1:
        raise ValueError("the second process has had enough")
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_process_ends_the_job(tmp_path, launcher):
    (tmp_path / "talk.py").write_text(TALK, encoding="utf-8")
    with running(launcher, "talk.py", "on", cwd=tmp_path) as process:
        wait_for(lambda: all((tmp_path / name).exists() for name in ("pid0", "pid1")), process)
        time.sleep(0.5)
        os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    wait_for_end(int((tmp_path / "pid0").read_text()))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_exception_of_a_process_is_printed(tmp_path, launcher):
    (tmp_path / "talk.py").write_text(TALK, encoding="utf-8")
    with running(launcher, "talk.py", "raise", cwd=tmp_path) as process:
        assert process.wait(timeout=60) != 0
    assert "ValueError: the second process has had enough" in (tmp_path / "stderr").read_text()
    wait_for_end(int((tmp_path / "pid0").read_text()))


def wait_for_end(pid: int) -> None:
    """Wait up to 10 s for a process to disappear after its launcher."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process outlived its job")


# ----------------------------------------------------------------------------------------------------------
# User errors


@pytest.mark.parametrize("script", [TRAIN, TEST])
def test_slurm_tasks_without_a_launcher_are_refused(tmp_path, data, in_process, monkeypatch, script):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    folder = new_folder(tmp_path / "here", data)
    done = in_process(script, *DATA, cwd=folder)
    assert done.code == 2
    assert len(done.stderr.splitlines()) == 1
    assert "they cannot find each other: start them with torchrun" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["data"]


def test_a_batch_smaller_than_the_number_of_processes_is_refused(tmp_path, data, tiny, in_process, monkeypatch):
    monkeypatch.setattr(dist_util, "world_size", lambda: BATCH_SIZE + 1)
    folder = new_folder(tmp_path / "here", data)
    done = in_process(TRAIN, *tiny, *DATA, *TRAINING, cwd=folder)
    assert done.code == 2
    assert f"batch_size={BATCH_SIZE} is the total over all processes" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["data"]

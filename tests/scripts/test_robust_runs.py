"""Training that is killed, stopped, started twice, reconfigured or out of disk space resumes or refuses with a reason.

A resumed run must equal an uninterrupted one bit for bit: checkpoints are compared by `torch.equal`.
"""

import csv
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from datasets.brats2021 import BraTS2021Dataset
from guided_diffusion import checkpoint
from guided_diffusion.logger import Logger

pytestmark = pytest.mark.xdist_group("robust runs")  # one worker, so that its fixtures are built once

TRAIN = "modality_cyclic_train.py"
CPU = torch.device("cpu")
TRAINING = "--config.score_model.training"
# Network and images are small, for steps of milliseconds; dropout makes the result depend on the random state.
FLAGS = (
    "--gpu_id=cpu",
    "--dataset=phantom",
    "--data_dir=data",
    "--config.precision=float32",
    "--config.data.image_size=16",
    "--config.score_model.model.model_channels=16",
    "--config.score_model.model.channel_mult=(1, 1)",
    "--config.score_model.model.dropout=0.2",
    "--config.score_model.diffusion.steps=25",
    "--config.score_model.mask.width=4",
    "--config.score_model.mask.stride=4",
    "--config.score_model.sampling.stride=4",
    "--config.score_model.sampling.timestep_respacing=2",
    f"{TRAINING}.lr=0.01",
    f"{TRAINING}.ema_rate=0.5",
    f"{TRAINING}.log_interval=1",
    f"{TRAINING}.batch_size=4",
)
UNET = (*FLAGS, f"{TRAINING}.iterations=6", f"{TRAINING}.save_interval=2")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """A working directory with random slices."""
    folder, rng = tmp_path_factory.mktemp("robust"), np.random.default_rng(0)
    for kind in ("flair", "t2"):
        (folder / "data/train" / kind).mkdir(parents=True)
        for i in range(5):
            image = np.pad(rng.uniform(-2, 2, (14, 14)).astype("f4"), 1, constant_values=-3)
            np.save(folder / f"data/train/{kind}/S{i}_{kind}_80.npy", image)
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[Callable[[dict], dict]]:
    """Send an order to killable.py and return its answer."""
    script = Path(__file__).with_name("killable.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def order(request: dict) -> dict:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            watchdog = threading.Timer(300, process.kill)
            watchdog.start()
            try:
                answer = process.stdout.readline()
            finally:
                watchdog.cancel()
            assert answer, "killable.py has ended"
            return json.loads(answer)

        yield order
        process.stdin.close()


@pytest.fixture
def train(forks, workdir, tmp_path) -> Callable[..., tuple[dict, str]]:
    """Run the training script in a fork that signals itself at given moments; return its exit and its output."""

    def run(*args: str, signals: tuple = ()) -> tuple[dict, str]:
        output = tmp_path / "output.txt"
        order = {"script": TRAIN, "args": args, "cwd": str(workdir), "output": str(output)}
        end = forks(order | {"signals": signals})
        return end, output.read_text(encoding="utf-8")

    return run


def load_checkpoints(directory: Path) -> dict[str, dict]:
    """Load all checkpoints, by file name; fails if one is incomplete."""
    return {path.name: checkpoint.read_state(path, CPU) for path in sorted(directory.glob("*.pt"))}


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def expect_same_end(directory: Path, uninterrupted: Path) -> None:
    """Compare all checkpoints, including the optimizer's state, bit for bit, and the rows of progress.csv."""
    one, other = load_checkpoints(directory), load_checkpoints(uninterrupted)
    assert set(one) == set(other)
    for name in one:
        assert equal(one[name], other[name]), name
    assert not list(directory.glob("*.tmp"))
    rows = []
    for folder in (directory, uninterrupted):
        with (folder / "progress.csv").open(newline="") as file:
            rows.append([(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader(file)])
    assert rows[0] == rows[1]


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.iterdir()}


def expect_sentence(done, *phrases: str) -> None:
    """Check that the command exited with code 2 and that the last line of stderr is the error."""
    assert done.code == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{TRAIN}: error: ")
    for phrase in phrases:
        assert phrase in last


# ----------------------------------------------------------------------------------------------------------
# Killed and stopped


def test_a_run_killed_five_times_equals_one_never_killed(train, workdir):
    """SIGKILL at five random but seeded moments: in steps, in file writes and between lines of the checkpoint code.

    The batch is large enough for the loss-second-moment sampler to collect, within a few steps, the ten losses per
    timestep that it needs before it draws timesteps by their losses.
    """
    rounds = 8
    flags = (
        *FLAGS,
        "--model_name=diffusion",
        f"{TRAINING}.schedule_sampler=loss-second-moment",
        f"{TRAINING}.iterations={2 * rounds}",
        f"{TRAINING}.save_interval=2",
        f"{TRAINING}.keep_last=2",
        f"{TRAINING}.batch_size=128",
        "--config.data.image_size=8",
    )
    end, output = train(*flags, "--experiment_name=never_killed")
    assert end["code"] == 0, output

    rng, directory = random.Random(0), workdir / "experiments/killed"
    half_written = 0
    for moment in ("piece", "line", "step", "piece", "line"):
        per_round = end["moments"][moment] / rounds
        count = rng.randint(round(0.8 * per_round), round(1.8 * per_round))
        kill = [signal.SIGKILL, moment, count]
        killed, output = train(*flags, "--experiment_name=killed", signals=(kill,))
        assert killed["code"] == -signal.SIGKILL, output
        whole = load_checkpoints(directory)
        for step in checkpoint.list_checkpoints(directory):
            assert {path.name for path in checkpoint.paths_of(directory, 0.5, step).values()} <= set(whole)
        half_written += len(list(directory.glob("*.pt.tmp")))
    assert half_written >= 2  # both kills at a "piece"
    end, output = train(*flags, "--experiment_name=killed")
    assert end["code"] == 0, output
    assert "resuming from opt" in output
    assert "warning" not in (directory / "log.txt").read_text()
    expect_same_end(directory, workdir / "experiments/never_killed")
    (*_, resumed) = [state for name, state in whole.items() if name.startswith("opt")]
    assert (resumed["schedule"]["counts"] >= 10).all()  # it drew by earlier losses from its first step on


@pytest.fixture(scope="module")
def uninterrupted(workdir, in_process) -> Path:
    """Experiment of a UNet trained without interruption; tests must not modify it."""
    done = in_process(TRAIN, *UNET, "--experiment_name=uninterrupted", cwd=workdir)
    assert done.code == 0, done.stderr
    return workdir / "experiments/uninterrupted"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_stopped_by_a_signal_saves_first(train, workdir, uninterrupted, number, code):
    name = f"stopped_by_{number.name}"
    end, output = train(*UNET, f"--experiment_name={name}", signals=([number, "step", 3],))
    assert end["code"] == code, output
    assert f"stopped by {number.name}: run the same command again to resume" in output
    assert "Traceback" not in output
    directory = workdir / "experiments" / name
    assert list(checkpoint.list_checkpoints(directory)) == [2, 3]
    end, output = train(*UNET, f"--experiment_name={name}")
    assert end["code"] == 0, output
    assert "resuming from opt000003.pt" in output
    for path in checkpoint.paths_of(directory, 0.5, 3).values():
        path.unlink()  # the extra checkpoint
    expect_same_end(directory, uninterrupted)


def test_a_second_signal_stops_at_once(train, workdir, uninterrupted):
    """A second Ctrl-C interrupts the save; earlier checkpoints stay intact."""
    name, twice = "stopped_twice", ([signal.SIGINT, "step", 4], [signal.SIGINT, "piece", 30])
    end, output = train(*UNET, f"--experiment_name={name}", signals=twice)
    assert end["code"] == 130, output
    assert f"{TRAIN}: error: interrupted" in output
    assert "Traceback" not in output
    directory = workdir / "experiments" / name
    assert len(list(directory.glob("*.pt.tmp"))) == 1
    assert list(checkpoint.list_checkpoints(directory)) == [2]
    end, output = train(*UNET, f"--experiment_name={name}")
    assert end["code"] == 0, output
    expect_same_end(directory, uninterrupted)


# ----------------------------------------------------------------------------------------------------------
# Concurrent runs


def test_two_processes_cannot_share_an_experiment(train, forks, in_process, workdir, uninterrupted):
    """The second is refused, even with --overwrite; killing the first releases its lock."""
    flags, directory = (*UNET, "--experiment_name=shared"), workdir / "experiments/shared"
    first, output = train(*flags, signals=([signal.SIGSTOP, "step", 3],))
    assert first["code"] is None, output
    try:
        before = contents(directory)
        for more in ((), ("--overwrite",)):
            done = in_process(TRAIN, *flags, *more, cwd=workdir)
            expect_sentence(done, "another process is writing to experiments/shared", "--experiment_name")
            assert contents(directory) == before
    finally:
        assert forks({"kill": first["pid"]}) == {"code": -signal.SIGKILL}
    done = in_process(TRAIN, *flags, cwd=workdir)
    assert done.code == 0, done.stderr
    assert "resuming from opt000002.pt" in done.stdout
    expect_same_end(directory, uninterrupted)


def test_a_finished_run_says_so(in_process, workdir, uninterrupted):
    before = contents(uninterrupted)
    done = in_process(TRAIN, *UNET, "--experiment_name=uninterrupted", cwd=workdir)
    assert done.code == 0, done.stderr
    assert "already finished: 6 of 6 steps" in done.stdout
    assert "saved" not in done.stdout
    after = contents(uninterrupted)
    kept = {name for name in before if name.endswith((".pt", ".csv"))}
    assert {name: after[name][1] for name in kept} == {name: before[name][1] for name in kept}
    records = [json.loads(files["config.json"][1]) for files in (before, after)]
    for record in records:
        del record["run"]
    assert records[0] == records[1]


# ----------------------------------------------------------------------------------------------------------
# Changed settings and data


@pytest.fixture
def copy(uninterrupted, request) -> Path:
    """A copy of the finished experiment that a test may modify."""
    name = request.node.name.replace("/", "_")
    shutil.copytree(uninterrupted, uninterrupted.with_name(name))
    return uninterrupted.with_name(name)


def test_all_changed_settings_are_named(in_process, workdir, copy):
    others = {
        "config.score_model.training.lr": "0.02",
        "config.score_model.training.ema_rate": "0.9",
        "config.score_model.model.num_res_blocks": "3",
        "config.score_model.model.dropout": "0.1",
        "config.score_model.model.channel_mult": "(1, 2)",
        "config.data.image_size": "32",
        "config.seed": "7",
        "config.score_model.training.batch_size": "3",
    }
    before = contents(copy)
    overrides = [f"--{key}={value}" for key, value in others.items()]
    done = in_process(
        TRAIN, *UNET, *overrides, "--training_process=backward", f"--experiment_name={copy.name}", cwd=workdir
    )
    expect_sentence(done, *others, "training_process=forward, not backward", "--overwrite", "lr=0.01, not 0.02")
    assert "--experiment_name" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "iterations" not in done.stderr
    assert contents(copy) == before


def test_settings_that_do_not_affect_the_result_may_change(in_process, workdir, copy):
    changes = {
        "score_model.training.iterations": 8,
        "score_model.training.log_interval": 2,
        "score_model.training.save_interval": 3,
        "score_model.training.keep_last": 1,
        "score_model.sampling.timestep_respacing": "3",
        "score_model.sampling.eta": 0.5,
        "score_model.sampling.use_ddim": False,
        "score_model.sampling.batch_size": 5,
    }
    overrides = (f"--config.{key}={value}" for key, value in changes.items())
    done = in_process(TRAIN, *UNET, *overrides, f"--experiment_name={copy.name}", cwd=workdir)
    assert done.code == 0, done.stderr
    assert "resuming from opt000006.pt" in done.stdout
    assert list(checkpoint.list_checkpoints(copy)) == [8]
    record = json.loads((copy / "config.json").read_text())["config"]
    for key, value in changes.items():
        _, section, name = key.split(".")
        assert record["score_model"][section][name] == value


def test_the_data_may_move_but_not_change(in_process, workdir, copy, tmp_path):
    longer = (*UNET, f"{TRAINING}.iterations=7", f"--experiment_name={copy.name}")
    shutil.copytree(workdir / "data", tmp_path / "more")
    for kind in ("flair", "t2"):
        np.save(tmp_path / f"more/train/{kind}/S9_{kind}_80.npy", np.eye(16, dtype=np.float32) - 3)
    before = contents(copy)
    done = in_process(TRAIN, *longer, f"--data_dir={tmp_path / 'more'}", cwd=workdir)
    expect_sentence(done, "data.slices=5, not 6", "data.sha256=", "--overwrite")
    assert contents(copy) == before
    shutil.copytree(workdir / "data", tmp_path / "changed")
    path = tmp_path / "changed/train/t2/S1_t2_80.npy"
    np.save(path, np.load(path)[::-1])
    done = in_process(TRAIN, *longer, f"--data_dir={tmp_path / 'changed'}", cwd=workdir)
    expect_sentence(done, "was started with data.contents.t2=", "--overwrite")
    assert contents(copy) == before
    shutil.copytree(workdir / "data", tmp_path / "moved")
    done = in_process(TRAIN, *longer, f"--data_dir={tmp_path / 'moved'}", cwd=workdir)
    assert done.code == 0, done.stderr
    assert "resuming from opt000006.pt" in done.stdout


def test_overwriting_starts_over_and_keeps_other_files(in_process, workdir, copy):
    """Files with names similar to a checkpoint's belong to the user and stay."""
    own = ("notes.txt", "model_best.pt", "ema_good.pt", "optimum.pt", "config.json.bak")
    for name in own:
        (copy / name).write_text("the user's")
    (copy / "opt000900.pt.tmp").write_text("half")
    (copy / "figures").mkdir()
    flags = (*UNET, f"{TRAINING}.lr=0.02", f"{TRAINING}.iterations=2", f"--experiment_name={copy.name}")
    done = in_process(TRAIN, *flags, "--overwrite", cwd=workdir)
    assert done.code == 0, done.stderr
    assert "going on" not in (copy / "log.txt").read_text()
    assert list(checkpoint.list_checkpoints(copy)) == [2]
    assert not (copy / "model000006.pt").exists()
    assert not (copy / "ema_0.5_000006.pt").exists()
    assert not (copy / "opt000900.pt.tmp").exists()
    assert [row.split(",")[0] for row in (copy / "progress.csv").read_text().splitlines()] == ["step", "1", "2"]
    assert json.loads((copy / "config.json").read_text())["config"]["score_model"]["training"]["lr"] == 0.02
    assert {name: (copy / name).read_text() for name in own} == dict.fromkeys(own, "the user's")
    assert (copy / "figures").is_dir()


def test_overwriting_is_refused_before_anything_is_removed(in_process, workdir, copy):
    before = contents(copy)
    flags = (*UNET, f"--experiment_name={copy.name}", "--overwrite")
    done = in_process(TRAIN, *flags, "--data_dir=nowhere", cwd=workdir)
    expect_sentence(done, "nowhere")
    assert contents(copy) == before


# ----------------------------------------------------------------------------------------------------------
# Failures


def test_a_loss_that_is_not_finite(in_process, workdir):
    """Training stops with advice; the checkpoints saved before are complete and their weights finite."""
    name = "diverging"
    flags = (*UNET, f"--experiment_name={name}", f"{TRAINING}.save_interval=1", f"{TRAINING}.lr=1e30")
    done = in_process(TRAIN, *flags, cwd=workdir)
    expect_sentence(done)
    assert re.search(r" after \d steps: .*training\.lr, .*float16", done.stderr.splitlines()[-1])
    assert "the weights are not finite" in done.stderr or re.search("the loss is (nan|inf)", done.stderr)
    directory = workdir / "experiments" / name
    checkpoints = load_checkpoints(directory)
    assert {"model000001.pt", "ema_0.5_000001.pt", "opt000001.pt"} <= set(checkpoints)
    for file, state in checkpoints.items():
        if not file.startswith("opt"):
            assert all(value.isfinite().all() for value in state.values()), file


def test_a_log_path_that_is_a_folder(in_process, workdir):
    (workdir / "experiments/folder/log.txt").mkdir(parents=True)
    done = in_process(TRAIN, *UNET, "--experiment_name=folder", cwd=workdir)
    expect_sentence(done, "experiments/folder cannot be written to (Is a directory): check --logdir")


def test_no_readable_checkpoint(in_process, workdir, copy):
    for path in copy.glob("model*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in copy.glob("*.pt")}
    done = in_process(TRAIN, *UNET, f"--experiment_name={copy.name}", cwd=workdir)
    expect_sentence(done, f"no checkpoint in experiments/{copy.name} can be read", "--overwrite")
    assert "make room" not in done.stderr
    assert {path.name: path.read_bytes() for path in copy.glob("*.pt")} == before
    log = (copy / "log.txt").read_text()
    assert all(f"warning: checkpoint {step} cannot be used" in log for step in (2, 4, 6))


def test_a_disk_that_is_too_small(in_process, workdir, monkeypatch):
    """Refused before the first step."""
    disk_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk_usage(path)._replace(free=1000))
    done = in_process(TRAIN, *UNET, "--experiment_name=no_room", cwd=workdir)
    expect_sentence(done, "3 checkpoints of", "experiments/no_room", "make room", "keep_last")
    assert not list((workdir / "experiments/no_room").glob("*.pt*"))


def test_a_disk_that_fills_up_during_logging(in_process, workdir, uninterrupted, monkeypatch):
    """One error line, although closing the event file fails too; the run resumes once there is space."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    flags, original_scalars = (*UNET, "--experiment_name=full"), Logger.scalars
    with monkeypatch.context() as full:
        full.setattr(Logger, "scalars", lambda *args: (refuse if args[1] == 4 else original_scalars)(*args))
        full.setattr(SummaryWriter, "close", refuse)
        done = in_process(TRAIN, *flags, cwd=workdir)
    expect_sentence(done, "experiments/full cannot be written to (No space left on device)", "make room")
    assert list(checkpoint.list_checkpoints(workdir / "experiments/full")) == [2]
    done = in_process(TRAIN, *flags, cwd=workdir)
    assert done.code == 0, done.stderr
    expect_same_end(workdir / "experiments/full", uninterrupted)


def test_training_whose_output_is_closed_ends_quietly(in_process, workdir, monkeypatch):
    """As by `| head -1`: no file is at fault, and no room to be made."""

    def refuse(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with monkeypatch.context() as closed:
        closed.setattr(Logger, "scalars", refuse)
        done = in_process(TRAIN, *UNET, "--experiment_name=piped", cwd=workdir)
    assert done.code == 141
    assert "error" not in done.stderr


# ----------------------------------------------------------------------------------------------------------
# Records


def test_the_record_describes_the_run(repository, workdir, uninterrupted):
    record = json.loads((uninterrupted / "config.json").read_text(encoding="utf-8"))
    assert record["config"]["seed"] == 0
    assert record["config"]["data"]["data_dir"] == "data"
    assert record["config"]["score_model"]["training"]["iterations"] == 6
    assert record["config"]["score_model"]["training"]["weight_decay"] == 0.0  # a default, not set by a flag
    run = record["run"]
    assert run["command"].startswith(f"{TRAIN} --gpu_id=cpu --dataset=phantom ")
    assert "'--config.score_model.model.channel_mult=(1, 1)'" in run["command"]  # quoted for a shell
    assert run["device"] == "cpu, 1 threads"
    expected = {name: version(name) for name in ("torch", "monai", "numpy")}
    assert run["versions"] == {"python": sys.version.split()[0], **expected}
    assert run["started"]
    git = [
        subprocess.run(["git", *command], cwd=repository, capture_output=True, text=True, check=False)
        for command in (("rev-parse", "HEAD"), ("diff", "HEAD", "--quiet"))
    ]
    if git[0].returncode == 0:
        assert run["git_commit"] == git[0].stdout.strip()
        assert run["git_dirty"] is bool(git[1].returncode)
    else:
        assert run["git_commit"] is run["git_dirty"] is None
    assert record["data"] == fingerprint(workdir / "data", "flair", "t2")
    assert record["data"]["slices"] == 5


def fingerprint(data_dir: Path, *kinds: str) -> dict:
    return BraTS2021Dataset(data_dir, "train", kinds, 16, progress=False).fingerprint


def test_the_fingerprint_depends_on_the_slices_and_not_on_their_folder(workdir, tmp_path):
    first = fingerprint(workdir / "data", "flair", "t2")
    shutil.copytree(workdir / "data", tmp_path / "moved")
    assert fingerprint(tmp_path / "moved", "t2", "flair") == first
    for kind in ("flair", "t2"):
        shutil.copy(
            tmp_path / f"moved/train/{kind}/S0_{kind}_80.npy", tmp_path / f"moved/train/{kind}/S0_{kind}_81.npy"
        )
    more = fingerprint(tmp_path / "moved", "flair", "t2")
    assert (first["slices"], more["slices"]) == (5, 6)
    assert more["sha256"] != first["sha256"]
    for kind in ("flair", "t2"):  # the same number of slices, but other ones
        (tmp_path / f"moved/train/{kind}/S0_{kind}_80.npy").unlink()
    other = fingerprint(tmp_path / "moved", "flair", "t2")
    assert other["slices"] == 5
    assert other["sha256"] not in (first["sha256"], more["sha256"])
    path = tmp_path / "moved/train/t2/S1_t2_80.npy"
    np.save(path, np.load(path)[::-1])  # the same name and size
    changed = fingerprint(tmp_path / "moved", "flair", "t2")
    assert changed["sha256"] == other["sha256"]
    assert [kind for kind, digest in changed["contents"].items() if digest != other["contents"][kind]] == ["t2"]

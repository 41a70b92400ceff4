"""Checkpoints: atomic sets, damaged files, retention, exact resumption, signals, and full disks."""

import io
import itertools
import os
import pickle
import resource
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_regression import Stop, batch_of, flat, rows_of, squared_error, stopping_at, with_dropout
from torch import nn

from guided_diffusion import checkpoint
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.train_util import Stopped
from utils.files import write_atomically

CPU = torch.device("cpu")
KINDS = ("model", "ema", "opt")
RATE = 0.9  # `ema_rate` in conftest.SETTINGS


class Killed(BaseException):
    """Simulates SIGKILL: no code catches it."""


def paths(directory: Path, step: int) -> dict[str, Path]:
    return checkpoint.paths_of(directory, RATE, step)


def read_set(directory: Path, step: int) -> dict[str, Any]:
    return {kind: checkpoint.read_state(path, CPU) for kind, path in paths(directory, step).items()}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.pt*")}


def files_of(*steps: int) -> set[str]:
    return {f"{kind}{step:06d}.pt" for kind in ("model", f"ema_{RATE}_", "opt") for step in steps}


def assert_same_state(one, other) -> None:
    """Assert that the final weights, averages, optimizer and scaler of two loops are bit-identical."""
    assert one.step == other.step
    assert torch.equal(flat(one.model), flat(other.model))
    assert torch.equal(flat(one.ema_model), flat(other.ema_model))
    a, b = (loop.train_step.optimizer.state_dict() for loop in (one, other))
    assert a["param_groups"] == b["param_groups"]
    for key, state in a["state"].items():
        assert all(torch.equal(value, b["state"][key][name]) for name, value in state.items())
    assert one.train_step.scaler.state_dict() == other.train_step.scaler.state_dict()


@pytest.fixture
def full_run(train):
    """Train for 6 steps without interruption."""
    return train(with_dropout(0), "whole")


@pytest.fixture
def aborted(train, tmp_path):
    """Return the folder of a run aborted in step 5, with complete sets of steps 2 and 4."""
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", batches_from=stopping_at(5))
    assert files(tmp_path / "parts") == files_of(2, 4)
    return tmp_path / "parts"


# ----------------------------------------------------------------------------------------------------------
# Atomic sets


class HalfWriter:
    """A file that writes the first half of its data, then calls `end`."""

    def __init__(self, file, end):
        self.file, self.end = file, end

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.end()


@pytest.fixture
def kill_during(monkeypatch):
    """Return `arrange(name, moment)`, which raises Killed at this moment of writing the file `name`."""

    def end():
        raise Killed

    def arrange(name: str, moment: str) -> None:
        real_open, real_sync, real_replace = Path.open, os.fsync, Path.replace

        def half_open(path, mode="r", *args, **kwargs):
            file = real_open(path, mode, *args, **kwargs)
            return HalfWriter(file, end) if "w" in mode and path.name.startswith(name) else file

        def sync(descriptor):
            if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(name):
                end()
            real_sync(descriptor)

        def replace(path, target):
            if path.name.startswith(name) and moment == "before its rename":
                end()
            real_replace(path, target)
            if path.name.startswith(name):
                end()

        if moment == "half written":
            monkeypatch.setattr(Path, "open", half_open)
        elif moment == "before its sync":
            monkeypatch.setattr(os, "fsync", sync)
        else:
            monkeypatch.setattr(Path, "replace", replace)

    return arrange


MOMENTS = ("half written", "before its sync", "before its rename", "after its rename")


@pytest.mark.parametrize(("kind", "moment"), list(itertools.product(KINDS, MOMENTS)))
def test_kill_while_writing_a_set(train, full_run, tmp_path, kill_during, monkeypatch, kind, moment):
    """All *.pt files are complete, the older set loads, and the resumed run equals an uninterrupted one."""
    directory = tmp_path / "parts"
    kill_during(paths(directory, 4)[kind].name, moment)
    with pytest.raises(Killed):
        train(with_dropout(0), "parts")
    monkeypatch.undo()

    complete = [2, 4] if (kind, moment) == ("opt", "after its rename") else [2]
    assert list(checkpoint.list_checkpoints(directory)) == complete
    for path in directory.glob("*.pt"):
        checkpoint.read_state(path, CPU)
    leftovers = list(directory.glob("*.tmp"))
    assert len(leftovers) == (moment != "after its rename")

    resumed = train(with_dropout(1), "parts")
    assert_same_state(resumed, full_run)
    assert files(directory) == files_of(2, 4, 6)  # no temporary files
    log = (directory / "log.txt").read_text()
    assert f"resuming from opt{complete[-1]:06d}.pt" in log
    assert "warning" not in log


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    """A power cut cannot be tested, but the order of syncs and rename can."""
    done = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(("sync", path.name, None if path.is_dir() else os.fstat(descriptor).st_size))
        real_sync(descriptor)

    def replace(path, target):
        done.append(("rename", path.name, target.name))
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "a.pt", b"12345")
    assert done == [("sync", "a.pt.tmp", 5), ("rename", "a.pt.tmp", "a.pt"), ("sync", tmp_path.name, None)]
    assert (tmp_path / "a.pt").read_bytes() == b"12345"


def test_temporary_files_are_removed_at_the_next_start(train, linear, tmp_path):
    for name in ("model000002.pt.tmp", "opt000900.pt.tmp"):
        (tmp_path / name).write_bytes(b"half")
    train(linear, iterations=2)
    assert files(tmp_path) == files_of(2)


# ----------------------------------------------------------------------------------------------------------
# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_the_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte_of_a_tensor(path: Path) -> None:
    """Flip one bit of the largest tensor, which torch.load does not detect."""

    def tensors(state):
        for value in state.values():
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, dict):
                yield from tensors(value)

    data = bytearray(path.read_bytes())
    largest = max(tensors(torch.load(path, weights_only=True)), key=torch.numel).numpy().tobytes()
    assert data.count(largest) == 1
    data[data.find(largest) + len(largest) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not a checkpoint\n" * 100)


def another_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "not a checkpoint")


def a_list(path: Path) -> None:
    torch.save([1, 2, 3], path)


def a_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def nothing(path: Path) -> None:
    torch.save(None, path)


def another_state(path: Path) -> None:
    torch.save(nn.Conv2d(1, 1, 3).state_dict(), path)


DAMAGE = {
    harm.__name__: harm
    for harm in (
        truncate,
        cut_the_last_byte,
        flip_a_byte_of_a_tensor,
        empty,
        text,
        another_zip,
        a_list,
        a_tensor,
        nothing,
        another_state,
        Path.unlink,
    )
}


@pytest.mark.parametrize(
    ("harm", "kind"),
    [pair for pair in itertools.product(DAMAGE, KINDS) if pair != ("unlink", "opt")],  # without opt there is no set
)
def test_damaged_sets_are_skipped_with_a_warning(train, full_run, aborted, harm, kind):
    DAMAGE[harm](paths(aborted, 4)[kind])
    resumed = train(with_dropout(1), "parts")
    assert_same_state(resumed, full_run)
    (warning,) = [line for line in (aborted / "log.txt").read_text().splitlines() if "warning" in line]
    assert "checkpoint 4 cannot be used, trying the previous one: " in warning
    assert not warning.endswith(": ")  # a reason follows
    assert "resuming from opt000002.pt" in (aborted / "log.txt").read_text()
    assert files(aborted) == files_of(2, 4, 6)
    for name in files_of(4, 6):  # damaged files are rewritten
        if not name.startswith("opt"):
            assert (aborted / name).read_bytes() == (aborted.parent / "whole" / name).read_bytes()


def test_every_flipped_byte_and_truncation_is_refused_or_harmless(tmp_path):
    path, state = tmp_path / "model000001.pt", {"weight": torch.arange(40.0), "step": 3}
    checkpoint.save({"model": path}, {"model": state})
    intact = path.read_bytes()
    damaged = [intact[:length] for length in range(0, len(intact), 7)]
    for place in range(len(intact)):
        for flip in (0x01, 0x10, 0xFF):
            damaged.append(intact[:place] + bytes([intact[place] ^ flip]) + intact[place + 1 :])
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            found = checkpoint.read_state(path, CPU)
        except checkpoint.UnreadableError:
            refused += 1
        else:
            assert found.keys() == state.keys()
            assert torch.equal(found["weight"], state["weight"])
            assert found["step"] == state["step"]
    assert refused > len(damaged) / 2


@pytest.mark.parametrize("harm", ["truncate", "another_state"])
def test_training_does_not_start_over_if_no_set_is_readable(train, aborted, harm):
    for step in (2, 4):
        DAMAGE[harm](paths(aborted, step)["model"])
    before = {path: path.read_bytes() for path in aborted.glob("*.pt")}
    with pytest.raises(checkpoint.UnreadableError, match=f"no checkpoint in {aborted} can be read"):
        train(with_dropout(1), "parts")
    assert {path: path.read_bytes() for path in aborted.glob("*.pt")} == before


class Payload:
    """Creates the file `made` when unpickled."""

    def __init__(self, made: Path):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


def pickled(payload: Payload, state: dict) -> bytes:
    return pickle.dumps({**state, "extra": payload})


def saved_by_torch(payload: Payload, state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save({**state, "extra": payload}, buffer)
    return buffer.getvalue()


def saved_by_old_torch(payload: Payload, state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save({**state, "extra": payload}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("craft", [pickled, saved_by_torch, saved_by_old_torch])
def test_code_in_a_checkpoint_is_not_run(train, full_run, aborted, tmp_path, craft, kind):
    """A file with code counts as damaged; an unsafe load would run the payload."""
    made, path = tmp_path / "made", paths(aborted, 4)[kind]
    path.write_bytes(craft(Payload(made), torch.load(path, weights_only=True)))
    resumed = train(with_dropout(1), "parts")
    assert not made.exists()
    assert "warning: checkpoint 4 cannot be used" in (aborted / "log.txt").read_text()
    assert_same_state(resumed, full_run)

    data = craft(Payload(made), {})
    pickle.loads(data) if craft is pickled else torch.load(io.BytesIO(data), weights_only=False)
    assert made.exists()


# ----------------------------------------------------------------------------------------------------------
# Retention


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_newest_sets_are_kept(train, linear, tmp_path, keep_last):
    seen = []
    train(linear, save_interval=1, keep_last=keep_last, on_save=lambda *_: seen.append(files(tmp_path)))
    for step, present in enumerate(seen, start=1):
        assert present == files_of(*range(max(step - keep_last, 0) + 1, step + 1))


def test_the_oldest_set_is_removed_first_beginning_with_opt(train, linear, tmp_path, monkeypatch):
    train(linear, iterations=6)
    unlinked, real_unlink = [], Path.unlink

    def unlink(path, *args, **kwargs):
        if path.exists():
            unlinked.append((path.name, max(checkpoint.list_checkpoints(tmp_path))))
        real_unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    train(linear, iterations=7, keep_last=2)
    assert [newest for _, newest in unlinked] == [7] * 6  # nothing is removed before the new set is complete
    names = [name for name, _ in unlinked]
    assert set(names[:3]) == files_of(2)
    assert set(names[3:]) == files_of(4)
    assert (names[0], names[3]) == ("opt000002.pt", "opt000004.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_partly_removed_set_is_removed_by_the_next_run(train, full_run, tmp_path, monkeypatch, kind):
    """The first run is killed while it removes the set of step 2."""
    real_unlink, directory = Path.unlink, tmp_path / "parts"

    def unlink(path, *args, **kwargs):
        if path == paths(directory, 2)[kind]:
            raise Killed
        real_unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(Killed):
        train(with_dropout(0), "parts", keep_last=1)
    monkeypatch.undo()
    (directory / "model_best.pt").write_bytes(b"the user's")
    (directory / "optimal.pt").write_bytes(b"the user's")
    assert_same_state(train(with_dropout(1), "parts", keep_last=1), full_run)
    assert files(directory) == {*files_of(6), "model_best.pt", "optimal.pt"}


def test_a_damaged_newer_set_does_not_displace_intact_ones(train, full_run, aborted):
    """A run that stops before reaching the damaged set's step keeps the set it has just saved."""
    truncate(paths(aborted, 4)["model"])
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", save_interval=3, keep_last=1, batches_from=stopping_at(3))
    read_set(aborted, 3)
    assert_same_state(train(with_dropout(1), "parts", keep_last=1), full_run)
    assert files(aborted) == files_of(6)


# ----------------------------------------------------------------------------------------------------------
# Resumed state other than weights


def test_schedule_sampler_history_is_resumed(train, make_diffusion):
    """Draws depend on past losses, so the network's weights would differ without the history."""

    def run(folder, **kwargs):
        diffusion = make_diffusion(use_timesteps=[0, 300, 600, 900])
        sampler = LossSecondMomentResampler(diffusion, history_per_term=2)
        drawn = []

        def losses(model, batch, step):
            t, weights = sampler.sample(8, torch.Generator().manual_seed(step))
            drawn.append(len(set(sampler.weights())) > 1)
            losses = squared_error(model, batch, step) * (1 + t) ** 2
            sampler.update(t, losses.detach())
            return weights * losses

        loop = train(with_dropout(0), folder, iterations=12, compute_losses=losses, schedule_sampler=sampler, **kwargs)
        return loop, sampler.state_dict(), drawn

    one, expected, _ = run("whole")
    with pytest.raises(Stop):
        run("parts", batches_from=stopping_at(9))
    other, state, drawn = run("parts")
    assert len(drawn) == 4
    assert all(drawn)  # non-uniform from the first resumed step on
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert_same_state(other, one)


def test_float16_scaler_is_resumed(train, tmp_path):
    """Overflowing gradients halve the initial scale of 2¹⁶; the resumed run keeps the lower scale."""

    def losses(model, batch, step):
        x, y = batch
        return (model(x).float() - y).square().flatten(1).mean(1)

    options = {"compute_losses": losses, "precision": torch.float16}
    one = train(with_dropout(0), "whole", **options)
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", batches_from=stopping_at(4), **options)
    saved = torch.load(paths(tmp_path / "parts", 4)["opt"], weights_only=True)
    assert saved["scaler"]["scale"] < 2.0**16
    other = train(with_dropout(1), "parts", **options)
    assert_same_state(other, one)


@pytest.mark.parametrize("torn", [b"", b"6", b"6,0.12", b"\0" * 40, b"\0" * 40 + b"\n", b"\xff\xfe\n"])
def test_progress_rows_are_not_repeated(train, tmp_path, torn):
    """Rows after the checkpoint appear once, in TensorBoard too, and a torn last row is dropped."""
    train(with_dropout(0), "whole", log_interval=1)
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", log_interval=1, batches_from=stopping_at(5))
    progress = tmp_path / "parts" / "progress.csv"
    assert [row["step"] for row in rows_of(progress.parent)] == ["1", "2", "3", "4", "5"]
    progress.write_bytes(progress.read_bytes() + torn)
    train(with_dropout(1), "parts", log_interval=1)
    logged = [
        [(row["step"], row["loss"], row["learning_rate"]) for row in rows_of(tmp_path / folder)]
        for folder in ("whole", "parts")
    ]
    assert logged[0] == logged[1]
    assert [step for step, *_ in logged[0]] == ["1", "2", "3", "4", "5", "6"]
    events = EventAccumulator(str(progress.parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("left", [b"", b"step,lo", b"step,loss,learning_rate,images_per_second\n"])
def test_a_progress_table_without_rows_is_rewritten(train, tmp_path, left):
    (tmp_path / "progress.csv").write_bytes(left)
    train(with_dropout(0), log_interval=1, iterations=2)
    assert [row["step"] for row in rows_of(tmp_path)] == ["1", "2"]


# ----------------------------------------------------------------------------------------------------------
# Signals and losses


def signalling(step_and_signal):
    """Return a loss function that sends this process the given signals in the given steps."""

    def losses(model, batch, step):
        for number in step_and_signal.get(step, ()):
            os.kill(os.getpid(), number)
        return squared_error(model, batch, step)

    return losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_current_step(train, full_run, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        train(with_dropout(0), "parts", compute_losses=signalling({2: [number]}))
    assert stopped.value.received == number
    assert signal.getsignal(number) == before
    assert list(checkpoint.list_checkpoints(tmp_path / "parts")) == [2, 3]
    assert_same_state(train(with_dropout(1), "parts"), full_run)


def test_a_second_signal_stops_immediately(train, full_run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(with_dropout(0), "parts", compute_losses=signalling({2: [signal.SIGINT] * 2}))
    assert list(checkpoint.list_checkpoints(tmp_path / "parts")) == [2]
    assert_same_state(train(with_dropout(1), "parts"), full_run)


def test_nonfinite_weights_are_not_saved(train, linear, tmp_path):
    """A step with a finite loss can still make the weights non-finite."""

    def losses(model, batch, step):
        root_at_0 = (0 * model(batch[0])).sqrt().flatten() if step == 3 else 0.0  # gradient 0 · ∞
        return squared_error(model, batch, step) + root_at_0

    with pytest.raises(FloatingPointError, match="after 4 steps"):
        train(linear, compute_losses=losses)
    assert files(tmp_path) == files_of(2)


# ----------------------------------------------------------------------------------------------------------
# Disks


class Large(nn.Module):
    """1 MiB of weights, of which the loss uses one: larger than any other file written during the test."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 18))

    def forward(self, x):
        return x[:, :1] * self.weight[:1]


@pytest.fixture
def size_limit():
    """Return a function that limits the size of files written by this process; the limit is restored afterwards."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("limit", "kind"), [(1 << 19, "model"), (3 << 19, "opt")])
def test_file_size_limit(train, tmp_path, size_limit, limit, kind):
    """The error names the file and the reason, the partial set is removed, and the older set loads."""

    def batches(step):
        for i in itertools.count(step):
            if i == 2:
                size_limit(limit)
            yield batch_of(i)

    failed = paths(tmp_path, 4)[kind]
    with pytest.raises(checkpoint.CheckpointError) as error:
        train(Large(), batches_from=batches)
    assert str(error.value) == f"{failed} cannot be written (File too large)"
    assert files(tmp_path) == files_of(2)
    read_set(tmp_path, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk(train, full_run, tmp_path, kind):
    """Writes go to /dev/full."""
    directory = tmp_path / "parts"
    full = paths(directory, 4)[kind]

    def batches(step):
        for i in itertools.count(step):
            if i == 3:
                full.with_name(f"{full.name}.tmp").symlink_to("/dev/full")
            yield batch_of(i)

    with pytest.raises(checkpoint.CheckpointError) as error:
        train(with_dropout(0), "parts", batches_from=batches)
    assert str(error.value) == f"{full} cannot be written (No space left on device)"
    assert files(directory) == files_of(2)
    assert_same_state(train(with_dropout(1), "parts"), full_run)  # once there is space again


def test_a_read_only_disk(tmp_path, monkeypatch):
    """Writing and cleanup both fail; the error is that of writing."""

    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(checkpoint.CheckpointError, match=r"model000004.pt cannot be written \(Read-only file"):
        checkpoint.save(paths(tmp_path, 4), {kind: {} for kind in KINDS})


SET = 4 * 4 * 4  # bytes of a set of `linear`: 4 parameters, their average, and two moments


@pytest.mark.parametrize(("keep_last", "needed"), [(0, 3), (1, 2), (2, 3), (5, 3)])
def test_disk_space_is_checked_before_the_first_step(train, linear, tmp_path, monkeypatch, keep_last, needed):
    """Three sets will be written; while one is, `keep_last` others exist."""

    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))

    def forbidden(*_):
        raise AssertionError("a step was made")

    free(needed * SET - 1)
    with pytest.raises(checkpoint.CheckpointError, match=f"{needed} checkpoints of .* MB will not fit on the"):
        train(linear, compute_losses=forbidden, keep_last=keep_last)
    assert files(tmp_path) == set()
    free(needed * SET)
    train(linear, keep_last=keep_last)


@pytest.mark.parametrize(("keep_last", "needed"), [(0, 2), (1, 1), (2, 2), (5, 2)])
def test_disk_space_check_allows_for_existing_sets(train, linear, tmp_path, monkeypatch, keep_last, needed):
    """The resumed run has two sets left to write."""
    with pytest.raises(Stop):
        train(linear, keep_last=keep_last, batches_from=stopping_at(2))
    for free in (needed * SET - 1, needed * SET):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free < needed * SET:
            with pytest.raises(checkpoint.CheckpointError, match="will not fit"):
                train(linear, keep_last=keep_last)
        else:
            train(linear, keep_last=keep_last)


def test_size_of_a_set_agrees_with_the_estimate(train, tmp_path):
    """Within 5 %, for weights much larger than the files' headers."""
    train(Large(), iterations=2)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    assert written == pytest.approx(4 * 4 * (1 << 18), rel=0.05)
    assert np.isfinite(written)

"""Checkpoints: a set is whole or absent, damage is noticed and got round, going on is as if nothing had happened."""

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
RATE = 0.9  # what `train` averages with


class Killed(BaseException):
    """Stands for a SIGKILL: nothing in the code expects it."""


def paths(directory: Path, step: int) -> dict[str, Path]:
    return checkpoint.paths_of(directory, RATE, step)


def read_set(directory: Path, step: int) -> dict[str, Any]:
    return {kind: checkpoint.read_state(path, CPU) for kind, path in paths(directory, step).items()}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.pt*")}


def files_of(*steps: int) -> set[str]:
    return {f"{kind}{step:06d}.pt" for kind in ("model", f"ema_{RATE}_", "opt") for step in steps}


def expect_same(one, other) -> None:
    """Two loops ended alike, bit for bit: weights, averages, and all that further steps depend on."""
    assert one.step == other.step
    assert torch.equal(flat(one.model), flat(other.model))
    assert torch.equal(flat(one.ema_model), flat(other.ema_model))
    a, b = (loop.optimizer.state_dict() for loop in (one, other))
    assert a["param_groups"] == b["param_groups"]
    for key, state in a["state"].items():
        assert all(torch.equal(value, b["state"][key][name]) for name, value in state.items())
    assert one.scaler.state_dict() == other.scaler.state_dict()


@pytest.fixture
def whole(train):
    """A run of 6 steps that nothing interrupts."""
    return train(with_dropout(0), "whole")


@pytest.fixture
def parts(train, tmp_path):
    """A folder with the complete sets of steps 2 and 4, of a run that was cut off in step 5."""
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", batches_from=stopping_at(5))
    assert files(tmp_path / "parts") == files_of(2, 4)
    return tmp_path / "parts"


# ----------------------------------------------------------------------------------------------------------
# A set is whole or absent


class HalfWriter:
    """A file that takes the first half of what is written to it, and then meets `end`."""

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
def dying(monkeypatch):
    """Arrange for a kill in the making of the file `name`: half written, before it is synced, before or after it is
    renamed."""

    def end():
        raise Killed

    def arrange(name: str, moment: str) -> None:
        really_open, really_sync, really_replace = Path.open, os.fsync, Path.replace

        def half_open(path, mode="r", *args, **kwargs):
            file = really_open(path, mode, *args, **kwargs)
            return HalfWriter(file, end) if "w" in mode and path.name.startswith(name) else file

        def sync(descriptor):
            if Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(name):
                end()
            really_sync(descriptor)

        def replace(path, target):
            if path.name.startswith(name) and moment == "before its rename":
                end()
            really_replace(path, target)
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
def test_killed_while_writing_a_set(train, whole, tmp_path, dying, monkeypatch, kind, moment):
    """Whatever lies under its own name is whole, the older set loads, and the run ends as if never killed."""
    directory = tmp_path / "parts"
    dying(paths(directory, 4)[kind].name, moment)
    with pytest.raises(Killed):
        train(with_dropout(0), "parts")
    monkeypatch.undo()

    complete = [2, 4] if (kind, moment) == ("opt", "after its rename") else [2]
    assert list(checkpoint.list_checkpoints(directory)) == complete
    for path in directory.glob("*.pt"):
        checkpoint.read_state(path, CPU)
    leftovers = list(directory.glob("*.tmp"))
    assert len(leftovers) == (moment != "after its rename")

    going_on = train(with_dropout(1), "parts")
    expect_same(going_on, whole)
    assert files(directory) == files_of(2, 4, 6)  # no leftover
    log = (directory / "log.txt").read_text()
    assert f"resuming from opt{complete[-1]:06d}.pt" in log
    assert "warning" not in log


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power cut leaves cannot be tried here; that data, then name, then folder are synced can."""
    done = []
    really_sync, really_replace = os.fsync, Path.replace

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        done.append(("sync", path.name, None if path.is_dir() else os.fstat(descriptor).st_size))
        really_sync(descriptor)

    def replace(path, target):
        done.append(("rename", path.name, target.name))
        return really_replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "a.pt", b"12345")
    assert done == [("sync", "a.pt.tmp", 5), ("rename", "a.pt.tmp", "a.pt"), ("sync", tmp_path.name, None)]
    assert (tmp_path / "a.pt").read_bytes() == b"12345"


def test_leftovers_are_removed_at_the_next_start(train, linear, tmp_path):
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
    """One bit of the largest tensor: torch itself does not notice."""

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
    [pair for pair in itertools.product(DAMAGE, KINDS) if pair != ("unlink", "opt")],  # that is no set at all
)
def test_a_damaged_set_is_passed_over_with_a_warning(train, whole, parts, harm, kind):
    DAMAGE[harm](paths(parts, 4)[kind])
    going_on = train(with_dropout(1), "parts")
    expect_same(going_on, whole)
    (warning,) = [line for line in (parts / "log.txt").read_text().splitlines() if "warning" in line]
    assert "checkpoint 4 cannot be used, trying the previous one: " in warning
    assert not warning.endswith(": ")  # there is a reason
    assert "resuming from opt000002.pt" in (parts / "log.txt").read_text()
    assert files(parts) == files_of(2, 4, 6)
    for name in files_of(4, 6):  # what was damaged is written again
        if not name.startswith("opt"):
            assert (parts / name).read_bytes() == (parts.parent / "whole" / name).read_bytes()


def test_no_flipped_byte_and_no_cut_goes_unnoticed(tmp_path):
    """Wherever in a file: it is refused, or what is read is what was written."""
    path, state = tmp_path / "model000001.pt", {"weight": torch.arange(40.0), "step": 3}
    checkpoint.save({"model": path}, {"model": state})
    sound = path.read_bytes()
    harmed = [sound[:length] for length in range(0, len(sound), 7)]
    for place in range(len(sound)):
        for flip in (0x01, 0x10, 0xFF):
            harmed.append(sound[:place] + bytes([sound[place] ^ flip]) + sound[place + 1 :])
    refused = 0
    for data in harmed:
        path.write_bytes(data)
        try:
            found = checkpoint.read_state(path, CPU)
        except checkpoint.UnreadableError:
            refused += 1
        else:
            assert found.keys() == state.keys()
            assert torch.equal(found["weight"], state["weight"])
            assert found["step"] == state["step"]
    assert refused > len(harmed) / 2


@pytest.mark.parametrize("harm", ["truncate", "another_state"])
def test_without_a_sound_set_training_does_not_begin_anew(train, parts, harm):
    for step in (2, 4):
        DAMAGE[harm](paths(parts, step)["model"])
    before = {path: path.read_bytes() for path in parts.glob("*.pt")}
    with pytest.raises(checkpoint.UnreadableError, match=f"no checkpoint in {parts} can be read"):
        train(with_dropout(1), "parts")
    assert {path: path.read_bytes() for path in parts.glob("*.pt")} == before


class Payload:
    """Unpickled, it makes a file."""

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
def test_code_in_a_checkpoint_is_not_run(train, whole, parts, tmp_path, craft, kind):
    """A crafted file is a damaged one; the payload would run in a plain load."""
    made, path = tmp_path / "made", paths(parts, 4)[kind]
    path.write_bytes(craft(Payload(made), torch.load(path, weights_only=True)))
    going_on = train(with_dropout(1), "parts")
    assert not made.exists()
    assert "warning: checkpoint 4 cannot be used" in (parts / "log.txt").read_text()
    expect_same(going_on, whole)

    data = craft(Payload(made), {})
    pickle.loads(data) if craft is pickled else torch.load(io.BytesIO(data), weights_only=False)
    assert made.exists()


# ----------------------------------------------------------------------------------------------------------
# How many are kept


@pytest.mark.parametrize("keep_last", [1, 2])
def test_the_newest_sets_are_kept(train, linear, tmp_path, keep_last):
    seen = []
    train(linear, save_interval=1, keep_last=keep_last, on_save=lambda *_: seen.append(files(tmp_path)))
    for step, there in enumerate(seen, start=1):
        assert there == files_of(*range(max(step - keep_last, 0) + 1, step + 1))


def test_the_oldest_set_goes_first_and_is_invalid_first(train, linear, tmp_path, monkeypatch):
    train(linear, iterations=6)
    gone, really_unlink = [], Path.unlink

    def unlink(path, *args, **kwargs):
        if path.exists():
            gone.append((path.name, max(checkpoint.list_checkpoints(tmp_path))))
        really_unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    train(linear, iterations=7, keep_last=2)
    assert [newest for _, newest in gone] == [7] * 6  # the new set is complete before any goes
    names = [name for name, _ in gone]
    assert set(names[:3]) == files_of(2)
    assert set(names[3:]) == files_of(4)
    assert (names[0], names[3]) == ("opt000002.pt", "opt000004.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_kill_left_of_a_set_goes_too(train, whole, tmp_path, monkeypatch, kind):
    """Killed while it removes the set of step 2: nothing of it stays for good."""
    really_unlink, directory = Path.unlink, tmp_path / "parts"

    def unlink(path, *args, **kwargs):
        if path == paths(directory, 2)[kind]:
            raise Killed
        really_unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(Killed):
        train(with_dropout(0), "parts", keep_last=1)
    monkeypatch.undo()
    (directory / "model_best.pt").write_bytes(b"the user's")
    (directory / "optimal.pt").write_bytes(b"the user's")
    expect_same(train(with_dropout(1), "parts", keep_last=1), whole)
    assert files(directory) == {*files_of(6), "model_best.pt", "optimal.pt"}


def test_a_damaged_newer_set_does_not_crowd_out_the_sound_ones(train, whole, parts):
    """Stopped between the set that it went on from and the damaged one, a run keeps what it has just saved."""
    truncate(paths(parts, 4)["model"])
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", save_interval=3, keep_last=1, batches_from=stopping_at(3))
    read_set(parts, 3)
    expect_same(train(with_dropout(1), "parts", keep_last=1), whole)
    assert files(parts) == files_of(6)


# ----------------------------------------------------------------------------------------------------------
# What is resumed besides weights


def test_the_schedule_samplers_history_is_resumed(train, make_diffusion):
    """Draws and weights depend on the losses so far, so weights would differ were they forgotten."""

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
    assert all(drawn)  # from the first resumed step on, not uniformly
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    expect_same(other, one)


def test_the_float16_scaler_is_resumed(train, tmp_path):
    """Gradients that overflow halve the scale of 2¹⁶ that it begins with, and the run that goes on keeps that."""

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
    expect_same(other, one)


@pytest.mark.parametrize("torn", [b"", b"6", b"6,0.12", b"\0" * 40, b"\0" * 40 + b"\n", b"\xff\xfe\n"])
def test_figures_are_not_repeated(train, tmp_path, torn):
    """Rows after the checkpoint are given again, once; a torn last row is no row. TensorBoard shows the same."""
    train(with_dropout(0), "whole", log_interval=1)
    with pytest.raises(Stop):
        train(with_dropout(0), "parts", log_interval=1, batches_from=stopping_at(5))
    progress = tmp_path / "parts" / "progress.csv"
    assert [row["step"] for row in rows_of(progress.parent)] == ["1", "2", "3", "4", "5"]
    progress.write_bytes(progress.read_bytes() + torn)
    train(with_dropout(1), "parts", log_interval=1)
    figures = [
        [(row["step"], row["loss"], row["learning_rate"]) for row in rows_of(tmp_path / folder)]
        for folder in ("whole", "parts")
    ]
    assert figures[0] == figures[1]
    assert [step for step, *_ in figures[0]] == ["1", "2", "3", "4", "5", "6"]
    events = EventAccumulator(str(progress.parent))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("left", [b"", b"step,lo", b"step,loss,learning_rate,images_per_second\n"])
def test_a_table_without_rows_is_begun_anew(train, tmp_path, left):
    (tmp_path / "progress.csv").write_bytes(left)
    train(with_dropout(0), log_interval=1, iterations=2)
    assert [row["step"] for row in rows_of(tmp_path)] == ["1", "2"]


# ----------------------------------------------------------------------------------------------------------
# Signals and losses


def signalling(step_and_signal):
    """Losses that signal this process in some steps."""

    def losses(model, batch, step):
        for number in step_and_signal.get(step, ()):
            os.kill(os.getpid(), number)
        return squared_error(model, batch, step)

    return losses


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_and_saves(train, whole, tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        train(with_dropout(0), "parts", compute_losses=signalling({2: [number]}))
    assert stopped.value.received == number
    assert signal.getsignal(number) == before
    assert list(checkpoint.list_checkpoints(tmp_path / "parts")) == [2, 3]
    expect_same(train(with_dropout(1), "parts"), whole)


def test_a_second_signal_ends_the_run_at_once(train, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(with_dropout(0), "parts", compute_losses=signalling({2: [signal.SIGINT] * 2}))
    assert list(checkpoint.list_checkpoints(tmp_path / "parts")) == [2]
    expect_same(train(with_dropout(1), "parts"), whole)


def test_weights_that_are_not_finite_are_not_saved(train, linear, tmp_path):
    """The loss of a step can be finite, and the step spoil the weights all the same."""

    def losses(model, batch, step):
        root_at_0 = (0 * model(batch[0])).sqrt().flatten() if step == 3 else 0.0  # slope 0 · ∞
        return squared_error(model, batch, step) + root_at_0

    with pytest.raises(FloatingPointError, match="after 4 steps"):
        train(linear, compute_losses=losses)
    assert files(tmp_path) == files_of(2)


# ----------------------------------------------------------------------------------------------------------
# Disks


class Large(nn.Module):
    """16 MB of weights of which the loss sees one: larger than anything else that is written meanwhile."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1 << 18))

    def forward(self, x):
        return x[:, :1] * self.weight[:1]


@pytest.fixture
def size_limit():
    """Let this process write files of so many bytes at most; the kernel then refuses a write, part-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("limit", "kind"), [(1 << 19, "model"), (3 << 19, "opt")])
def test_a_file_that_the_system_cuts_off(train, tmp_path, size_limit, limit, kind):
    """The error names the file and the reason, nothing of the set is left, and the older one is sound."""

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
def test_a_full_disk(train, whole, tmp_path, kind):
    """The same where the system says that there is no space: writes go to /dev/full."""
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
    expect_same(train(with_dropout(1), "parts"), whole)  # there is space again


def test_a_disk_that_can_only_be_read_any_more(tmp_path, monkeypatch):
    """Neither written nor tidied up: it is the first failure that is told."""

    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(checkpoint.CheckpointError, match=r"model000004.pt cannot be written \(Read-only file"):
        checkpoint.save(paths(tmp_path, 4), {kind: {} for kind in KINDS})


SET = 4 * 4 * 4  # bytes of a set of `linear`: 4 parameters, their average, and two moments


@pytest.mark.parametrize(("keep_last", "needed"), [(0, 3), (1, 2), (2, 3), (5, 3)])
def test_too_little_space_is_found_before_the_first_step(train, linear, tmp_path, monkeypatch, keep_last, needed):
    """Three sets are to come; while one is written, `keep_last` others lie there."""

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
def test_space_that_older_sets_take_is_not_asked_for_again(train, linear, tmp_path, monkeypatch, keep_last, needed):
    """A run that fitted goes on where it was stopped; two sets are still to come."""
    with pytest.raises(Stop):
        train(linear, keep_last=keep_last, batches_from=stopping_at(2))
    for free in (needed * SET - 1, needed * SET):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if free < needed * SET:
            with pytest.raises(checkpoint.CheckpointError, match="will not fit"):
                train(linear, keep_last=keep_last)
        else:
            train(linear, keep_last=keep_last)


def test_a_set_is_as_large_as_was_asked_for(train, tmp_path):
    """What is on the disk is within 5 % of the estimate, for weights that outweigh the files' headers."""
    train(Large(), iterations=2)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.pt"))
    assert written == pytest.approx(4 * 4 * (1 << 18), rel=0.05)
    assert np.isfinite(written)

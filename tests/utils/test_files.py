"""Locks on folders, and atomic replacement of their files, also by processes that are killed."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli import UserError
from utils.files import locked, replaced

# Locks a folder, forks a child as a data loader forks its workers, prints its process id, and holds the lock. Both
# processes exit when the test closes their stdin.
HOLDER = """
import os, sys
from pathlib import Path
from utils.files import locked
with locked(Path(sys.argv[1]), "--logdir", "name another"):
    child = os.fork()
    if child:
        print(child, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Return `start(folder)`, which starts a process that locks the folder; it returns this and its child's id."""
    started = []

    def start(folder: Path) -> tuple[subprocess.Popen, int]:
        repository = Path(__file__).resolve().parents[2]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=repository, **pipes)
        started.append(process)
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.stdin.close()  # both exit at the end of their input
        process.stdout.read()  # until the child, too, has exited
        process.wait()
        process.stdout.close()


def test_a_killed_process_releases_the_lock_although_its_child_runs(holder, tmp_path):
    """Others are refused as long as it runs; its child does not hold the lock."""
    process, child = holder(tmp_path / "new")
    with (
        pytest.raises(UserError, match=r"another process is writing to .*new: wait for it, or name another"),
        locked(tmp_path / "new", "--logdir", "name another"),
    ):
        pytest.fail("two processes have the lock")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with locked(tmp_path / "new", "--logdir", "name another"):
        os.kill(child, 0)  # still runs


def test_the_lock_is_released_after_the_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path, "--logdir", "name another"):
            pass


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(UserError, match=r"file/new cannot be written to \(.*\): check --logdir"),
        locked(tmp_path / "file/new", "--logdir", "name another"),
    ):
        pass


def test_a_file_system_without_locks_has_its_own_error(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.raises(UserError, match=r"cannot be locked \(No locks available\): check --logdir"),
        locked(tmp_path, "--logdir", "name another"),
    ):
        pass


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "make room and run the same command again"), (errno.EROFS, "check --logdir")]
)
def test_files_are_replaced_atomically(tmp_path, number, remedy):
    folder = tmp_path / "run"
    for content in ("first", "second"):
        with replaced(folder, "--logdir", ["old*"]) as new:
            (new / "below").mkdir()
            (new / "below/a.txt").write_text(content)
        (folder / "old1").write_text("")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == {folder / "below/a.txt": b"second", folder / "old1": b""}

    def fail():
        with replaced(folder, "--logdir", ["old*"]) as new:
            (new / "a.txt").write_text("third")
            raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=rf"run cannot be written to \({os.strerror(number)}\): {remedy}"):
        fail()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in folder.iterdir()) == ["below", "old1"]


# Replaces files of a folder, and waits before it moves them until the test closes its stdin.
REPLACER = """
import sys
from pathlib import Path
from utils.files import replaced
with replaced(Path(sys.argv[1]), "--logdir") as new:
    (new / sys.argv[2]).write_text("new")
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("exists", [True, False])
def test_a_killed_process_leaves_no_temporary_folder_for_ever(tmp_path, exists):
    """The next one removes it, but not that of a process that still runs."""
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    repository = Path(__file__).resolve().parents[2]
    started = []
    for name in ("killed", "alive"):
        started.append(subprocess.Popen([sys.executable, "-c", REPLACER, folder, name], cwd=repository, **pipes))
        assert started[-1].stdout.readline() == "ready\n"
    killed, alive = started
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.rglob(".new_*"))) == 2
    (tmp_path / ".new_somebody").mkdir()  # without a lock, perhaps not ours
    with replaced(folder, "--logdir") as new:
        (new / "mine").write_text("new")
    assert len(list(tmp_path.rglob(".new_*"))) == 2
    alive.communicate()
    assert alive.returncode == 0
    assert [path.name for path in tmp_path.rglob(".new_*")] == [".new_somebody"]
    assert sorted(path.name for path in folder.iterdir()) == ["alive", "mine"]
    killed.communicate()


def test_files_are_replaced_on_a_file_system_without_locks(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with replaced(tmp_path, "--logdir") as new:
        (new / "a.txt").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("in_the_way", "message"),
    [("b.txt", "b.txt takes the name of a new file"), ("below", "below takes the name of a new folder")],
)
def test_nothing_is_replaced_if_a_name_is_taken_by_another_kind(tmp_path, in_the_way, message):
    (tmp_path / "a.txt").write_text("old")
    (tmp_path / "events").write_text("old")
    if in_the_way == "below":
        (tmp_path / "below").write_text("a file")
    else:
        (tmp_path / "b.txt").mkdir()
    before = sorted(tmp_path.rglob("*"))

    def replace():
        with replaced(tmp_path, "--logdir", ["events"]) as new:
            (new / "below").mkdir()
            for name in ("a.txt", "b.txt", "below/c.txt"):
                (new / name).write_text("new")

    with pytest.raises(UserError, match=f"{message}: move it away, or check --logdir"):
        replace()
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_closed_pipe_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(BrokenPipeError), replaced(tmp_path, "--logdir"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

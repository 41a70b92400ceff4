"""Folders that one process at a time works in."""

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

# Takes the lock on a folder, forks a child as a data loader forks its workers, names it, and holds the lock until it
# is killed. The child ends with the test that reads its pipe.
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
    """Begin a process that holds the lock on a folder: `begin(folder)`, with its child's process id."""
    begun = []

    def begin(folder: Path) -> tuple[subprocess.Popen, int]:
        repository = Path(__file__).resolve().parents[2]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=repository, **pipes)
        begun.append(process)
        return process, int(process.stdout.readline())

    yield begin
    for process in begun:
        process.stdin.close()  # both end: nothing more to read
        process.stdout.read()  # until the child, too, has closed it
        process.wait()
        process.stdout.close()


def test_a_killed_process_leaves_the_lock_though_its_child_lives(holder, tmp_path):
    """While it lives, others are refused; what it forked has no part in its lock."""
    process, child = holder(tmp_path / "new")
    with (
        pytest.raises(UserError, match=r"another process is writing to .*new: wait for it, or name another"),
        locked(tmp_path / "new", "--logdir", "name another"),
    ):
        pytest.fail("two processes have the lock")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with locked(tmp_path / "new", "--logdir", "name another"):
        os.kill(child, 0)  # is there


def test_the_lock_is_free_after_the_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path, "--logdir", "name another"):
            pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(UserError, match=r"file/new cannot be written to \(.*\): check --logdir"),
        locked(tmp_path / "file/new", "--logdir", "name another"),
    ):
        pass


def test_a_file_system_without_locks_is_not_another_process(monkeypatch, tmp_path):
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
def test_files_are_replaced_together_or_not_at_all(tmp_path, number, remedy):
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

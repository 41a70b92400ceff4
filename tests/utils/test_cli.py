"""What `run` does around every script: how threads wait, and how errors end it."""

import errno
import os
import threading

import pytest

from utils.cli import SPIN_COUNT, SPIN_VARIABLES, UserError, run


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Nobody has said how threads wait, whatever the environment of these tests says; afterwards all is as before."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    for name in SPIN_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def ended(main) -> int:
    with pytest.raises(SystemExit) as end:
        run(main)
    return end.value.code


def test_threads_wait_within_bounds():
    found = []
    assert ended(lambda: found.append(os.environ["GOMP_SPINCOUNT"])) == 0
    assert found == [SPIN_COUNT]


@pytest.mark.parametrize("name", SPIN_VARIABLES)
def test_what_the_user_says_of_waiting_holds(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    found = []
    ended(lambda: found.append({name: os.environ[name] for name in SPIN_VARIABLES if name in os.environ}))
    assert found == [{name: "7"}]


def fail(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("do this"), 2, "error: do this\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "error: a/b: No space left on device\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long"), 2, "error: a file: File name too long\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_no_code_can_mend_is_one_sentence(capsys, error, code, said):
    assert ended(fail(error)) == code
    assert capsys.readouterr().err.endswith(said)


def test_other_errors_are_not_swallowed():
    with pytest.raises(PermissionError):
        run(fail(PermissionError(errno.EACCES, "Permission denied", "a/b")))


@pytest.mark.parametrize(("error", "shown"), [(OSError(errno.ENOSPC, "No space left"), False), (ValueError("x"), True)])
def test_a_full_disk_is_no_traceback_of_a_thread(capsys, error, shown):
    def main():
        thread = threading.Thread(target=fail(error))
        thread.start()
        thread.join()

    assert ended(main) == 0
    assert ("Traceback" in capsys.readouterr().err) == shown

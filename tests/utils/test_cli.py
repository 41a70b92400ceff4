"""`run`, which wraps every script: spinning of threads, exit codes and messages of errors, and closed pipes."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from utils.cli import SPIN_COUNT, SPIN_VARIABLES, UserError, run


@pytest.fixture(autouse=True)
def unset_spin_variables(monkeypatch):
    """Unset SPIN_VARIABLES; restore them and threading.excepthook afterwards."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    for name in SPIN_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def exit_code(main) -> int:
    with pytest.raises(SystemExit) as end:
        run(main)
    return end.value.code


def test_spin_count_is_limited():
    found = []
    assert exit_code(lambda: found.append(os.environ["GOMP_SPINCOUNT"])) == 0
    assert found == [SPIN_COUNT]


@pytest.mark.parametrize("name", SPIN_VARIABLES)
def test_spin_variables_set_by_the_user_are_kept(monkeypatch, name):
    monkeypatch.setenv(name, "7")
    found = []
    exit_code(lambda: found.append({name: os.environ[name] for name in SPIN_VARIABLES if name in os.environ}))
    assert found == [{name: "7"}]


def test_compiled_networks_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    found, name = [], "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path / "fixed")
    (tmp_path / "fixed").mkdir()
    for cache, mine in (("", ""), (tmp_path / "x", ""), (tmp_path / "x", "/mine"), (tmp_path / "fixed" / "y", "")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        monkeypatch.setenv(name, mine)
        exit_code(lambda: found.append(os.environ.get(name)))
    assert found == [str(tmp_path / ".cache" / "torchinductor"), str(tmp_path / "x" / "torchinductor"), "/mine", ""]


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
def test_expected_errors_print_one_line(capsys, error, code, said):
    assert exit_code(fail(error)) == code
    assert capsys.readouterr().err.endswith(said)


def test_other_errors_are_not_swallowed():
    with pytest.raises(PermissionError):
        run(fail(PermissionError(errno.EACCES, "Permission denied", "a/b")))


@pytest.mark.parametrize(("error", "shown"), [(OSError(errno.ENOSPC, "No space left"), False), (ValueError("x"), True)])
def test_a_full_disk_in_a_thread_prints_no_traceback(capsys, error, shown):
    def main():
        thread = threading.Thread(target=fail(error))
        thread.start()
        thread.join()

    assert exit_code(main) == 0
    assert ("Traceback" in capsys.readouterr().err) == shown


# What a script prints before it ends, and its exit code when nobody reads it.
PRINTS = {
    "a line": ("print('x')", 141),
    "many lines": ("[print('x' * 1000) for _ in range(1000)]", 141),
    "help": ("ArgumentParser(description='x').parse_args(['--help'])", 141),
    "a mistake": ("print('x'); raise UserError('do this')", 2),
    "failed scans": ("print('x'); sys.exit(1)", 1),
}


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
@pytest.mark.parametrize("prints", PRINTS)
def test_a_closed_pipe_ends_a_script_quietly(prints, both):
    """As in `script | head -1`, after head has exited."""
    code, expected = PRINTS[prints]
    script = f"import sys\nfrom utils.cli import ArgumentParser, UserError, run\ndef main():\n    {code}\nrun(main)"
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        stdout=writer,
        stderr=writer if both else subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert done.returncode == expected
    if not both:
        assert done.stderr == (b"-c: error: do this\n" if prints == "a mistake" else b"")

"""Atomic writing of files, and folders locked against other processes."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from .cli import UserError


def write_atomically(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file so that an error or a crash, even of the machine, leaves its old content or all of the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # make the renaming durable, too
    finally:
        os.close(folder)


@contextmanager
def writing(folder: Path, flag: str) -> Iterator[None]:
    """Turn an OSError of the block into a UserError with a remedy, for a `folder` that the user gave as `flag`."""
    try:
        yield
    except BrokenPipeError:  # from printing, not from the folder
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room and run the same command again" if full else f"check {flag}"
        raise UserError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}") from error


@contextmanager
def replaced(folder: Path, flag: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder, whose files move into `folder` when the block succeeds.

    Files in `folder` that match the patterns `stale` are removed first. If the block fails, `folder` is unchanged.
    Temporary folders of killed processes are removed.

    Raises:
        UserError: as from `writing`, or if `folder` contains a folder with the name of a new file, or the reverse.
    """
    with writing(folder, flag):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for lock in (path for place in (folder, folder.parent) for path in place.glob(".new_????????/.lock")):
            with suppress(OSError):  # its process is alive
                with lock.open("r+") as file:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.parent)
        # Inside the folder, or beside it if it does not exist yet: on the same file system, so that files can be moved.
        place = folder if folder.is_dir() else folder.parent
        with TemporaryDirectory(prefix=".new_", dir=place) as name, Path(name, "unlocked").open("w") as file:
            with suppress(OSError):  # the file system does not support locks
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(file.name).rename(Path(name, ".lock"))  # locked as soon as others can find it
            new = Path(name, "new")
            new.mkdir()
            yield new
            for path in new.rglob("*"):
                target = folder / path.relative_to(new)
                if target.exists() and target.is_dir() != path.is_dir():
                    kind = "folder" if path.is_dir() else "file"
                    raise UserError(f"{target} takes the name of a new {kind}: move it away, or check {flag}")
            folder.mkdir(exist_ok=True)
            for path in (path for pattern in stale for path in folder.glob(pattern) if path.is_file()):
                path.unlink()
            for path in sorted(path for path in new.rglob("*") if path.is_file()):
                target = folder / path.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)


@contextmanager
def locked(folder: Path, flag: str, otherwise: str) -> Iterator[None]:
    """Create a folder, which the user gave as `flag`, and hold its lock while the block runs.

    The operating system releases the lock when the process ends, however it ends. Forked processes do not inherit it.

    Raises:
        UserError: if another process holds the lock (remedy: wait, or `otherwise`) or the folder cannot be locked.
    """
    with writing(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either
            raise UserError(f"another process is writing to {folder}: wait for it, or {otherwise}") from error
        except OSError as error:  # the file system does not support locks
            raise UserError(f"{folder} cannot be locked ({error.strerror}): check {flag}") from error
        yield

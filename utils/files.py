"""Files that are there as a whole or not at all, and folders that one process at a time works in."""

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .cli import UserError


def write_whole(path: Path, data: bytes | memoryview | str) -> None:
    """Write a file that is there as a whole or not at all, whatever ends the process or the machine meanwhile.

    After an OSError, an earlier file of this name is as it was.
    """
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
        os.fsync(folder)  # the new name, too, is on the disk now
    finally:
        os.close(folder)


@contextmanager
def writing(folder: Path, flag: str) -> Iterator[None]:
    """Turn what the file system refuses in a folder, which `flag` has named, into a UserError with what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room, and give the same command again" if full else f"check {flag}"
        raise UserError(f"{folder} cannot be written to ({error.strerror or error}): {remedy}") from error


@contextmanager
def replaced(folder: Path, flag: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A new folder, whose files take their places in `folder` once the block has ended well.

    Files there that fit the patterns `stale` go. Until then, and whatever goes wrong, `folder` is as it was.
    A UserError as from `writing`.
    """
    with writing(folder, flag):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # On the same file system: in the folder itself or, where that is not there yet, beside it.
        with TemporaryDirectory(prefix=".new_", dir=folder if folder.is_dir() else folder.parent) as name:
            new = Path(name)
            yield new
            folder.mkdir(exist_ok=True)
            for path in (path for pattern in stale for path in folder.glob(pattern)):
                path.unlink()
            for path in sorted(path for path in new.rglob("*") if path.is_file()):
                target = folder / path.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)


@contextmanager
def locked(folder: Path, flag: str, otherwise: str) -> Iterator[None]:
    """Make a folder, and keep other processes that lock it out of it for as long as the block runs.

    The system takes the lock back from a process that ends, however it ends. Forked processes do not inherit it. A
    UserError if another process has the lock, or the folder, which `flag` has named, cannot be made, written to or
    locked; `otherwise` is what a user can do who finds it locked.
    """
    with writing(folder, flag):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX leaves it to the system which
            raise UserError(f"another process is writing to {folder}: wait for it, or {otherwise}") from error
        except OSError as error:  # a file system without locks
            raise UserError(f"{folder} cannot be locked ({error.strerror}): check {flag}") from error
        yield

"""Folders of experiments, on a file system or on object storage (`gs://bucket/…`, `az://account/container/…`).

A run always works in a local folder. For object storage, this is a mirror: files that the run needs are pulled, and
files that it has changed are pushed. Uploads are atomic, but there are no locks.
"""

import argparse
import fnmatch
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from .cli import UserError


class StorageError(UserError):
    """Failure to read from or write to object storage."""


def local_path(text: str) -> Path:
    """Return an argument as a path, for arguments that must not be an address on object storage."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is on object storage: copy it here first")
    return Path(text)


def open_folder(path: str) -> "Folder":
    """Return the folder at a path or address, as a context manager."""
    return Mirror(path) if "://" in path else Folder(Path(path))


class Folder(AbstractContextManager):
    """Folder on a file system, with nothing to pull or push."""

    remote: str | None = None  # its address on object storage
    writable = True  # whether to change object storage; of several processes, only one may

    def __init__(self, local: Path):
        self.local = local

    def __exit__(self, *error: object) -> None:
        pass

    def address(self, path: Path) -> str:
        """Return a path in the folder as shown to the user."""
        return str(path)

    def list_files(self, folder: str) -> list[str]:
        """Return the names of the files to pull from a subfolder."""
        return []

    def pull(self, folder: str, *patterns: str) -> None:
        """Fetch the files of a subfolder whose names match one of the patterns."""

    def push(self) -> None:
        """Upload all changes, including removed files, since the last pull or push."""

    def remove(self, folder: str, *patterns: str) -> None:
        """Remove the files of a subfolder whose names match one of the patterns, pattern by pattern."""
        for path in (path for pattern in patterns for path in (self.local / folder).glob(pattern)):
            path.unlink()


class Mirror(Folder):
    """Folder on object storage, mirrored in a temporary local one.

    Leaving the `with` statement, even by an exception, pushes all changes and removes the local folder, unless the push
    fails. In messages of `UserError`, the local path is replaced by `remote`.
    """

    def __init__(self, remote: str):
        import blobfile  # optional dependency

        scheme, _, rest = remote.partition("://")
        self.remote = f"{scheme}://{rest.strip('/')}"
        super().__init__(Path(tempfile.mkdtemp(prefix="mmccd-")))
        # By default, blobfile retries for ever, logs every attempt and stores access tokens in the home folder.
        options = {"log_callback": lambda message: None, "save_access_token_to_disk": False}
        self._blobs = blobfile.create_context(retry_limit=8, **options)
        self._stored: dict[str, tuple[int, int]] = {}  # state of each local file when it was pulled or pushed

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, StorageError):
            try:
                self.push()
            except StorageError as failure:
                raise StorageError(f"{failure}; files not yet uploaded are in {self.local}") from failure
        shutil.rmtree(self.local)
        if isinstance(error, UserError) and not isinstance(error, StorageError):
            raise UserError(self.address(error)) from error

    def address(self, path: object) -> str:
        return str(path).replace(str(self.local), self.remote)

    def list_files(self, folder: str) -> list[str]:
        with self._storage_errors("read"), suppress(FileNotFoundError):
            return [entry.name for entry in self._blobs.scandir(f"{self.remote}/{folder}") if entry.is_file]
        return []

    def pull(self, folder: str, *patterns: str) -> None:
        for name in _matching(self.list_files(folder), patterns):
            path = self.local / folder / name
            temporary = path.with_name(f"{name}.tmp")  # never pushed, even if the process ends here
            with self._storage_errors("read"):
                self._blobs.copy(self.address(path), str(temporary), overwrite=True)
                temporary.replace(path)
            self._stored[f"{folder}/{name}"] = _fingerprint(path)

    def push(self) -> None:
        """As in `Folder`; opt*.pt, which mark a checkpoint as complete, are uploaded last and removed first."""
        if not self.writable:
            return
        here = {
            path.relative_to(self.local).as_posix(): _fingerprint(path)
            for path in self.local.rglob("*")
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp"
        }
        with self._storage_errors("written to"):
            for name in sorted(here, key=lambda name: (_completes_checkpoint(name), name)):
                if here[name] != self._stored.get(name):
                    self._blobs.copy(str(self.local / name), f"{self.remote}/{name}", overwrite=True)
                    self._stored[name] = here[name]
            self._remove(self._stored.keys() - here)

    def remove(self, folder: str, *patterns: str) -> None:
        super().remove(folder, *patterns)
        if self.writable:
            names = _matching(self.list_files(folder), patterns)
            with self._storage_errors("written to"):
                self._remove(f"{folder}/{name}" for name in names)

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=lambda name: (not _completes_checkpoint(name), name)):
            with suppress(FileNotFoundError):
                self._blobs.remove(f"{self.remote}/{name}")
            self._stored.pop(name, None)

    @contextmanager
    def _storage_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # credentials, addresses and networks fail in many ways
            reason = next(iter(str(getattr(error, "message", error)).splitlines()), type(error).__name__)
            remedy = "check --logdir, credentials and network"
            raise StorageError(f"{self.remote} cannot be {action} ({reason}): {remedy}") from error


def _matching(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _fingerprint(path: Path) -> tuple[int, int]:
    """Return the size and modification time of a file, to detect changes."""
    return path.stat().st_size, path.stat().st_mtime_ns


def _completes_checkpoint(name: str) -> bool:
    return fnmatch.fnmatchcase(name.rpartition("/")[2], "opt*.pt")

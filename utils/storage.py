"""Where experiments lie: a folder on a file system, or one on object storage, `gs://bucket/…` or `az://account/container/…`.

A run works in a local folder in any case. One on object storage is mirrored: what a run needs is pulled, what it has
changed is pushed. There an upload is there as a whole or not at all, but there are no locks.
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
    """Object storage cannot be read or written to."""


def local_path(text: str) -> Path:
    """The path that an argument gives, for those that cannot be an address on object storage."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text} is on object storage: copy it here first")
    return Path(text)


def open_folder(path: str) -> "Folder":
    """The folder at a path or an address, to be used in a `with` statement."""
    return Mirror(path) if "://" in path else Folder(Path(path))


class Folder(AbstractContextManager):
    """A folder on a file system: there is nothing to pull or to push."""

    remote: str | None = None  # its address on object storage
    writes = True  # of several processes only one does, to object storage

    def __init__(self, local: Path):
        self.local = local

    def __exit__(self, *error: object) -> None:
        pass

    def address(self, path: Path) -> str:
        """What a user calls a path in the folder."""
        return str(path)

    def names(self, folder: str) -> list[str]:
        """The files to be pulled from one of its folders."""
        return []

    def pull(self, folder: str, *patterns: str) -> None:
        """Fetch the files of one of its folders whose names fit one of the patterns."""

    def push(self) -> None:
        """Store what is new, changed or removed since it was pulled or pushed."""

    def remove(self, folder: str, *patterns: str) -> None:
        """Remove the files of one of its folders whose names fit one of the patterns, in the patterns' order."""
        for path in (path for pattern in patterns for path in (self.local / folder).glob(pattern)):
            path.unlink()


class Mirror(Folder):
    """A folder on object storage, and a temporary local one that stands for it.

    At the end of a `with` statement, however it comes about, it is pushed and the local folder removed, unless the push
    fails. What `UserError`s say of the local folder is said of the address, `remote`, as blobfile understands it.
    """

    def __init__(self, remote: str):
        import blobfile  # only here, for those who need it

        scheme, _, rest = remote.partition("://")
        self.remote = f"{scheme}://{rest.strip('/')}"
        super().__init__(Path(tempfile.mkdtemp(prefix="mmccd-")))
        # By default it tries for ever, logs each try, and leaves keys in the home folder.
        manners = {"log_callback": lambda message: None, "save_access_token_to_disk": False}
        self._blobs = blobfile.create_context(retry_limit=8, **manners)
        self._stored: dict[str, tuple[int, int]] = {}  # state of each local file when it was pulled or pushed

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, StorageError):
            try:
                self.push()
            except StorageError as failure:
                raise StorageError(f"{failure}; what is missing there lies in {self.local}") from failure
        shutil.rmtree(self.local)
        if isinstance(error, UserError) and not isinstance(error, StorageError):
            raise UserError(self.address(error)) from error

    def address(self, path: object) -> str:
        return str(path).replace(str(self.local), self.remote)

    def names(self, folder: str) -> list[str]:
        with self._plain_errors("read"), suppress(FileNotFoundError):
            return [entry.name for entry in self._blobs.scandir(f"{self.remote}/{folder}") if entry.is_file]
        return []

    def pull(self, folder: str, *patterns: str) -> None:
        for name in _fitting(self.names(folder), patterns):
            path = self.local / folder / name
            temporary = path.with_name(f"{name}.tmp")  # is never pushed, whatever ends the process meanwhile
            with self._plain_errors("read"):
                self._blobs.copy(self.address(path), str(temporary), overwrite=True)
                temporary.replace(path)
            self._stored[f"{folder}/{name}"] = _state(path)

    def push(self) -> None:
        """As in `Folder`; the opt*.pt, which make a set of checkpoints valid, come last, and are removed first."""
        if not self.writes:
            return
        here = {
            path.relative_to(self.local).as_posix(): _state(path)
            for path in self.local.rglob("*")
            if path.is_file() and not path.name.startswith(".") and path.suffix != ".tmp"
        }
        with self._plain_errors("written to"):
            for name in sorted(here, key=lambda name: (_validates(name), name)):
                if here[name] != self._stored.get(name):
                    self._blobs.copy(str(self.local / name), f"{self.remote}/{name}", overwrite=True)
                    self._stored[name] = here[name]
            self._remove(self._stored.keys() - here)

    def remove(self, folder: str, *patterns: str) -> None:
        super().remove(folder, *patterns)
        if self.writes:
            names = _fitting(self.names(folder), patterns)
            with self._plain_errors("written to"):
                self._remove(f"{folder}/{name}" for name in names)

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names, key=lambda name: (not _validates(name), name)):
            with suppress(FileNotFoundError):
                self._blobs.remove(f"{self.remote}/{name}")
            self._stored.pop(name, None)

    @contextmanager
    def _plain_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever credentials, addresses and the network have to offer
            reason = next(iter(str(getattr(error, "message", error)).splitlines()), type(error).__name__)
            remedy = "check --logdir, credentials and network"
            raise StorageError(f"{self.remote} cannot be {what} ({reason}): {remedy}") from error


def _fitting(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _state(path: Path) -> tuple[int, int]:
    """What tells a file from its earlier self."""
    return path.stat().st_size, path.stat().st_mtime_ns


def _validates(name: str) -> bool:
    return fnmatch.fnmatchcase(name.rpartition("/")[2], "opt*.pt")

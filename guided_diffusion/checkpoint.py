"""Training checkpoints on disk.

A checkpoint consists of `model{step}.pt` and `ema_{rate}_{step}.pt` (plain state dicts, as in the public library) and
`opt{step}.pt`, which is written last: if it exists, the checkpoint is complete.
"""

import contextlib
import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.files import write_atomically

# Patterns of all files that training writes. Remove them in this order: without its opt*.pt, no checkpoint is complete.
TRAINING_FILES = (
    *(f"{kind}[0-9]*.pt{end}" for kind in ("opt", "model", "ema_[0-9]*_") for end in ("", ".tmp")),
    *("progress.csv", "progress.csv.tmp", "log.txt", "events.out.tfevents.*"),
)
EMA_PREFIX = r"ema_[0-9.e-]+_"  # for any EMA rate


class CheckpointError(Exception):
    """Failure to write or read a checkpoint."""


class UnreadableError(CheckpointError):
    """Failure to read an existing checkpoint."""


def paths_of(directory: Path, ema_rate: float, step: int) -> dict[str, Path]:
    """Return the files of a checkpoint, in the order in which they are written."""
    return {
        "model": directory / f"model{step:06d}.pt",
        "ema": directory / f"ema_{ema_rate}_{step:06d}.pt",
        "opt": directory / f"opt{step:06d}.pt",
    }


def list_checkpoints(where: Path | Iterable[str], prefix: str = "opt") -> dict[int, str]:
    """Return the file names `{prefix}{step}.pt` in a folder, or among names, by step, oldest first.

    `prefix` is a regular expression; the default one finds complete checkpoints.
    """
    names = (path.name for path in where.glob("*.pt")) if isinstance(where, Path) else where
    matches = (re.fullmatch(rf"{prefix}(\d+)\.pt", name) for name in names)
    return dict(sorted((int(match[1]), match[0]) for match in matches if match))


def step_of(name: str) -> int | None:
    """Return the training step in a checkpoint's file name, or None if there is none."""
    return next(iter(list_checkpoints([name], ".*?")), None)


def needed_to_resume(names: Iterable[str], keep_last: int) -> list[str]:
    """Return patterns of the checkpoint files among `names` that a resumed training reads or may remove."""
    newest = list(list_checkpoints(names).values())[-2:]  # two, in case the last one is damaged
    return ["*.pt"] if keep_last else [name.replace("opt", "*") for name in newest]


def save(paths: Mapping[str, Path], states: Mapping[str, Any]) -> None:
    """Write a checkpoint: `states`, of tensors and plain Python objects, under the same keys as `paths`.

    Raises:
        CheckpointError: if the disk is full or not writable. Older checkpoints are kept.
    """
    try:
        for kind, path in paths.items():
            buffer = io.BytesIO()  # torch.save to a file hides why writing failed
            torch.save(states[kind], buffer)
            write_atomically(path, buffer.getbuffer())
    except OSError as error:
        for written in paths.values():
            with contextlib.suppress(OSError):  # the disk may have become read-only
                written.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({error.strerror})") from error


def read_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """Load a file after verifying its checksums, without running any code in it.

    Raises:
        UnreadableError: if it is missing, damaged, or holds anything but tensors and plain Python objects.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # not in files from before PyTorch 1.6
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                # torch writes 0; an entry marked as a directory would be loaded as uninitialised memory.
                attributes = any(entry.external_attr for entry in archive.infolist())
            if damaged or attributes:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}" if damaged else "bad file attributes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the contents of a crafted file
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a flipped byte can raise nearly any exception
        raise UnreadableError(f"{path} is damaged ({reason(error)})") from error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(":")


def remove_older(directory: Path, ema_rate: float, newest: int, keep_last: int) -> None:
    """Keep the checkpoint of step `newest` and the `keep_last` - 1 complete ones before it; remove all older files."""
    kept = [step for step in list_checkpoints(directory) if step <= newest][-keep_last:]
    # Includes incomplete checkpoints, left by a process killed while writing or removing one.
    found = {step for prefix in ("model", f"ema_{ema_rate}_", "opt") for step in list_checkpoints(directory, prefix)}
    for step in sorted(found.difference(kept)):
        if step < newest:
            for path in reversed(paths_of(directory, ema_rate, step).values()):  # opt*.pt first
                path.unlink(missing_ok=True)

"""Checkpoints on disk: each a set of files that is there as a whole or not at all.

The set of a step is `model{step}.pt`, `ema_{rate}_{step}.pt` (both bare state dicts, as the public library writes them)
and `opt{step}.pt`. The last is written last: where it lies, the other two are whole.
"""

import contextlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message says which and why."""


class UnreadableError(CheckpointError):
    """What is there cannot be read."""


def paths_of(directory: Path, ema_rate: float, step: int) -> dict[str, Path]:
    """The files of a set, in the order in which they are written."""
    return {
        "model": directory / f"model{step:06d}.pt",
        "ema": directory / f"ema_{ema_rate}_{step:06d}.pt",
        "opt": directory / f"opt{step:06d}.pt",
    }


def saved_steps(directory: Path, prefix: str = "opt") -> list[int]:
    """The steps of all complete sets, or of all files that begin with another `prefix`, oldest first."""
    numbers = (path.stem.removeprefix(prefix) for path in directory.glob(f"{prefix}*.pt"))
    return sorted(int(number) for number in numbers if number.isdecimal())


def save(paths: Mapping[str, Path], states: Mapping[str, Any]) -> None:
    """Write a set: states of tensors and plain Python, by the keys of `paths`.

    Raises:
        CheckpointError: the disk is full, or cannot be written to. What lies there of older sets stays.
    """
    try:
        for kind, path in paths.items():
            buffer = io.BytesIO()  # torch's own writer does not say why it fails
            torch.save(states[kind], buffer)
            write_whole(path, buffer.getbuffer())
    except OSError as error:
        for written in paths.values():
            with contextlib.suppress(OSError):  # a disk that can only be read any more
                written.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written ({error.strerror})") from error


def load(paths: Mapping[str, Path], device: torch.device) -> dict[str, Any]:
    """Read a set, after a look at the checksums of all its files; no code in them is run.

    Raises:
        UnreadableError: a file is missing, damaged, or holds something else than tensors and plain Python.
    """
    states = {}
    for kind, path in paths.items():
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                # Their bits are 0; with that of a folder set, torch would leave memory as it finds it.
                attributes = any(entry.external_attr for entry in archive.infolist())
            if damaged or attributes:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}" if damaged else "bad file attributes")
            states[kind] = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # a flipped byte ends in nearly any
            raise UnreadableError(f"{path} is damaged ({reason(error)})") from error
    return states


def reason(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def remove_older(directory: Path, ema_rate: float, newest: int, keep_last: int) -> None:
    """Remove all up to the set of step `newest` but that and the `keep_last` - 1 complete sets before it."""
    kept = [step for step in saved_steps(directory) if step <= newest][-keep_last:]
    # Those of a process killed while it wrote or removed a set are not complete.
    there = {
        step for prefix in ("model", f"ema_{ema_rate}_", "opt") for step in saved_steps(directory, prefix)
    }
    for step in sorted(there.difference(kept)):
        if step < newest:
            for path in reversed(paths_of(directory, ema_rate, step).values()):  # invalid first, then gone
                path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is there as a whole or not at all, whatever ends the process or the machine meanwhile."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
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

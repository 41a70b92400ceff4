"""Checkpoints on disk: each a set of files that is there as a whole or not at all.

The set of a step is `model{step}.pt`, `ema_{rate}_{step}.pt` (both bare state dicts, as the public library writes them)
and `opt{step}.pt`. The last is written last: where it lies, the other two are whole.
"""

import contextlib
import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from utils.files import write_whole

# What training writes into its folder, in the order in which it may go: no set is taken for whole once this has begun.
WRITTEN = (
    *(f"{kind}[0-9]*.pt{end}" for kind in ("opt", "model", "ema_[0-9]*_") for end in ("", ".tmp")),
    *("progress.csv", "progress.csv.tmp", "log.txt", "events.out.tfevents.*"),
)
EMA = r"ema_[0-9.e-]+_"  # the prefix of averages of any rate


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


def saved(where: Path | Iterable[str], prefix: str = "opt") -> dict[int, str]:
    """The files in a folder, or of some names, that are a prefix (a regular expression), a step and .pt.

    By step, oldest first. With the default prefix they stand for complete sets.
    """
    names = (path.name for path in where.glob("*.pt")) if isinstance(where, Path) else where
    found = (re.fullmatch(rf"{prefix}(\d+)\.pt", name) for name in names)
    return dict(sorted((int(match[1]), match[0]) for match in found if match))


def step_of(name: str) -> int | None:
    """The training steps that a checkpoint's name tells, or None where it tells none."""
    return next(iter(saved([name], ".*?")), None)


def needed_to_resume(names: Iterable[str], keep_last: int) -> list[str]:
    """Patterns of the checkpoints among `names` that training reads, or may remove, when it goes on."""
    # The set before the newest one, too, in case that one is damaged.
    newest = list(saved(names).values())[-2:]
    return ["*.pt"] if keep_last else [name.replace("opt", "*") for name in newest]


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


def read_state(path: Path, device: torch.device | str = "cpu") -> Any:
    """What a file holds, after a look at its checksums; no code in it is run.

    An UnreadableError if it is missing, damaged, or holds something else than tensors and plain Python.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # what older versions of torch wrote is none
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
                # Their bits are 0; with that of a folder set, torch would leave memory as it finds it.
                attributes = any(entry.external_attr for entry in archive.infolist())
            if damaged or attributes:
                raise zipfile.BadZipFile(f"bad checksum of {damaged}" if damaged else "bad file attributes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a crafted file is made of
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a flipped byte ends in nearly any
        raise UnreadableError(f"{path} is damaged ({reason(error)})") from error


def reason(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(":")


def remove_older(directory: Path, ema_rate: float, newest: int, keep_last: int) -> None:
    """Remove all up to the set of step `newest` but that and the `keep_last` - 1 complete sets before it."""
    kept = [step for step in saved(directory) if step <= newest][-keep_last:]
    # Those of a process killed while it wrote or removed a set are not complete.
    there = {step for prefix in ("model", f"ema_{ema_rate}_", "opt") for step in saved(directory, prefix)}
    for step in sorted(there.difference(kept)):
        if step < newest:
            for path in reversed(paths_of(directory, ema_rate, step).values()):  # invalid first, then gone
                path.unlink(missing_ok=True)

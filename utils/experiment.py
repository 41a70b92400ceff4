"""What an experiment is called, what it says of itself, and where its weights lie."""

import fcntl
import fnmatch
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from .cli import UserError, did_you_mean
from .storage import Folder


def experiment_name(model_name: str, process: str, dataset: str, trans: str, input: str) -> str:
    """The name of an experiment that was given none."""
    return f"{model_name}_{process}_{dataset}_{trans}_{input}"


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write config.json: what was trained, and with which settings.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / "config.json.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / "config.json")  # there as a whole or not at all
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error.strerror}): check --logdir") from error


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """The config.json that lies beside a checkpoint, or None where none does.

    Raises:
        UserError: it holds something else than what `write_record` writes.
    """
    path = checkpoint.parent / "config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore it, or train again") from error


# What may change while an experiment goes on: where its data lie, how long it trains, what it shows on the way.
_FREE = (
    "config.data.data_dir",
    "config.score_model.sampling.",
    "config.score_model.training.iterations",
    "config.score_model.training.log_interval",
    "config.score_model.training.save_interval",
    "config.score_model.training.keep_last",
)
# What earlier versions did not record: an experiment that says nothing of it goes on with any.
_NOT_ALWAYS_KNOWN = ("data.grid.",)


def refuse_other_settings(directory: Path, record: Mapping[str, Any]) -> None:
    """Hold training that goes on in `directory` to the settings that it began with.

    Raises:
        UserError: there is a checkpoint, and its config.json says otherwise than `record`; all keys are named.
    """
    checkpoint = next(directory.glob("opt*.pt"), None)
    before = read_record(checkpoint) if checkpoint else None
    if before is None:
        return
    began_with = dict(leaves(before))
    now = dict(leaves(json.loads(json.dumps(record))))  # tuples become lists, as they are in the file
    others = [
        f"{key}={began_with.get(key)}, not {value}"
        for key, value in now.items()
        if not key.startswith(_FREE)
        and began_with.get(key) != value
        and not (key.startswith(_NOT_ALWAYS_KNOWN) and began_with.get(key) is None)
    ]
    if others:
        raise UserError(
            f"{directory} was begun with {'; '.join(others)}: go on with the same, "
            "give another --experiment_name, or start anew with --overwrite"
        )


def require_name(flag: str, name: str) -> str:
    """`name`, if it is that of something in a folder and not a way out of it.

    Raises:
        UserError: it is not.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(
            f"{flag} {name!r} is not a plain name: leave out slashes and dots that lead elsewhere"
        )
    return name


def lock(directory: Path) -> IO:
    """Keep other processes from training in `directory`, which is made, for as long as the result is open.

    The system takes the lock back from a process that ends, however it ends.

    Raises:
        UserError: another process has the lock, or the folder cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another process is training in {directory}: wait for it, or give another --experiment_name"
        ) from error
    except OSError as error:
        raise UserError(f"{directory} cannot be written to ({error.strerror}): check --logdir") from error
    return file


def pull_to_resume(experiments: Folder, name: str, keep_last: int) -> None:
    """Fetch what training goes on from: its figures, and of the checkpoints those that it may need or remove."""
    saved = sorted(fnmatch.filter(experiments.names(name), "opt*.pt"), key=_steps)
    newest = [opt.replace("opt", "*") for opt in saved[-2:]]  # the other one, in case that one is damaged
    checkpoints = ["*.pt"] if keep_last else newest
    experiments.pull(name, "config.json", "log.txt", "progress.csv", *checkpoints)


def remove_experiment(experiments: Folder, name: str) -> None:
    """Remove all that training wrote into a folder of `experiments`, and nothing else."""
    written = (  # in the order in which they go: no set is taken for whole once this has begun
        "opt[0-9]*.pt",
        "opt[0-9]*.pt.tmp",
        "model[0-9]*.pt",
        "model[0-9]*.pt.tmp",
        "ema_[0-9]*_[0-9]*.pt",
        "ema_[0-9]*_[0-9]*.pt.tmp",
        "config.json",
        "config.json.tmp",
        "progress.csv",
        "progress.csv.tmp",
        "log.txt",
        "events.out.tfevents.*",
    )
    for pattern in written:
        for path in (experiments.local / name).glob(pattern):
            path.unlink()
    experiments.remove(name, *written)


def describe_run(device: torch.device) -> dict[str, Any]:
    """What a run was: its command line, code, versions, device and beginning, for config.json."""
    packages = ("torch", "monai", "numpy")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _git(*command: str) -> str | None:
    """What git says of this code, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a nested config as (dotted key, value)."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def newest_ema(experiments: Folder, name: str) -> Path:
    """The EMA weights of an experiment after the most steps, pulled with its config.json where that is needed.

    Raises:
        UserError: there is no such experiment, or it has saved nothing yet.
    """
    saved = fnmatch.filter(experiments.names(name), "ema_*_*.pt")
    experiments.pull(name, "config.json", *sorted(saved, key=_steps)[-1:])
    logdir, directory = experiments.local, experiments.local / name
    if not directory.is_dir():
        there = [path.name for path in logdir.iterdir() if path.is_dir()] if logdir.is_dir() else []
        raise UserError(f"no experiment {name!r} in {logdir}{did_you_mean(name, there)}; train it first")
    checkpoints = list(directory.glob("ema_*_*.pt"))
    if not checkpoints:
        raise UserError(f"experiment {name!r} has no EMA checkpoint in {directory}; train it first")
    return max(checkpoints, key=_steps)


def trained_steps(checkpoint: Path) -> int | None:
    """The training steps that a checkpoint's name tells, or None where it tells none."""
    found = re.search(r"(\d+)\.pt$", checkpoint.name)
    return int(found[1]) if found else None


def _steps(checkpoint: Path | str) -> int:
    return trained_steps(Path(checkpoint)) or 0


def load_weights(network: nn.Module, checkpoint: Path) -> None:
    """Load a bare state dict into `network`.

    Raises:
        UserError: the file is not there, is no state dict, or fits another network.
    """
    if not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}")
    try:
        if zipfile.is_zipfile(checkpoint):
            with zipfile.ZipFile(checkpoint) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0].rstrip(":")
        raise UserError(
            f"{checkpoint} does not fit the network that the config describes ({reason})"
        ) from error

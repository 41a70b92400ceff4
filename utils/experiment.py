"""Names of experiments, and config.json, the record in each experiment's and each test run's folder."""

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .cli import UserError
from .files import write_atomically, writing
from .records import EXPERIMENT, read_json

RECORD = "config.json"
RESULTS = "results"  # folder of test runs, next to the experiments
# Settings that may change when training resumes: data folder, training length, logging, saving and all of testing.
_CHANGEABLE = (
    *("config.data.data_dir", "config.deterministic", "config.score_model.sampling.", "config.score_model.scoring."),
    *(f"config.score_model.training.{key}" for key in ("iterations", "log_interval", "save_interval", "keep_last")),
)
# Settings that earlier versions did not record: experiments without them resume with any value.
_NOT_ALWAYS_RECORDED = ("data.grid.", "data.contents.", "config.score_model.baselines.")


def experiment_name(model_name: str, direction: str, dataset: str, trans: str, input: str) -> str:
    """Return the default name of an experiment; `direction` is forward or backward."""
    return f"{model_name}_{direction}_{dataset}_{trans}_{input}"


def require_name(flag: str, name: str) -> str:
    """Return `name` if it can name a file or folder of its own: no path, nothing hidden, not `results`.

    Raises:
        UserError: otherwise; the message names `flag`.
    """
    is_path = name == "" or name.startswith((".", "~")) or "/" in name or "\\" in name
    if is_path or not name.isprintable() or name == RESULTS:
        rules = f"use no slashes or control characters, no leading dot or ~, and not {RESULTS!r}"
        raise UserError(f"{flag} {name!r} is not a plain name: {rules}")
    return name


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write config.json.

    Raises:
        UserError: if it cannot be written.
    """
    with writing(directory, "--logdir"):
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(directory: Path) -> dict[str, Any] | None:
    """Return the contents of a folder's config.json, or None if there is none.

    Raises:
        UserError: if it is damaged.
    """
    path = directory / RECORD
    return read_json(path, EXPERIMENT, "restore it, or train again") if path.is_file() else None


def require_same_settings(directory: Path, record: Mapping[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Make sure that training resumes with the settings it was started with.

    Keys that begin with one of `unused` may differ, since the method does not use them.

    Raises:
        UserError: if the experiment's config.json differs from `record`; the message names all differing keys.
    """
    if (record_before := read_record(directory)) is None:
        return
    before = dict(flatten(record_before))
    now = dict(flatten(json.loads(json.dumps(record))))  # tuples become lists, as in the file
    changed = [
        f"{key}={before.get(key)}, not {value}"
        for key, value in now.items()
        if not key.startswith((*_CHANGEABLE, *unused))
        and before.get(key) != value
        and not (key.startswith(_NOT_ALWAYS_RECORDED) and before.get(key) is None)
    ]
    if changed:
        remedy = "resume with the same settings, choose another --experiment_name, or start over with --overwrite"
        raise UserError(f"{directory} was started with {'; '.join(changed)}: {remedy}")


def describe_run(device: torch.device) -> dict[str, Any]:
    """Return the command line, code and package versions, device and start time of this run, for config.json."""
    packages = {name: version(name) for name in ("torch", "monai", "numpy")}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    on_cpu = f"cpu, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
        "versions": {"python": platform.python_version(), **packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _git(*command: str) -> str | None:
    """Return the output of a git command in this repository, or None without git or a repository."""
    try:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a nested config as (dotted key, value)."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

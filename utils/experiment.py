"""The names of experiments, and the record that each keeps of itself in its config.json."""

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
from .files import write_whole, writing
from .records import EXPERIMENT, read_json

RECORD = "config.json"
RESULTS = "results"  # the folder of test runs, beside the experiments
# Settings that may change when training resumes: the folder of the data, the length of training, logging and saving.
_FREE = (
    *("config.data.data_dir", "config.deterministic", "config.score_model.sampling.", "config.score_model.scoring."),
    *(f"config.score_model.training.{key}" for key in ("iterations", "log_interval", "save_interval", "keep_last")),
)
# What earlier versions did not record: an experiment without it resumes with any value.
_NOT_ALWAYS_KNOWN = ("data.grid.", "config.score_model.baselines.")


def experiment_name(model_name: str, direction: str, dataset: str, trans: str, input: str) -> str:
    """The default name of an experiment; `direction` is forward or backward."""
    return f"{model_name}_{direction}_{dataset}_{trans}_{input}"


def require_name(flag: str, name: str) -> str:
    """`name`, if it names something in a folder and does not lead out of it; a UserError otherwise.

    Nor may it be what a shell, a listing or this project reads as something else: `~`, `.lock`, `results`.
    """
    leads_elsewhere = name == "" or name.startswith((".", "~")) or "/" in name or "\\" in name
    if leads_elsewhere or not name.isprintable() or name == RESULTS:
        raise UserError(
            f"{flag} {name!r} is not a plain name: leave out slashes, control characters and a dot or ~ in front, "
            f"and do not call it {RESULTS}"
        )
    return name


def write_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Write config.json: what was trained or tested, and with which settings; a UserError if that is impossible."""
    with writing(directory, "--logdir"):
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / RECORD, json.dumps(record, indent=2) + "\n")


def read_record(directory: Path) -> dict[str, Any] | None:
    """The config.json in a folder, None where there is none; a UserError if `write_record` did not write it."""
    path = directory / RECORD
    return read_json(path, EXPERIMENT, "restore it, or train again") if path.is_file() else None


def refuse_other_settings(directory: Path, record: Mapping[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Refuse to resume training with other settings than those it was begun with.

    Args:
        directory: of the experiment.
        record: the settings now.
        unused: beginnings of keys that may differ because the method has no use for them.

    Raises:
        UserError: if the experiment's config.json differs from `record`; the message names all differing keys.
    """
    before = read_record(directory)
    if before is None:
        return
    began_with = dict(flatten(before))
    free = (*_FREE, *unused)
    now = dict(flatten(json.loads(json.dumps(record))))  # tuples become lists, as they are in the file
    others = [
        f"{key}={began_with.get(key)}, not {value}"
        for key, value in now.items()
        if not key.startswith(free)
        and began_with.get(key) != value
        and not (key.startswith(_NOT_ALWAYS_KNOWN) and began_with.get(key) is None)
    ]
    if others:
        raise UserError(
            f"{directory} was begun with {'; '.join(others)}: go on with the same, "
            "give another --experiment_name, or start over with --overwrite"
        )


def describe_run(device: torch.device) -> dict[str, Any]:
    """What a run was, for config.json: its command line, code, versions, device and start."""
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
    """What git says of this code, or None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a nested config as (dotted key, value)."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

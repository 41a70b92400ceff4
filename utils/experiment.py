"""What an experiment is called, what it says of itself, and where its weights lie."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cli import UserError, did_you_mean


def experiment_name(model_name: str, process: str, dataset: str, trans: str, input: str) -> str:
    """The name of an experiment that was given none."""
    return f"{model_name}_{process}_{dataset}_{trans}_{input}"


def write_record(directory: Path, record: dict[str, Any]) -> None:
    """Write config.json: what was trained, and with which settings."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """The config.json that lies beside a checkpoint, or None where none does."""
    path = checkpoint.parent / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def newest_ema(logdir: Path, name: str) -> Path:
    """The EMA weights of an experiment after the most steps.

    Raises:
        UserError: there is no such experiment, or it has saved nothing yet.
    """
    directory = logdir / name
    if not directory.is_dir():
        there = [path.name for path in logdir.iterdir() if path.is_dir()] if logdir.is_dir() else []
        raise UserError(f"no experiment {name!r} in {logdir}{did_you_mean(name, there)}; train it first")
    checkpoints = list(directory.glob("ema_*_*.pt"))
    if not checkpoints:
        raise UserError(f"experiment {name!r} has no EMA checkpoint in {directory}; train it first")
    return max(checkpoints, key=trained_steps)


def trained_steps(checkpoint: Path) -> int:
    """The training steps that a checkpoint's name tells, or −1 where it tells none."""
    found = re.search(r"(\d+)\.pt$", checkpoint.name)
    return int(found[1]) if found else -1


def load_weights(network: nn.Module, checkpoint: Path) -> None:
    """Load a bare state dict into `network`.

    Raises:
        UserError: the file is not there, is no state dict, or fits another network.
    """
    if not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}")
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:
        reason = str(error).strip().splitlines()[0].rstrip(":")
        raise UserError(
            f"{checkpoint} does not fit the network that the config describes ({reason})"
        ) from error

"""Training logs of an experiment: log.txt, progress.csv and TensorBoard events."""

import contextlib
import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.files import write_atomically

from . import dist_util


def create_logger(directory: Path) -> "Logger | NullLogger":
    """Return a logger that writes and prints on rank 0, and does nothing on the others."""
    return Logger(directory) if dist_util.rank() == 0 else NullLogger()


class NullLogger:
    """`Logger` that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


class Logger:
    """Logger that appends to the files in an experiment's folder, creating it if needed."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._log = (directory / "log.txt").open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._progress_path = directory / "progress.csv"
        self._directory = directory
        self._events = SummaryWriter(str(directory))

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`, from which training resumes."""
        if not self._progress_path.exists():
            return
        # Read bytes: after a crash, the last row may hold anything.
        header, *rows = self._progress_path.read_bytes().splitlines(keepends=True) or [b""]
        steps = ((row, row.partition(b",")[0]) for row in rows if row.endswith(b"\n"))
        kept = [row for row, number in steps if number.isdigit() and int(number) <= step]
        if kept:
            write_atomically(self._progress_path, b"".join([header, *kept]))
        else:
            self._progress_path.unlink()
        self._events.close()
        self._events = SummaryWriter(str(self._directory), purge_step=step + 1)

    def info(self, message: str) -> None:
        """Print a message, above a running progress bar, and append it to log.txt."""
        tqdm.write(message)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a row to progress.csv and log it to TensorBoard; every call must pass the same keys."""
        new = not self._progress_path.exists()
        with self._progress_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Log a greyscale image, float [H, W] in [0, 1], to TensorBoard."""
        self._events.add_image(name, image, step, dataformats="HW")
        self._events.flush()

    def close(self) -> None:
        """Flush and close all files, ignoring disk errors, which would mask the one that ended the run."""
        for file in (self._events, self._log):
            with contextlib.suppress(OSError):
                file.close()

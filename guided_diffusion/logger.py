"""What one experiment writes while it runs: log.txt, progress.csv and TensorBoard events."""

import contextlib
import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.files import write_whole

from . import dist_util


def create_logger(directory: Path) -> "Logger | Silence":
    """Of several processes only the first writes files and prints."""
    return Logger(directory) if dist_util.rank() == 0 else Silence()


class Silence:
    """A `Logger` that does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: None


class Logger:
    """Appends to the files in an experiment's folder, which is made if needed."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._log = (directory / "log.txt").open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._progress_path = directory / "progress.csv"
        self._directory = directory
        self._events = SummaryWriter(str(directory))

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: training resumes there and logs them again."""
        if not self._progress_path.exists():
            return
        # Bytes, since a machine that crashed may have left anything in the last row.
        header, *rows = self._progress_path.read_bytes().splitlines(keepends=True) or [b""]
        steps = ((row, row.partition(b",")[0]) for row in rows if row.endswith(b"\n"))
        kept = [row for row, of in steps if of.isdigit() and int(of) <= step]
        if kept:
            write_whole(self._progress_path, b"".join([header, *kept]))
        else:
            self._progress_path.unlink()
        self._events.close()
        self._events = SummaryWriter(str(self._directory), purge_step=step + 1)

    def info(self, message: str) -> None:
        """Print a message (above a running progress bar) and add it to log.txt."""
        tqdm.write(message)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row of progress.csv, and the same figures to TensorBoard; the keys are alike in every call."""
        new = not self._progress_path.exists()
        with self._progress_path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A grey image to TensorBoard: float [H, W] in [0, 1]."""
        self._events.add_image(name, image, step, dataformats="HW")
        self._events.flush()

    def close(self) -> None:
        """Flush and close all files, as far as the disk lets it: an error here must not hide why a run ended."""
        for file in (self._events, self._log):
            with contextlib.suppress(OSError):
                file.close()

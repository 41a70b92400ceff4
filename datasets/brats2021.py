"""PyTorch dataset of the slices that brats_preprocess.py wrote, kept in memory if they fit."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.contrib.concurrent import thread_map

from datasets.cohorts import MASKS, suggest_modality
from datasets.records import read_preprocessing
from utils.cli import UserError
from utils.device import available_cores, available_memory

# NumPy reads headers with Python's parser, which can fail with a SystemError in two threads at a time (Python 3.11).
PARSING = Lock()
MAX_INTENSITY = 1e4  # normalised intensities are far smaller: a larger value means a damaged file


class BraTS2021Dataset(Dataset):
    """Slices of one split, each a dict with `name` and a tensor [1, image_size, image_size] per kind.

    Images are float32 (background −3), resized with antialiasing. `seg` (lesion or not) and `brainmask` are bool,
    resized by nearest neighbour. `name` is "{subject}_{slice}". Slices are kept in memory if the copies of all
    processes fit into half of what is available; otherwise they are read on demand, ideally by `workers` processes.

    Args:
        data_dir: output folder of brats_preprocess.py.
        split: train, val or test.
        kinds: modalities, `seg`, `brainmask`.
        image_size: height and width of the returned slices, px.
        processes: number of processes on this machine that hold such a dataset.
        progress: show a progress bar while reading.
        keep: keep the slices in memory if they fit. Otherwise all are read once, to check them, and again on demand.

    Raises:
        UserError: if the split or a kind is missing, the kinds do not have the same slices, or a file is damaged.
    """

    def __init__(
        self,
        data_dir: Path | str,
        split: str,
        kinds: Sequence[str],
        image_size: int,
        processes: int = 1,
        progress: bool = True,
        keep: bool = True,
    ):
        folder = Path(data_dir) / split
        self.files, self.kinds, self.image_size = find_slices(folder, kinds), kinds, image_size
        pixel_bytes = sum(1 if kind in MASKS else 4 for kind in kinds)
        needed = processes * len(self.files) * image_size**2 * pixel_bytes
        available = available_memory()
        fits = needed <= available / 2
        self.workers = 0 if fits else max(1, min(8, available_cores() // processes))
        storage = "kept in memory" if fits else "read from disk on demand"
        storage = f", {storage} ({needed / 1e9:.3f} of {available / 1e9:.3f} GB)" if keep else ""
        print(f"{split}: {len(self.files)} slices{storage}")
        # Open every file even if none is kept, so that truncated files and wrong shapes are found at the start.
        check = self._open if keep else self._read
        read = self._read if fits and keep else lambda files: check(files) and None
        try:
            slices = thread_map(read, self.files, disable=not progress, desc=f"reading {split}", unit="slice")
        except ValueError as error:
            raise UserError(f"a slice in {folder} cannot be read ({error}): preprocess again") from error
        self._in_memory = slices if fits and keep else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._in_memory[index]) if self._in_memory else self._read(self.files[index])

    def _read(self, files: Mapping[str, str]) -> dict[str, Any]:
        item: dict[str, Any] = {"name": files["name"]}
        for kind, array in self._open(files).items():
            if kind not in MASKS and not np.abs(array).max() <= MAX_INTENSITY:
                raise ValueError(f"{files[kind]} holds values that are not finite or beyond ±{MAX_INTENSITY:g}")
            resize = resize_mask if kind in MASKS else resize_image
            item[kind] = resize(torch.from_numpy(np.array(array, dtype=np.float32))[None], self.image_size)
        return item

    def _open(self, files: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Memory-map the arrays of a slice, and check that they are numeric and [H, W] of one size."""
        arrays = {}
        for kind in self.kinds:
            try:
                with PARSING:
                    arrays[kind] = np.load(files[kind], mmap_mode="r")
                if arrays[kind].dtype.kind not in "biuf":
                    raise ValueError(f"values of type {arrays[kind].dtype}")
            except Exception as error:  # NumPy raises many types for damaged or foreign files
                raise ValueError(f"{files[kind]}: {error}") from error
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1 or len(*shapes) != 2:
            listed = ", ".join(f"{kind} {array.shape}" for kind, array in arrays.items())
            raise ValueError(f"slice {files['name']} has shapes {listed}")
        return arrays


def resize_image(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize [1, H, W] to [1, size, size], bilinear with antialiasing."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def resize_mask(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Resize labels [1, H, W] to bool [1, size, size], True where the nearest pixel has a label above 0."""
    return F.interpolate(mask[None], (size, size), mode="nearest-exact")[0] > 0


def fingerprint(data_dir: Path | str, split: str, kinds: Sequence[str]) -> dict[str, Any]:
    """Return the number of slices, a hash of their names and kinds, and the normalisation and grid they share.

    Raises:
        UserError: if the split or a kind is missing, or the kinds do not have the same slices.
    """
    slices = find_slices(Path(data_dir) / split, kinds)
    lines = "\n".join(f"{files['name']} {' '.join(sorted(files))}" for files in slices)
    return {
        "slices": len(slices),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        **read_preprocessing(Path(data_dir)),
    }


def find_slices(folder: Path, kinds: Sequence[str]) -> list[dict[str, str]]:
    """Return the files of every slice in a split's folder, by name: {"name": "{subject}_{slice}", kind: path, …}.

    Raises:
        UserError: if the folder or a kind is missing, or the kinds do not have the same slices.
    """
    if not folder.is_dir():
        raise UserError(f"no slices in {folder}: run datasets/brats_preprocess.py first, or pass another --data_dir")
    available = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names: dict[str, dict[str, str]] = {}
    for kind in kinds:
        if kind not in available:
            hint = f"{suggest_modality(kind, available)} (available: {', '.join(available)})"
            raise UserError(f"no modality {kind!r} in {folder}{hint}; preprocess it first")
        for path in (folder / kind).glob(f"*_{kind}_*.npy"):
            # Split at the last _{kind}_, because a subject's name may contain it, too.
            subject, _, number = path.stem.rpartition(f"_{kind}_")
            names.setdefault(f"{subject}_{number}", {})[kind] = str(path)
    for name, files in names.items():
        if missing := set(kinds) - set(files):
            raise UserError(f"slice {name} in {folder} has no {', '.join(sorted(missing))}: preprocess it again")
    if not names:
        raise UserError(f"no slices in {folder}: preprocess again with subjects for this split")
    return [{"name": name, **names[name]} for name in sorted(names)]

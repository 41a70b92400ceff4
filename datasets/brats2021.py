"""Preprocessed slices as a dataset: the files that brats_preprocess.py wrote, resized, in memory where they fit."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.contrib.concurrent import thread_map

from datasets.cohorts import MASKS, suggest
from datasets.records import read_preprocessing
from utils.cli import UserError
from utils.device import available_cores, available_memory

BEYOND = 1e4  # no normalised intensity is so far from 0


class BraTS2021Dataset(Dataset):
    """Slices of one split, each a dict of tensors [1, image_size, image_size] by kind, and its `name`.

    Images are float32 (normalised by preprocessing: background −3), resized antialiased; `seg` (lesion or not) and
    `brainmask` are bool, resized to the nearest pixel. `name` is "{subject}_{slice}".

    They are kept in memory if the copies of all processes on this machine fit into half of what is available;
    otherwise each is read whenever it is asked for, and `workers` says how many processes should do so.

    Args:
        data_dir: output folder of brats_preprocess.py.
        split: train, val or test.
        kinds: modalities, `seg`, `brainmask`.
        image_size: H = W of what comes out, px.
        processes: how many on this machine have such a dataset.
        progress: show how far reading into memory has come.

    A UserError if the split or a modality is not there, the kinds do not have the same slices, or a file is broken.
    """

    def __init__(
        self,
        data_dir: Path | str,
        split: str,
        kinds: Sequence[str],
        image_size: int,
        processes: int = 1,
        progress: bool = True,
    ):
        folder = Path(data_dir) / split
        self.files, self.kinds, self.image_size = find_slices(folder, kinds), kinds, image_size
        pixel_bytes = sum(1 if kind in MASKS else 4 for kind in kinds)
        needed = processes * len(self.files) * image_size**2 * pixel_bytes
        available = available_memory()
        fits = needed <= available / 2
        self.workers = 0 if fits else max(1, min(8, available_cores() // processes))
        kept = "kept in memory" if fits else "read from disk as they are needed"
        print(f"{split}: {len(self.files)} slices, {kept} ({needed / 1e9:.3f} of {available / 1e9:.3f} GB)")
        # A file that is cut off or of another size is found now in any case.
        read = self._read if fits else lambda files: self._open(files) and None
        try:
            found = thread_map(read, self.files, disable=not progress, desc=f"reading {split}", unit="slice")
        except ValueError as error:
            raise UserError(f"a slice in {folder} cannot be read ({error}): preprocess again") from error
        self._kept = found if fits else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._kept[index]) if self._kept else self._read(self.files[index])

    def _read(self, files: Mapping[str, str]) -> dict[str, Any]:
        item: dict[str, Any] = {"name": files["name"]}
        for kind, array in self._open(files).items():
            if kind not in MASKS and not np.abs(array).max() <= BEYOND:
                raise ValueError(f"{files[kind]} holds values that are not finite, or beyond ±{BEYOND:g}")
            resize = resize_mask if kind in MASKS else resize_image
            item[kind] = resize(torch.from_numpy(np.array(array, dtype=np.float32))[None], self.image_size)
        return item

    def _open(self, files: Mapping[str, str]) -> dict[str, np.ndarray]:
        """The arrays of a slice, not yet read; a ValueError if one is broken, or they are not [H, W] of one size."""
        arrays = {}
        for kind in self.kinds:
            try:
                arrays[kind] = np.load(files[kind], mmap_mode="r")
                if arrays[kind].dtype.kind not in "biuf":
                    raise ValueError(f"values of type {arrays[kind].dtype}")
            except Exception as error:  # whatever NumPy makes of a file that is damaged or another's
                raise ValueError(f"{files[kind]}: {error}") from error
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1 or len(*shapes) != 2:
            told = ", ".join(f"{kind} {array.shape}" for kind, array in arrays.items())
            raise ValueError(f"slice {files['name']} has shapes {told}")
        return arrays


def resize_image(image: torch.Tensor, size: int) -> torch.Tensor:
    """Antialiased bilinear, [1, H, W] to [1, size, size]."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def resize_mask(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Labels [1, H, W] to whether there is one at the nearest pixel, bool [1, size, size]."""
    return F.interpolate(mask[None], (size, size), mode="nearest-exact")[0] > 0


def fingerprint(data_dir: Path | str, split: str, kinds: Sequence[str]) -> dict[str, Any]:
    """How many slices a dataset has, a hash of their names and kinds, how they were normalised, and their grid.

    It is the same for the same set of files anywhere. A UserError as from `BraTS2021Dataset`, except for broken files.
    """
    slices = find_slices(Path(data_dir) / split, kinds)
    lines = "\n".join(f"{files['name']} {' '.join(sorted(files))}" for files in slices)
    return {
        "slices": len(slices),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        **read_preprocessing(Path(data_dir)),
    }


def find_slices(folder: Path, kinds: Sequence[str]) -> list[dict[str, str]]:
    """The files of every slice in a split's folder, sorted by name: {"name": "{subject}_{slice}", kind: path, …}.

    A UserError as from `BraTS2021Dataset`, except for broken files.
    """
    if not folder.is_dir():
        raise UserError(f"no slices in {folder}: run datasets/brats_preprocess.py first, or name --data_dir")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names: dict[str, dict[str, str]] = {}
    for kind in kinds:
        if kind not in there:
            hint = suggest(kind, there)
            raise UserError(
                f"no modality {kind!r} in {folder}{hint} (there are: {', '.join(there)}); preprocess it too"
            )
        for path in (folder / kind).glob(f"*_{kind}_*.npy"):
            # The last one is that of the kind: a subject may be called so, too.
            subject, _, number = path.stem.rpartition(f"_{kind}_")
            names.setdefault(f"{subject}_{number}", {})[kind] = str(path)
    for name, files in names.items():
        if missing := set(kinds) - set(files):
            raise UserError(f"slice {name} in {folder} has no {', '.join(sorted(missing))}: preprocess it again")
    if not names:
        raise UserError(f"no slices in {folder}: preprocess again with subjects for this split")
    return [{"name": name, **names[name]} for name in sorted(names)]

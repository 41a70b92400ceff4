"""PyTorch dataset of the slices that brats_preprocess.py wrote, kept in memory if they fit."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from io import BytesIO
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm.contrib.concurrent import thread_map

from datasets.cohorts import MASKS, SPLITS, suggest_modality
from datasets.quality import require_normalised
from datasets.records import AGAIN, load_records, read_preprocessing
from utils.cli import UserError
from utils.device import available_cores, available_memory

# NumPy reads headers with Python's parser, which can fail with a SystemError in two threads at a time (Python 3.11).
PARSING = Lock()


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

    Attributes:
        fingerprint: `slices`, their number; `sha256`, a hash of their names; `contents`, one of the files of each
            kind; and their `normalisation` and `grid`, as from `read_preprocessing`.

    Raises:
        UserError: if the split or a kind is missing, the kinds do not have the same slices, a subject is in another
            split, too, or a file is damaged or no such slice.
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
        folder, kinds = Path(data_dir) / split, list(dict.fromkeys(kinds))
        self.files, self.kinds, self.image_size = find_slices(folder, kinds), kinds, image_size
        pixel_bytes = sum(1 if kind in MASKS else 4 for kind in kinds)
        needed = processes * len(self.files) * image_size**2 * pixel_bytes
        available = available_memory()
        fits = needed <= available / 2
        self.workers = 0 if fits else max(1, min(8, available_cores() // processes))
        storage = "kept in memory" if fits else "read from disk on demand"
        storage = f", {storage} ({needed / 1e9:.3f} of {available / 1e9:.3f} GB)" if keep else ""
        print(f"{split}: {len(self.files)} slices{storage}")

        def load(files: Mapping[str, str]) -> tuple[dict | None, tuple[int, ...], list[int]]:
            arrays, contents = self._open(files)
            item = self._resize(files["name"], arrays) if fits and keep else None
            return item, arrays[kinds[0]].shape, [zlib.crc32(content) for content in contents]

        # Read every file even if none is kept, so that damaged and foreign files are found at the start.
        try:
            found = thread_map(load, self.files, disable=not progress, desc=f"reading {split}", unit="slice")
            items, shapes, checksums = zip(*found, strict=True)
            if len(different := dict(zip(shapes, self.files, strict=True))) > 1:
                listed = ", ".join(f"{files['name']} {shape}" for shape, files in different.items())
                raise ValueError(f"shapes differ: {listed}")
        except ValueError as error:
            raise UserError(f"a slice in {folder} cannot be read ({error}): {AGAIN}") from error
        self._in_memory = items if fits and keep else None
        names = "\n".join(f"{files['name']} {' '.join(sorted(files))}" for files in self.files)
        self.fingerprint = {
            "slices": len(self.files),
            "sha256": sha256(names.encode()).hexdigest(),
            "contents": {
                kind: sha256(str(of_kind).encode()).hexdigest()
                for kind, of_kind in zip(kinds, zip(*checksums, strict=True), strict=True)
            },
            **read_preprocessing(Path(data_dir), records := load_records(Path(data_dir))),
        }
        written = {path: crc for record in records.values() if record for path, crc in record.crc32.items()}
        paths = [f"{split}/{kind}/{Path(files[kind]).name}" for files in self.files for kind in kinds]
        changed = [path for path, crc in zip(paths, chain(*checksums), strict=True) if written.get(path, crc) != crc]
        if changed and progress:
            print(f"warning: slices changed since they were preprocessed: {len(changed)}, first {changed[0]}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._in_memory:
            return dict(self._in_memory[index])
        return self._resize(self.files[index]["name"], self._open(self.files[index])[0])

    def _resize(self, name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        item: dict[str, Any] = {"name": name}
        for kind, array in arrays.items():
            resize = resize_mask if kind in MASKS else resize_image
            item[kind] = resize(torch.from_numpy(array.astype(np.float32, copy=False))[None], self.image_size)
        return item

    def _open(self, files: Mapping[str, str]) -> tuple[dict[str, np.ndarray], list[bytes]]:
        """Return the arrays of a slice and its files' contents, and check that preprocessing can have made them."""
        arrays, contents = {}, []
        for kind in self.kinds:
            try:
                contents.append(Path(files[kind]).read_bytes())  # faster than mapping the file into memory
                with PARSING:
                    arrays[kind] = np.load(BytesIO(contents[-1]))
                require_normalised(kind, arrays[kind])
            except Exception as error:  # NumPy raises many types for damaged or foreign files
                raise ValueError(f"{files[kind]}: {error}") from error
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) > 1 or len(*shapes) != 2:
            listed = ", ".join(f"{kind} {array.shape}" for kind, array in arrays.items())
            raise ValueError(f"slice {files['name']} has shapes {listed}")
        return arrays, contents


def resize_image(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize [1, H, W] to [1, size, size], bilinear with antialiasing."""
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def resize_mask(mask: torch.Tensor, size: int) -> torch.Tensor:
    """Resize labels [1, H, W] to bool [1, size, size], True where the nearest pixel has a label above 0."""
    return F.interpolate(mask[None], (size, size), mode="nearest-exact")[0] > 0


def find_slices(folder: Path, kinds: Sequence[str]) -> list[dict[str, str]]:
    """Return the files of every slice in a split's folder, by name: {"name": "{subject}_{slice}", kind: path, …}.

    Raises:
        UserError: if the folder or a kind is missing, the kinds do not have the same slices, or a subject is in another
            split, too.
    """
    if not folder.is_dir():
        raise UserError(f"no slices in {folder}: run datasets/brats_preprocess.py first, or pass another --data_dir")
    available = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names: dict[str, dict[str, str]] = {}
    for kind in kinds:
        if kind not in available:
            hint = f"{suggest_modality(kind, available)} (available: {', '.join(available)})"
            raise UserError(f"no modality {kind!r} in {folder}{hint}; preprocess it first")
        for subject, number, path in list_slices(folder, kind):
            names.setdefault(f"{subject}_{number}", {})[kind] = str(path)
    for name, files in names.items():
        if missing := set(kinds) - set(files):
            raise UserError(f"slice {name} in {folder} has no {', '.join(sorted(missing))}: preprocess it again")
    if not names:
        raise UserError(f"no slices in {folder}: preprocess again with subjects for this split")
    subjects = {name.rpartition("_")[0] for name in names}
    for other in (folder.with_name(split) for split in SPLITS if split != folder.name):
        if shared := sorted(subjects.intersection(subject for subject, *_ in list_slices(other, kinds[0]))):
            raise UserError(f"{shared[0]} is both in {folder} and in {other}: {AGAIN}, or remove it from one")
    return [{"name": name, **names[name]} for name in sorted(names)]


def list_slices(folder: Path, kind: str) -> Iterator[tuple[str, str, Path]]:
    """Yield the subject, the number and the path of each slice of a kind in a split's folder."""
    for path in (folder / kind).glob(f"*_{kind}_*.npy"):
        # Split at the last _{kind}_, because a subject's name may contain it, too.
        subject, _, number = path.stem.rpartition(f"_{kind}_")
        yield subject, number, path

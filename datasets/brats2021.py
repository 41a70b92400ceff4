"""Preprocessed slices as a dataset: the files that brats_preprocess.py wrote, resized and kept in memory."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import CacheDataset
from monai.transforms import Compose, EnsureChannelFirstd, Lambdad, LoadImaged, SelectItemsd, Transform

from datasets.records import read_normalisation
from utils.cli import UserError, did_you_mean

MASKS = ("seg", "brainmask")


class BraTS2021Dataset(CacheDataset):
    """Slices of one split, each a dict of tensors [1, image_size, image_size] by kind, and its `name`.

    Images are float32 (normalised by preprocessing: background −3), resized antialiased; `seg` (lesion or not) and
    `brainmask` are bool, resized to the nearest pixel. `name` is "{subject}_{slice}".

    Args:
        data_dir: output folder of brats_preprocess.py.
        split: train, val or test.
        kinds: modalities, `seg`, `brainmask`.
        image_size: H = W of what comes out, px.

    Raises:
        UserError: the split or a modality is not there, the kinds do not have the same slices, or a file is broken.
    """

    def __init__(self, data_dir: Path | str, split: str, kinds: Sequence[str], image_size: int):
        slices = find_slices(Path(data_dir) / split, kinds)
        images = [kind for kind in kinds if kind not in MASKS]

        def resize_image(image: torch.Tensor) -> torch.Tensor:
            # MONAI's antialiasing pads with zeros, which would draw a frame into a background of −3.
            size = (image_size, image_size)
            return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]

        def resize_mask(mask: torch.Tensor) -> torch.Tensor:
            return F.interpolate(mask[None], (image_size, image_size), mode="nearest-exact")[0] > 0

        transform = Compose(
            [
                LoadImaged(kinds, reader="NumpyReader"),
                RequireOneShape(kinds),
                EnsureChannelFirstd(kinds, channel_dim="no_channel"),
                Lambdad(kinds, lambda image: image.as_tensor()),
                Lambdad(images, resize_image),
                Lambdad(MASKS, resize_mask, allow_missing_keys=True),
                SelectItemsd([*kinds, "name"]),
            ]
        )
        try:
            super().__init__(slices, transform, num_workers=None, progress=True)
        except RuntimeError as error:  # MONAI's, whatever went wrong
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise UserError(
                f"a slice in {Path(data_dir) / split} cannot be read ({reason}): preprocess again"
            ) from error


def fingerprint(data_dir: Path | str, split: str, kinds: Sequence[str]) -> dict[str, Any]:
    """How many slices a dataset has, a hash of their names and kinds, and how they were normalised.

    It is alike for the same set of files anywhere.

    Raises:
        UserError: as `BraTS2021Dataset`, but for broken files.
    """
    slices = find_slices(Path(data_dir) / split, kinds)
    lines = "\n".join(f"{files['name']} {' '.join(sorted(files))}" for files in slices)
    return {
        "slices": len(slices),
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "normalisation": read_normalisation(Path(data_dir)),
    }


class RequireOneShape(Transform):  # MONAI caches what comes after it only if it is a Transform
    """Let a slice through if all its kinds are images [H, W] of one size.

    Raises:
        ValueError: they are not.
    """

    def __init__(self, kinds: Sequence[str]):
        self.kinds = kinds

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        shapes = {kind: tuple(item[kind].shape) for kind in self.kinds}
        if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
            told = ", ".join(f"{kind} {shape}" for kind, shape in shapes.items())
            raise ValueError(f"slice {item['name']} has shapes {told}")
        return item


def find_slices(folder: Path, kinds: Sequence[str]) -> list[dict[str, str]]:
    """The files of every slice in a split's folder, sorted by name: {"name": "{subject}_{slice}", kind: path, …}.

    Raises:
        UserError: as `BraTS2021Dataset`.
    """
    if not folder.is_dir():
        raise UserError(f"no slices in {folder}: run datasets/brats_preprocess.py first, or name --data_dir")
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names: dict[str, dict[str, str]] = {}
    for kind in kinds:
        if kind not in there:
            hint = did_you_mean(kind, there)
            raise UserError(
                f"no modality {kind!r} in {folder}{hint} (there are: {', '.join(there)}); preprocess it too"
            )
        for path in (folder / kind).glob(f"*_{kind}_*.npy"):
            names.setdefault(path.name.replace(f"_{kind}_", "_").removesuffix(".npy"), {})[kind] = str(path)
    for name, files in names.items():
        if missing := set(kinds) - set(files):
            raise UserError(
                f"slice {name} in {folder} has no {', '.join(sorted(missing))}: preprocess it again"
            )
    if not names:
        raise UserError(f"no slices in {folder}: preprocess again with subjects for this split")
    return [{"name": name, **names[name]} for name in sorted(names)]

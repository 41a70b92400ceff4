"""NIfTI files, read with distrust: a file must have what its header claims before memory is spent on it."""

from __future__ import annotations

import gzip
import logging
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np

from .cli import UserError
from .files import write_whole
from .grid import VoxelGrid

MAX_BYTES = 2**30 + 2**20  # of a file: a header and 512³ voxels of 8 bytes; BraTS has 240 × 240 × 155
CHUNK = 2**20  # bytes read at a time
FORMATS = (nibabel.Nifti1Image, nibabel.Nifti2Image)
HEADER_BYTES = max(image.header_class.sizeof_hdr for image in FORMATS)

# nibabel also logs to stderr what it finds odd in a header; what is wrong is said once, in the error.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)


def read_volume(path: Path) -> tuple[np.ndarray, VoxelGrid]:
    """A volume's intensities, [H, W, D], in the dtype on disk or floats where the header scales them, and its grid.

    A UserError if the file cannot be read, is damaged, or holds anything but one volume of real numbers.
    """
    with plain_errors(path):
        with open_volume(path) as file:
            content = bytearray(file.read(HEADER_BYTES))
            header, n_bytes = parse_header(path, bytes(content))
            # In pieces, so that memory grows with what is really there. A byte more than is claimed shows whether the
            # file goes on, and makes gzip compare its checksum.
            while chunk := file.read(min(CHUNK, max(n_bytes + 1 - len(content), 0))):
                content += chunk
        if len(content) < n_bytes:
            claim = f"its header claims {n_bytes} bytes, but there are {len(content)}"
            raise UserError(f"{path} cannot be read, it is cut off: {claim}")
        if len(content) > n_bytes:
            claim = f"it goes on after the {n_bytes} bytes that its header claims"
            raise UserError(f"{path} cannot be read, it is damaged: {claim}")
        image = image_class_of(header).from_bytes(bytes(content))
        if not np.isfinite(image.affine).all():
            raise UserError(f"{path} lies nowhere in space, its affine is not finite")
        return np.asarray(image.dataobj), VoxelGrid(image.shape, image.affine)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """The volume's header, NIfTI-1 or -2; a UserError as from `read_volume`."""
    with plain_errors(path), open_volume(path) as file:
        return parse_header(path, file.read(HEADER_BYTES))[0]


def write_volume(image: nibabel.Nifti1Image, path: Path) -> None:
    """Write a volume to a .nii or .nii.gz as a whole or not at all, with the same bytes for the same volume.

    An OSError if the file cannot be written.
    """
    data = image.to_bytes()
    # Not nibabel's own .gz, which holds the time of writing.
    write_whole(path, gzip.compress(data, compresslevel=1, mtime=0) if path.suffix == ".gz" else data)


def write_like(header: nibabel.Nifti1Header, voxels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write voxels [H, W, D] in their dtype, in the space, codes and units of the volume of this header and affine.

    `path` ends in .nii or .nii.gz. An OSError if it cannot be written.
    """
    image = image_class_of(header)(voxels, affine, header, dtype=voxels.dtype)
    # The range of grey levels suited the scan, and not this.
    image.header["cal_min"] = image.header["cal_max"] = 0
    image.header.set_intent("none")
    write_volume(image, path)


def checksum(path: Path) -> int:
    """CRC-32 of a volume's uncompressed bytes, which tells two volumes apart; quick where the file is compressed."""
    with plain_errors(path), path.open("rb") as file:
        if path.suffix == ".gz":  # gzip keeps it at the end, before the size
            file.seek(-min(8, path.stat().st_size), 2)
            return int.from_bytes(file.read(4), "little")
        crc = 0
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
        return crc


@contextmanager
def plain_errors(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong in reading into a UserError that names the file, and keep warnings off the screen."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # a broken file raises whatever gzip, zlib, numpy or nibabel stumble over
        reason = " ".join(str(error).split())  # some of nibabel's messages have several lines
        raise UserError(f"{path} cannot be read ({type(error).__name__}, {reason})") from error


def open_volume(path: Path) -> BinaryIO:
    """The file's uncompressed bytes as a stream."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def image_class_of(header: nibabel.Nifti1Header) -> type[nibabel.Nifti1Image]:
    """The kind of image that has such a header."""
    return next(image for image in FORMATS if image.header_class is type(header))


def parse_header(path: Path, head: bytes) -> tuple[nibabel.Nifti1Header, int]:
    """The checked header in a file's first bytes, and how many bytes the whole file must have, uncompressed.

    A UserError for no NIfTI header, other than 3 axes, voxels that are not real numbers, or a size beyond MAX_BYTES.
    """
    header_class = next((f.header_class for f in FORMATS if f.header_class.may_contain_header(head)), None)
    if header_class is None:
        raise UserError(f"{path} cannot be read, it does not begin with a NIfTI header")
    header = header_class(head[: header_class.sizeof_hdr])
    shape = tuple(int(length) for length in header.get_data_shape())
    dtype = header.get_data_dtype()
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"{path} must hold a volume with 3 axes, but its shape is {shape}")
    if dtype.kind not in "iuf":
        raise UserError(f"{path} must hold real numbers, but its voxels are {dtype}")
    if header.get_data_offset() < header.single_vox_offset:
        raise UserError(f"{path} cannot be read, its voxels would begin inside its header")
    n_voxels, offset = math.prod(shape), header.get_data_offset()
    if offset + n_voxels * max(dtype.itemsize, 8) > MAX_BYTES:  # scaled voxels become floats of 8 bytes
        raise UserError(f"{path} claims to hold {' × '.join(map(str, shape))} voxels, too many to be a scan")
    return header, offset + n_voxels * dtype.itemsize

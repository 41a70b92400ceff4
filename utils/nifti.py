"""Reading and writing NIfTI files; memory is allocated for a file's actual data, not for the size its header claims."""

from __future__ import annotations

import gzip
import logging
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from .cli import UserError
from .files import write_atomically
from .grid import VoxelGrid

MAX_BYTES = 2**30 + 2**20  # per uncompressed file: a header and 512³ voxels of 8 bytes; BraTS has 240 × 240 × 155
CHUNK = 2**20  # bytes read at a time
IMAGE_CLASSES = {image.header_class: image for image in (nibabel.Nifti1Image, nibabel.Nifti2Image)}
HEADER_BYTES = max(header_class.sizeof_hdr for header_class in IMAGE_CLASSES)

# Keep nibabel from also logging header problems to stderr: errors that matter are raised.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)


def read_volume(path: Path) -> tuple[np.ndarray, VoxelGrid]:
    """Return a volume's intensities [H, W, D] (dtype as on disk, or float if the header scales them) and its grid.

    Raises:
        UserError: if the file cannot be read, is damaged, or does not hold one 3D volume of real numbers.
    """
    with explain_errors(path):
        with open_volume(path) as file:
            content = bytearray(file.read(HEADER_BYTES))
            header, n_bytes = parse_header(path, bytes(content))
            # In chunks, so that memory grows with the actual data. Reading one byte past the declared size detects
            # trailing data, and makes gzip verify its checksum.
            while chunk := file.read(min(CHUNK, max(n_bytes + 1 - len(content), 0))):
                content += chunk
        if len(content) < n_bytes:
            raise UserError(f"{path} is truncated: it has {len(content)} of the {n_bytes} bytes its header declares")
        if len(content) > n_bytes:
            raise UserError(f"{path} is damaged: it has data after the {n_bytes} bytes its header declares")
        image = IMAGE_CLASSES[type(header)].from_bytes(bytes(content))
        if not np.isfinite(image.affine).all():
            raise UserError(f"{path} is damaged: its affine is not finite")
        return np.asarray(image.dataobj).reshape(shape := image.shape[:3]), VoxelGrid(shape, image.affine)


def read_header(path: Path) -> nibabel.Nifti1Header:
    """Return a volume's header, NIfTI-1 or -2.

    Raises:
        UserError: if the file cannot be read or does not hold one 3D volume of real numbers.
    """
    with explain_errors(path), open_volume(path) as file:
        return parse_header(path, file.read(HEADER_BYTES))[0]


def header_warnings(path: Path) -> list[str]:
    """Return warnings about a volume whose file or header is unusual, and how it is read.

    Raises:
        UserError: as from `read_header`.
    """
    header, gzipped, warned = read_header(path), is_gzipped(path), []
    if gzipped != (path.suffix == ".gz"):
        warned.append(f"the file is {'' if gzipped else 'not '}gzipped, contrary to its name")
    if len(header.get_data_shape()) > 3:
        warned.append("the volume has trailing axes of length 1, which are left out")
    found = {name: _orientation(header, name) for name in ("sform", "qform") if header[f"{name}_code"] > 0}
    if not found:
        axcodes = _orientation(header, "best_affine")
        warned.append(f"the header has no orientation (sform and qform codes are 0); assuming {axcodes}")
    elif len(set(found.values()) - {None}) > 1:
        said = " and ".join(f"{name} {axcodes}" for name, axcodes in found.items())
        warned.append(f"the header contradicts itself ({said}): left and right may be swapped; using sform")
    return warned


def _orientation(header: nibabel.Nifti1Header, name: str) -> str | None:
    """Return the directions of the axes in a header's sform, qform or best_affine, None if they are undefined."""
    with suppress(ValueError, HeaderDataError, np.linalg.LinAlgError), np.errstate(all="ignore"):
        axcodes = nibabel.aff2axcodes(getattr(header, f"get_{name}")())
        return None if None in axcodes else "".join(axcodes)


def write_volume(image: nibabel.Nifti1Image, path: Path) -> None:
    """Write a volume to a .nii or .nii.gz, atomically and with the same bytes for the same volume."""
    data = image.to_bytes()
    # nibabel's own .gz contains the time of writing.
    write_atomically(path, gzip.compress(data, compresslevel=1, mtime=0) if path.suffix == ".gz" else data)


def write_like(header: nibabel.Nifti1Header, voxels: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write voxels [H, W, D] in their dtype to a .nii or .nii.gz, with the orientation codes and units of `header`."""
    image = IMAGE_CLASSES[type(header)](voxels, affine, header, dtype=voxels.dtype)
    # cal_min and cal_max are the display range of the header's own volume.
    image.header["cal_min"] = image.header["cal_max"] = 0
    image.header.set_intent("none")
    write_volume(image, path)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a volume's uncompressed bytes, which a .gz stores.

    Raises:
        UserError: if the file cannot be read.
    """
    with explain_errors(path):
        with path.open("rb") as file:
            file.seek(-min(8, path.stat().st_size), 2)
            stored, n_bytes = file.read(4), file.read(4)
        if is_gzipped(path) and any(n_bytes):  # 0 at the end of a padded .gz and of one that consists of blocks
            return int.from_bytes(stored, "little")
        crc = 0
        with open_volume(path) as file:
            while chunk := file.read(CHUNK):
                crc = zlib.crc32(chunk, crc)
        return crc


def find_copies(paths: Iterable[Path]) -> tuple[Path, Path] | None:
    """Return the first two files that hold the same volume, gzipped or not.

    Files that cannot be read and volumes that are 0 everywhere are skipped.
    """
    found: dict[int, Path] = {}
    for path in paths:
        with suppress(UserError):
            other = found.get(key := checksum(path))
            if other and np.array_equal(read_volume(other)[0], voxels := read_volume(path)[0]) and voxels.any():
                return other, path
            found[key] = path
    return None


@contextmanager
def explain_errors(path: Path) -> Iterator[None]:
    """Turn any error while reading into a UserError that names the file, and suppress warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # gzip, zlib, NumPy and nibabel raise all kinds of errors
        reason = " ".join(str(error).split())  # some of nibabel's messages have several lines
        raise UserError(f"{path} cannot be read ({type(error).__name__}, {reason})") from error


def open_volume(path: Path) -> BinaryIO:
    """Open a stream of the file's uncompressed bytes."""
    return gzip.open(path) if is_gzipped(path) else path.open("rb")


def is_gzipped(path: Path) -> bool:
    """Return whether the file's content is gzipped, whatever its name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def parse_header(path: Path, head: bytes) -> tuple[nibabel.Nifti1Header, int]:
    """Return the validated header in a file's first bytes, and the size that it declares for the uncompressed file.

    Raises:
        UserError: if there is no NIfTI header, or it does not declare one 3D volume of real numbers within MAX_BYTES.
    """
    header_class = next((known for known in IMAGE_CLASSES if known.may_contain_header(head)), None)
    if header_class is None:
        raise UserError(f"{path} cannot be read: it does not start with a NIfTI header")
    header = header_class(head[: header_class.sizeof_hdr])
    shape = tuple(int(length) for length in header.get_data_shape())
    shape = shape[:3] if set(shape[3:]) <= {1} else shape
    dtype = header.get_data_dtype()
    if len(shape) != 3 or min(shape) < 1:
        raise UserError(f"{path} must hold one 3D volume, but its shape is {shape}")
    if dtype.kind not in "iuf":
        raise UserError(f"{path} must hold real numbers, but its voxels are {dtype}")
    if header.get_data_offset() < header.single_vox_offset:
        raise UserError(f"{path} cannot be read: its voxels would start inside its header")
    n_voxels, offset = math.prod(shape), header.get_data_offset()
    if offset + n_voxels * max(dtype.itemsize, 8) > MAX_BYTES:  # scaled voxels become 8-byte floats
        raise UserError(f"{path} declares {' × '.join(map(str, shape))} voxels, too many for a scan")
    return header, offset + n_voxels * dtype.itemsize

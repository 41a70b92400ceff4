"""Reading volumes: any file is refused with a clear error or read as nibabel reads it."""

import gzip
import math
import tracemalloc
import warnings
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.cohorts import read_brats
from datasets.records import find_complete, store
from datasets.subject import Settings, normalise, slice_subject
from utils.cli import UserError
from utils.nifti import (
    MAX_BYTES,
    checksum,
    explain_errors,
    find_copies,
    header_warnings,
    read_header,
    read_volume,
    write_like,
)

SHAPE = (6, 5, 4)
MEMORY = 8 * 2**20  # bytes: the limit for reading a volume of a few hundred bytes; a few chunks
HEADERS = {"nifti1": nibabel.Nifti1Header, "nifti2": nibabel.Nifti2Header}
IMAGES = {"nifti1": nibabel.Nifti1Image, "nifti2": nibabel.Nifti2Image}
DTYPES = (np.uint8, np.int16, np.dtype(">i2"), np.float32, np.float64)


def volume_bytes(version: str, dtype: np.dtype, voxels: np.ndarray | None = None) -> bytes:
    """Return an uncompressed file of a small volume, by default with negative voxels if the dtype allows."""
    if voxels is None:
        voxels = np.random.default_rng(0).integers(-99, 99, SHAPE)
    header = HEADERS[version](endianness=">" if np.dtype(dtype).byteorder == ">" else "<")
    header.set_data_dtype(dtype)
    return IMAGES[version](voxels.astype(dtype), np.diag([1, 2, 3, 1]), header).to_bytes()


# ----------------------------------------------------------------------------------------------------------
# Corrupted files


def numbers(dtype: np.dtype) -> st.SearchStrategy:
    """Draw values of a header field: ordinary, extreme and non-finite ones."""
    if dtype.kind == "f":
        special = [0, 1, -1, 0.5, 352, 400, 1e9, -1e9, 3e38, math.nan, math.inf]
        return st.sampled_from(special) | st.floats(width=32)
    info = np.iinfo(dtype)
    special = [0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 64, 512, 768, 30000, 32767, 2**31 - 1, 2**62, -1]
    sensible = [value for value in special if info.min <= value <= info.max]
    return st.sampled_from([*sensible, int(info.min), int(info.max)]) | st.integers(info.min, info.max)


ORIENTATION = ("sform_code", "qform_code", "srow_x", "srow_z", "quatern_b", "quatern_d", "qoffset_y")


@st.composite
def unusual_header(draw, data: bytes, version: str) -> bytes:
    """Add trailing axes, mostly of length 1, and set the affines and their codes: valid, but for some lengths."""
    header = HEADERS[version](data[: HEADERS[version].sizeof_hdr], check=False)
    for length in draw(st.lists(st.sampled_from((1, 1, 1, 1, 1, 1, 2, 0)), max_size=4)):
        header["dim"][0] += 1
        header["dim"][header["dim"][0]] = length
    for name in draw(st.sets(st.sampled_from(("sform", "qform")))):
        signs = draw(st.lists(st.sampled_from((1, -1)), min_size=3, max_size=3))
        getattr(header, f"set_{name}")(np.diag([*signs, 1]), draw(st.integers(0, 4)))
    return header.binaryblock + data[len(header.binaryblock) :]


@st.composite
def corrupt_header(draw, data: bytes, version: str, dtype: np.dtype) -> bytes:
    """Overwrite some fields of the header, or elements of them."""
    header = HEADERS[version](data[: HEADERS[version].sizeof_hdr], check=False)
    known = ["dim", "datatype", "vox_offset", "scl_slope", "scl_inter", "pixdim", "magic", *ORIENTATION]
    for name in draw(st.lists(st.sampled_from(known + list(header.keys())), min_size=1, max_size=3)):
        field = header.structarr[name]
        if field.dtype.kind == "S":
            header.structarr[name] = draw(st.binary(max_size=field.dtype.itemsize))
        elif field.ndim:
            field[draw(st.integers(0, field.size - 1))] = draw(numbers(field.dtype))
        else:
            header.structarr[name] = draw(numbers(field.dtype))
    return header.binaryblock + data[len(header.binaryblock) :]


@st.composite
def corrupt_bytes(draw, data: bytes, much: int) -> bytes:
    """Change single bytes, truncate the data, or append up to `much` bytes."""
    how = draw(st.sampled_from(["change", "cut", "add"]))
    if how == "cut":
        return data[: draw(st.integers(0, len(data)))]
    if how == "add":
        return data + draw(st.binary(min_size=1, max_size=20) | st.just(bytes(much)))
    corrupted = bytearray(data)
    for place in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        corrupted[place] = draw(st.integers(0, 255))
    return bytes(corrupted)


@st.composite
def files(draw) -> tuple[str, bytes]:
    """Draw the suffix and the bytes of a file that is unusual or corrupted in zero or more ways."""
    version = draw(st.sampled_from(list(HEADERS)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    data = volume_bytes(version, dtype)
    how = draw(st.sets(st.sampled_from(["unusual", "header", "bytes", "gzip"])))
    suffix = draw(st.sampled_from([".nii", ".nii.gz"]))
    if "unusual" in how:
        data = draw(unusual_header(data, version))
    if "header" in how:
        data = draw(corrupt_header(data, version, dtype))
    if "bytes" in how:
        data = draw(corrupt_bytes(data, 2**24))
    if "gzip" not in how:
        return suffix, gzip.compress(data, mtime=0) if draw(st.booleans()) else data
    return suffix, draw(corrupt_bytes(gzip.compress(data, 1, mtime=0), 2**12))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Return a folder with subject A and its valid segmentation; tests write its flair on the same grid."""
    folder = tmp_path_factory.mktemp("subject")
    (folder / "raw/A").mkdir(parents=True)
    seg = volume_bytes("nifti1", np.uint8, np.arange(4) * np.ones(SHAPE) * (np.arange(4) < 2))
    (folder / "raw/A/A_seg.nii").write_bytes(seg)
    return folder / "raw"


SETTINGS = Settings(Path("out"), ("flair",), 0.1, 0.9, 0, 3, max_label=4, shared_grid=True)


outcomes = {"read": 0, "refused": 0, "made": 0, "warned of": 0, "copied": 0}


@settings(max_examples=350, deadline=2000, derandomize=True, database=None)
@given(file=files())
def check_a_file(raw: Path, file: tuple[str, bytes]) -> None:
    suffix, data = file
    path = raw / f"A/A_flair{suffix}"
    for old in path.parent.glob("A_flair*"):
        old.unlink()
    path.write_bytes(data)
    expected = expect_volume(path)
    check_warnings(path, expected is not None)
    check_copies(raw.parent, path, expected)
    check_subject(raw, path, expected)


def expect_volume(path: Path) -> np.ndarray | None:
    """Read a file and compare it with nibabel's result; return None if it is refused."""
    tracemalloc.start()
    try:
        (voxels, grid), refusal = read_volume(path), ""
    except UserError as error:
        refusal = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY
    if refusal:
        assert refusal.startswith(str(path))
        assert "\n" not in refusal
        outcomes["refused"] += 1
        return None
    image = load(path)
    expected = np.asarray(image.dataobj).reshape(image.shape[:3])
    np.testing.assert_array_equal(voxels, expected)
    np.testing.assert_array_equal(grid.affine, image.affine)
    assert voxels.dtype == expected.dtype
    assert image.shape == read_header(path).get_data_shape()
    assert grid.shape == image.shape[:3]
    assert set(image.shape[3:]) <= {1}
    assert np.isfinite(grid.affine).all()
    outcomes["read"] += 1
    return expected


def plain(path: Path) -> bytes:
    """Return the uncompressed bytes of a readable file, whatever its name."""
    data = path.read_bytes()
    return gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data


def load(path: Path) -> nibabel.Nifti1Image:
    """Read a file by nibabel, which relies on the name, from a copy with the right one."""
    copy = path.with_name("copy.nii")
    copy.write_bytes(plain(path))
    image = nibabel.load(copy, mmap=False)
    np.asarray(image.dataobj)
    return image


def check_warnings(path: Path, is_read: bool) -> None:
    """Check that the warnings of a volume that is read name all that is unusual, and that others are refused if any."""
    try:
        warned, refusal = header_warnings(path), ""
    except UserError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(str(path))
    assert not (refusal and is_read)
    if not is_read:
        return
    header = load(path).header
    expected = {
        "gzipped, contrary to its name": path.read_bytes().startswith(b"\x1f\x8b") != (path.suffix == ".gz"),
        "trailing axes of length 1": len(header.get_data_shape()) > 3,
        "no orientation": header["sform_code"] <= 0 and header["qform_code"] <= 0,
        "contradicts itself": contradicts_itself(header),
    }
    assert {part: sum(part in warning for warning in warned) for part in expected} == expected
    assert len(warned) == sum(expected.values())
    outcomes["warned of"] += bool(warned)


def contradicts_itself(header: nibabel.Nifti1Header) -> bool:
    """Return whether both affines of a header are declared and define directions, and these differ."""
    if min(header["sform_code"], header["qform_code"]) <= 0:
        return False
    try:
        codes = [nibabel.aff2axcodes(affine) for affine in (header.get_sform(), header.get_qform())]
    except Exception:  # nibabel and NumPy raise many types for damaged affines
        return False
    return codes[0] != codes[1] and None not in codes[0] + codes[1]


def check_copies(folder: Path, path: Path, expected: np.ndarray | None) -> None:
    """Check that a copy of a volume is found, gzipped or not, if it can be read and is not 0 everywhere."""
    other, data = folder / "other.nii", path.read_bytes()
    other.write_bytes(data if expected is None else plain(path))
    is_scan = expected is not None and expected.any() and not np.isnan(expected).any()
    # A few bytes of padding hide the checksum at the end of a .gz.
    hidden = data.startswith(b"\x1f\x8b") and int.from_bytes(data[-4:], "little") not in (0, other.stat().st_size)
    found = find_copies([path, folder / "missing.nii", other])
    assert found == ((path, other) if is_scan and not hidden else None)
    assert find_copies([path, folder / "raw/A/A_seg.nii"]) is None
    outcomes["copied"] += found is not None


def check_subject(raw: Path, path: Path, expected: np.ndarray | None) -> None:
    """Check that the subject is refused with the name of a file, or that its slices match the volume."""
    try:
        (made_with, slices, *_), refusal = slice_subject(SETTINGS, "train", read_brats(raw).subjects["A"]), ""
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith((str(path), str(path.parent / "A_seg.nii")))
        return
    assert expected is not None
    image = normalise(expected, 0.1, 0.9)
    numbers = [z for z in (0, 2) if expected[:, :, z].any()]  # slice 1 has a tumour
    assert sorted(slices) == sorted(
        f"{kind}/A_{kind}_{z}.npy" for kind in ("flair", "seg", "brainmask") for z in numbers
    )
    for z in numbers:
        assert np.isfinite(slices[f"flair/A_flair_{z}.npy"]).all()
        np.testing.assert_array_equal(slices[f"flair/A_flair_{z}.npy"], image[:, :, z])
        np.testing.assert_array_equal(slices[f"brainmask/A_brainmask_{z}.npy"], expected[:, :, z] != 0)
    assert made_with["volumes"]["flair"] == checksum(path)
    outcomes["made"] += 1


def test_any_file_is_refused_or_read_as_by_nibabel(raw):
    check_a_file(raw)
    assert min(outcomes.values()) > 30, f"one-sided examples: {outcomes}"


# ----------------------------------------------------------------------------------------------------------
# Headers with wrong sizes


def claiming(dim: tuple[int, ...], data: bytes = b"", **fields: object) -> bytes:
    """Return a valid header with the given dimensions and fields, followed by `data`."""
    header = nibabel.Nifti1Header()
    header["magic"], header["vox_offset"] = b"n+1", 352
    header["dim"][: len(dim) + 1] = [len(dim), *dim]
    header["datatype"], header["bitpix"] = 4, 16
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4) + data


CLAIMS = {
    "more than any scan has": (claiming((30000, 30000, 30000)), "30000 × 30000 × 30000"),
    "more by overflow": (claiming((32767, 32767, 4)), "32767 × 32767 × 4"),
    "as much as is allowed": (claiming((512, 512, 512)), "is truncated"),
    "voxels far behind": (claiming((6, 5, 4), vox_offset=1e12), "too many"),
    "voxels behind much": (claiming((6, 5, 4), bytes(2**20), vox_offset=2**29), "is truncated"),
    "less than there is": (claiming((6, 5, 4), bytes(2**27)), "data after"),
    "a little less": (claiming((2, 2, 2), bytes(17)), "data after"),
    "trailing axes that overflow": (claiming((6, 5, 4, 32767, 32767, 32767, 32767)), "one 3D volume"),
    "trailing axes of 1": (claiming((6, 5, 4, 1, 1, 1, 1)), "truncated: it has 352 of the 592 bytes"),
    "trailing axes of 0": (claiming((6, 5, 4, 1, 0)), "one 3D volume"),
    "trailing axes behind axes of 1": (claiming((512, 1, 1, 512, 512)), "one 3D volume"),
    "long extension": (claiming((6, 5, 4), vox_offset=2**29)[:348] + b"\1\0\0\0\xf0\xff\xff\x7f", "is truncated"),
}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_memory_does_not_depend_on_the_size_in_the_header(tmp_path, claim, suffix):
    data, message = CLAIMS[claim]
    path = tmp_path / f"A{suffix}"
    path.write_bytes(gzip.compress(data, 1) if suffix == ".nii.gz" else data)
    tracemalloc.start()
    with pytest.raises(UserError, match=message):
        read_volume(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY


def test_decompression_stops_at_the_size_in_the_header(tmp_path, monkeypatch):
    """The file holds 1 GiB of compressed zeros."""
    path = tmp_path / "A.nii.gz"
    million = gzip.compress(bytes(2**20), 1)
    path.write_bytes(gzip.compress(claiming((6, 5, 4), bytes(240))) + 1024 * million)
    reads = []
    read = gzip.GzipFile.read

    def count(file: gzip.GzipFile, size: int) -> bytes:
        data = read(file, size)
        reads.append(len(data))
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", count)
    with pytest.raises(UserError, match="data after"):
        read_volume(path)
    assert sum(reads) <= 2**20


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("field", ["pixdim", "quatern_b", "srow_x"])
@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_warnings_of_a_damaged_header_raise_no_other_error(tmp_path, wrong, field, codes):
    fields = dict(zip(("sform_code", "qform_code"), codes, strict=True)) | {field: wrong}
    (tmp_path / "A.nii").write_bytes(claiming((6, 5, 4), bytes(240), **fields))
    warned = header_warnings(tmp_path / "A.nii")
    assert sum("no orientation" in warning for warning in warned) == (codes == (0, 0))


@pytest.mark.parametrize(
    ("sform", "qform", "said"),
    [
        (None, None, "the header has no orientation (sform and qform codes are 0); assuming LAS"),
        ((-1, -1, 1), (1, -1, 1), "the header contradicts itself (sform LPS and qform RPS): left and right may be"),
        ((-1, -1, 1), (-1, -1, 1), None),
        ((-1, -1, 1), None, None),
        (None, (1, -1, 1), None),
    ],
)
def test_headers_without_a_clear_orientation_are_warned_about(tmp_path, sform, qform, said):
    image = nibabel.Nifti1Image(np.ones(SHAPE, np.int16), None)
    for name, signs in {"sform": sform, "qform": qform}.items():
        getattr(image, f"set_{name}")(np.diag([*signs, 1]) if signs else None, 1 if signs else 0)
    nibabel.save(image, tmp_path / "A.nii")
    warned = header_warnings(tmp_path / "A.nii")
    assert len(warned) == bool(said)
    assert not said or warned[0].startswith(said)


def test_the_size_limit_allows_the_largest_scans():
    assert 512**3 * 8 < MAX_BYTES < 2**31


# ----------------------------------------------------------------------------------------------------------
# Valid files


@pytest.mark.parametrize("version", HEADERS)
@pytest.mark.parametrize("dtype", [*DTYPES, np.int8, np.uint16, np.int32, np.uint64])
def test_valid_volumes_are_read(tmp_path, version, dtype):
    voxels = np.random.default_rng(1).integers(0, 99, SHAPE)
    data = volume_bytes(version, dtype, voxels)
    (tmp_path / "A.nii").write_bytes(data)
    (tmp_path / "A.nii.gz").write_bytes(gzip.compress(data))
    for name in ("A.nii", "A.nii.gz"):
        found, grid = read_volume(tmp_path / name)
        np.testing.assert_array_equal(found, voxels)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(grid.affine, np.diag([1, 2, 3, 1]))
        assert checksum(tmp_path / name) == zlib.crc32(data)


@pytest.mark.parametrize("end", [bytes(512), gzip.compress(b"", mtime=0)], ids=["padded", "blocks"])
def test_padded_files_and_files_of_blocks_have_the_same_checksum(tmp_path, end):
    """The last bytes of such a .gz are 0, not the checksum of its content; bgzip appends an empty block."""
    data = volume_bytes("nifti1", np.int16)
    (tmp_path / "A.nii.gz").write_bytes(gzip.compress(data[:400]) + gzip.compress(data[400:]) + end)
    (tmp_path / "B.nii").write_bytes(data)
    np.testing.assert_array_equal(*(read_volume(tmp_path / name)[0] for name in ("A.nii.gz", "B.nii")))
    assert checksum(tmp_path / "A.nii.gz") == checksum(tmp_path / "B.nii") == zlib.crc32(data)
    assert find_copies(sorted(tmp_path.iterdir())) == (tmp_path / "A.nii.gz", tmp_path / "B.nii")


def test_a_header_with_an_extension_is_read(tmp_path):
    voxels = np.arange(120, dtype=np.int16).reshape(SHAPE)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"x" * 5000))
    nibabel.save(image, tmp_path / "A.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "A.nii.gz")[0], voxels)


def test_unusual_but_readable_volumes_cause_no_warnings(tmp_path, caplog):
    """nibabel alone would warn of an extension length and log a voxel offset that are not divisible by 16."""
    extension = np.array([24, 6], "<i4").tobytes() + bytes(16)
    data = claiming((6, 5, 4), vox_offset=376)[:348] + b"\1\0\0\0" + extension + bytes(240)
    (tmp_path / "A.nii").write_bytes(data)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert read_volume(tmp_path / "A.nii")[0].shape == SHAPE
    assert not warned
    assert not caplog.records


@pytest.mark.parametrize("version", HEADERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_write_like_preserves_the_geometry(tmp_path, version, dtype):
    affine = np.array([[0, -2, 0, 5], [1, 0, 0, 6], [0, 0, 3, -7], [0, 0, 0, 1.0]])
    header = HEADERS[version](endianness=">" if np.dtype(dtype).byteorder == ">" else "<")
    image = IMAGES[version](np.ones(SHAPE, dtype), affine, header)
    image.set_qform(affine, 3)
    image.set_sform(affine, 2)
    image.header.set_xyzt_units("mm", "msec")
    image.header["cal_max"] = 7
    image.header.set_slope_inter(3, 1)
    nibabel.save(image, tmp_path / "A.nii")
    voxels = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
    header = read_header(tmp_path / "A.nii")
    assert type(header) is HEADERS[version]
    write_like(header, voxels, read_volume(tmp_path / "A.nii")[1].affine, tmp_path / "B.nii.gz")
    assert {path.name for path in tmp_path.iterdir()} == {"A.nii", "B.nii.gz"}
    found = nibabel.load(tmp_path / "B.nii.gz")
    np.testing.assert_array_equal(found.get_fdata(dtype=np.float32), voxels)
    for key in ("sform_code", "qform_code", "srow_x", "srow_y", "quatern_d", "pixdim", "xyzt_units", "magic"):
        np.testing.assert_array_equal(found.header[key], image.header[key])
    assert found.header["cal_max"] == 0
    assert found.header.get_slope_inter() in ((1, 0), (None, None))


def test_write_like_leaves_out_trailing_axes(tmp_path):
    path = tmp_path / "A.nii"
    nibabel.save(nibabel.Nifti1Image(np.ones((*SHAPE, 1, 1), np.int16), np.diag([1, 2, 3, 1])), path)
    voxels = np.random.default_rng(0).uniform(size=SHAPE).astype(np.float32)
    write_like(read_header(path), voxels, read_volume(path)[1].affine, tmp_path / "B.nii")
    found = nibabel.load(tmp_path / "B.nii")
    assert found.header["dim"].tolist() == [3, *SHAPE, 1, 1, 1, 1]
    np.testing.assert_array_equal(found.get_fdata(dtype=np.float32), voxels)


def test_multiline_errors_become_one_line():
    with pytest.raises(UserError) as refusal, explain_errors(Path("A.nii")):
        raise OSError("Expected 8 bytes,\n  got 4")
    assert str(refusal.value) == "A.nii cannot be read (OSError, Expected 8 bytes, got 4)"


def test_negative_voxels_and_unequal_sides_are_preprocessed(tmp_path):
    """Preprocess and store one subject; the fuzz test above covers other files."""
    (tmp_path / "raw/B").mkdir(parents=True)
    voxels = np.random.default_rng(2).integers(-50, 90, (3, 17, 5))
    for kind, volume in {"flair": voxels, "seg": 0 * voxels}.items():
        (tmp_path / f"raw/B/B_{kind}.nii").write_bytes(volume_bytes("nifti1", np.int16, volume))
    made_with, slices, *_ = slice_subject(SETTINGS, "train", read_brats(tmp_path / "raw").subjects["B"])
    for kind in SETTINGS.kinds:
        (tmp_path / "out/train" / kind).mkdir(parents=True)
    (tmp_path / "out/subjects").mkdir()
    record = store(tmp_path / "out", "train", "B", made_with, slices)
    assert find_complete(tmp_path / "out") == {"B": record}
    image = normalise(voxels, 0.1, 0.9)
    for z in range(3):
        np.testing.assert_array_equal(np.load(tmp_path / f"out/train/flair/B_flair_{z}.npy"), image[:, :, z])

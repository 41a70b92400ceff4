"""The dataset of preprocessed slices, and the batches for training and testing."""

import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from datasets.brats2021 import BraTS2021Dataset, find_slices
from datasets.loader import all_slices, step_indices, training_batches
from utils.cli import UserError

SIZE = 48  # of the slices on disk
KINDS = ("flair", "t2", "seg", "brainmask")
SLICES = [("BraTS2021_00007", 71), ("BraTS2021_00002", 80), ("BraTS2021_00007", 70)]
NAMES = ["BraTS2021_00002_80", "BraTS2021_00007_70", "BraTS2021_00007_71"]  # sorted


@pytest.fixture
def arrays() -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """Return noise images, a seg with all labels, and a brain that does not touch the border."""
    rng = np.random.default_rng(0)
    brain = np.zeros((SIZE, SIZE), np.uint8)
    brain[5:41, 9:37] = 1
    made = {kind: {} for kind in KINDS}
    for which in SLICES:
        for kind in ("flair", "t2"):
            made[kind][which] = np.where(brain, rng.uniform(-3, 4, (SIZE, SIZE)), -3).astype(np.float32)
        made["seg"][which] = brain * rng.choice([0, 1, 2, 4], size=(SIZE, SIZE)).astype(np.uint8)
        made["brainmask"][which] = brain
    return made


@pytest.fixture
def data_dir(tmp_path, arrays, write_slices):
    write_slices(tmp_path, "train", arrays)
    return tmp_path


@pytest.fixture
def memory(monkeypatch):
    """Set the available memory, in bytes."""
    return lambda n: monkeypatch.setattr("datasets.brats2021.available_memory", lambda: n)


# ----------------------------------------------------------------------------------------------------------
# The dataset


def test_items_have_the_expected_keys_dtypes_and_shapes(data_dir):
    dataset = BraTS2021Dataset(data_dir, "train", KINDS, 16)
    assert len(dataset) == 3
    for i, name in enumerate(NAMES):
        item = dataset[i]
        assert set(item) == {*KINDS, "name"}
        assert item["name"] == name
        assert {kind: (item[kind].dtype, tuple(item[kind].shape)) for kind in KINDS} == {
            "flair": (torch.float32, (1, 16, 16)),
            "t2": (torch.float32, (1, 16, 16)),
            "seg": (torch.bool, (1, 16, 16)),
            "brainmask": (torch.bool, (1, 16, 16)),
        }


def test_only_requested_kinds_are_loaded(data_dir):
    assert set(BraTS2021Dataset(data_dir, "train", ["t2"], 16)[0]) == {"t2", "name"}


def test_slices_at_their_own_size_are_unchanged(data_dir, arrays):
    dataset = BraTS2021Dataset(data_dir, "train", KINDS, SIZE)
    for i, which in enumerate(sorted(SLICES)):
        np.testing.assert_allclose(dataset[i]["flair"][0], arrays["flair"][which], atol=1e-6)
        np.testing.assert_array_equal(dataset[i]["seg"][0], arrays["seg"][which] > 0)
        np.testing.assert_array_equal(dataset[i]["brainmask"][0], arrays["brainmask"][which] > 0)


@pytest.mark.parametrize("size", [16, 20, 47, 64])
def test_images_are_resized_with_antialiasing(data_dir, arrays, size):
    """Compare with Pillow, whose bilinear filter widens with the scale."""
    dataset = BraTS2021Dataset(data_dir, "train", ["flair"], size)
    for i, which in enumerate(sorted(SLICES)):
        expected = Image.fromarray(arrays["flair"][which]).resize((size, size), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(dataset[i]["flair"][0], np.asarray(expected), atol=1e-5)


@pytest.mark.parametrize("size", [16, 20, 47, 64])
def test_masks_are_resized_to_the_nearest_pixel(data_dir, arrays, size):
    dataset = BraTS2021Dataset(data_dir, "train", KINDS, size)
    nearest = [math.floor((i + 0.5) * SIZE / size) for i in range(size)]
    for i, which in enumerate(sorted(SLICES)):
        for kind in ("seg", "brainmask"):
            expected = arrays[kind][which][np.ix_(nearest, nearest)] > 0
            np.testing.assert_array_equal(dataset[i][kind][0], expected)


@pytest.mark.parametrize("size", [16, 20, 64])
def test_background_stays_constant_up_to_the_border(tmp_path, write_slices, size):
    slice_ = np.full((SIZE, SIZE), -3, np.float32)
    slice_[SIZE // 2, SIZE // 2] = 1
    write_slices(tmp_path, "test", {"flair": {("A", 1): slice_}})
    image = BraTS2021Dataset(tmp_path, "test", ["flair"], size)[0]["flair"]
    for border in (image[:, :4], image[:, -4:], image[..., :4], image[..., -4:]):
        torch.testing.assert_close(border, torch.full_like(border, -3.0))


def test_axes_are_not_swapped(tmp_path, write_slices):
    image = np.full((SIZE, SIZE), -3, np.float32)
    image[:6, 30:] = 1
    write_slices(tmp_path, "test", {"flair": {("A", 1): image}})
    small = BraTS2021Dataset(tmp_path, "test", ["flair"], 16)[0]["flair"][0]
    assert small[0, 15] == pytest.approx(1, abs=1e-5)
    assert small[15, 0] == small[0, 0] == small[15, 15] == pytest.approx(-3, abs=1e-5)


def test_modalities_with_a_common_prefix(tmp_path, write_slices):
    values = {"t1": 1.0, "t1ce": 2.0}
    for kind, value in values.items():
        image = np.where(np.arange(SIZE) < SIZE // 2, value, -3) * np.ones((SIZE, 1))
        write_slices(tmp_path, "test", {kind: {("A", 1): image}})
    item = BraTS2021Dataset(tmp_path, "test", list(values), 16)[0]
    assert {kind: item[kind].max().item() for kind in values} == pytest.approx(values)


def test_slices_are_cached_after_resizing(data_dir, monkeypatch):
    """A slice is read and resized only once."""
    dataset = BraTS2021Dataset(data_dir, "train", KINDS, 16)
    first = [dataset[i] for i in range(3)]
    shutil.rmtree(data_dir)
    monkeypatch.setattr("datasets.brats2021.F.interpolate", None)
    for i, item in enumerate(first):
        assert all(torch.equal(dataset[i][kind], item[kind]) for kind in KINDS)


@pytest.mark.parametrize("shape", [(SIZE, SIZE + 1), (SIZE, SIZE, 1), (SIZE,)])
def test_kinds_of_different_shapes(data_dir, shape):
    np.save(data_dir / "train" / "seg" / "BraTS2021_00007_seg_70.npy", np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"slice BraTS2021_00007_70 has shapes flair \(48, 48\), .*seg \(48"):
        BraTS2021Dataset(data_dir, "train", KINDS, 16)


def test_data_dir_may_be_a_string(data_dir):
    assert [item["name"] for item in find_slices(data_dir / "train", KINDS)] == NAMES
    assert len(BraTS2021Dataset(str(data_dir), "train", ["t2"], 16)) == 3


def test_missing_split(data_dir):
    with pytest.raises(UserError, match=r"no slices in .*val: run datasets/brats_preprocess.py first"):
        BraTS2021Dataset(data_dir, "val", KINDS, 16)


def test_unknown_modality(data_dir):
    with pytest.raises(UserError, match=r"no modality 'flare' in .*train, did you mean 'flair'\?.*brainmask"):
        BraTS2021Dataset(data_dir, "train", ["t2", "flare"], 16)


def test_slice_missing_from_one_kind(data_dir):
    (data_dir / "train" / "t2" / "BraTS2021_00007_t2_70.npy").unlink()
    with pytest.raises(UserError, match=r"slice BraTS2021_00007_70 in .*train has no t2"):
        BraTS2021Dataset(data_dir, "train", KINDS, 16)
    assert len(BraTS2021Dataset(data_dir, "train", ["flair"], 16)) == 3


def test_split_without_slices(tmp_path, write_slices):
    write_slices(tmp_path, "test", {"flair": {}})
    with pytest.raises(UserError, match=r"no slices in .*test: preprocess again"):
        BraTS2021Dataset(tmp_path, "test", ["flair"], 16)


# ----------------------------------------------------------------------------------------------------------
# Slices that preprocessing cannot have made


def put(value: float, dtype: type | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Convert to another dtype, and set one pixel of the brain."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype or array.dtype)
        array[20, 20] = value
        return array

    return change


FOREIGN = {  # the kind, the change, a part of the reason
    "negative labels": ("seg", put(-1, np.int16), "whole numbers from 0 to 255, not -1 to "),
    "labels that are not finite": ("seg", put(np.nan, np.float32), "whole numbers from 0 to 255, not nan"),
    "infinite labels": ("seg", put(np.inf, np.float32), "whole numbers from 0 to 255, not 0 to inf"),
    "half labels": ("seg", put(0.5, np.float32), "whole numbers from 0 to 255"),
    "labels above 255": ("seg", put(256, np.uint16), "whole numbers from 0 to 255, not 0 to 256"),
    "brain of 2": ("brainmask", put(2), "whole numbers from 0 to 1, not 0 to 2"),
    "brain of 255": ("brainmask", lambda mask: mask * np.uint8(255), "whole numbers from 0 to 1, not 0 to 255"),
    "probable brain": ("brainmask", put(0.7, np.float32), "whole numbers from 0 to 1"),
    "complex labels": ("seg", lambda seg: seg.astype(np.complex64), "values of type complex64"),
    "raw intensities": ("t2", lambda image: (image + 3) * 150, "its values range from 0 to "),
    "too bright": ("t2", put(1001), "its values range from -3 to 1001"),
    "too dark": ("flair", put(-3.1), "its values range from -3.1 to "),
    "another background": ("flair", lambda image: image + 0.1, "its values range from -2.9 to "),
    "one NaN": ("flair", put(np.nan), "its values range from nan"),
    "infinite": ("flair", put(np.inf), "its values range from -3 to inf"),
    "all background": ("t2", lambda image: np.full_like(image, -3), "its values range from -3 to -3"),
    "no pixels": ("t2", lambda image: image[:0], "zero-size array"),
    "text": ("t2", lambda image: image.astype("U3"), "values of type <U3"),
}


def rewrite(data_dir: Path, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Change one slice of a kind; return its path."""
    path = data_dir / f"train/{kind}/BraTS2021_00007_{kind}_70.npy"
    np.save(path, change(np.load(path)))
    return path


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_slices_are_refused_by_name(data_dir, case, keep):
    kind, change, reason = FOREIGN[case]
    path = rewrite(data_dir, kind, change)
    with pytest.raises(UserError) as refused:
        BraTS2021Dataset(data_dir, "train", KINDS, 16, progress=False, keep=keep)
    message = str(refused.value)
    assert message.startswith(f"a slice in {data_dir / 'train'} cannot be read ({path}: ")
    assert reason in message
    assert message.endswith("): preprocess again with --overwrite")
    others = [other for other in KINDS if other != kind]
    assert len(BraTS2021Dataset(data_dir, "train", others, 16, progress=False)) == 3


@pytest.mark.parametrize("shape", [(SIZE, SIZE + 1), (SIZE - 1, SIZE - 1)])
def test_slices_of_another_shape_than_the_others_are_refused(data_dir, shape):
    for kind in KINDS:
        rewrite(data_dir, kind, lambda array: np.resize(np.pad(array, 1, mode="edge"), shape))
    with pytest.raises(UserError) as refused:
        BraTS2021Dataset(data_dir, "train", KINDS, 16, progress=False)
    assert f"BraTS2021_00007_70 {shape}" in str(refused.value)
    assert f"BraTS2021_00007_71 {(SIZE, SIZE)}" in str(refused.value)
    assert str(refused.value).endswith("preprocess again with --overwrite")


OTHER_FORMS = {  # the kinds, another form of the same pixels
    "double precision": (("flair", "t2"), lambda image: image.astype(np.float64)),
    "bool": (("brainmask",), lambda mask: mask.astype(bool)),
    "16-bit labels": (("seg",), lambda seg: seg.astype(np.int16)),
    "labels as floats": (("seg", "brainmask"), lambda mask: mask.astype(np.float32)),
    "columns first": (KINDS, np.asfortranarray),
    "big-endian": (("flair",), lambda image: image.astype(">f4")),
}


@pytest.mark.parametrize("case", OTHER_FORMS)
def test_the_same_pixels_in_another_form_are_accepted(data_dir, case):
    kinds, change = OTHER_FORMS[case]
    expected = BraTS2021Dataset(data_dir, "train", KINDS, 16, progress=False)
    for kind in kinds:
        rewrite(data_dir, kind, change)
    found = BraTS2021Dataset(data_dir, "train", KINDS, 16, progress=False)
    for item, other in zip(found, expected, strict=True):
        assert all(torch.equal(item[kind], other[kind]) for kind in KINDS)
        assert all(item[kind].dtype == other[kind].dtype for kind in KINDS)
    before, after = expected.fingerprint["contents"], found.fingerprint["contents"]
    assert {kind for kind in KINDS if after[kind] != before[kind]} == set(kinds)


@pytest.mark.parametrize(("asked", "other"), [("train", "test"), ("test", "train"), ("train", "val")])
def test_subjects_in_two_splits_are_refused(data_dir, asked, other):
    """One slice of a subject is copied into another split, under the number of another slice."""
    (data_dir / "train").rename(data_dir / asked)
    for kind in KINDS:
        (data_dir / other / kind).mkdir(parents=True)
        one = data_dir / asked / kind / f"BraTS2021_00007_{kind}_70.npy"
        shutil.copy(one, data_dir / other / kind / f"BraTS2021_00007_{kind}_3.npy")
    for part in (asked, other):
        with pytest.raises(UserError, match=r"BraTS2021_00007 is both in .*: preprocess again with") as refused:
            BraTS2021Dataset(data_dir, part, KINDS, 16, progress=False)
        assert {str(data_dir / part) in str(refused.value) for part in (asked, other)} == {True}


def valid_slice(kind: str) -> np.ndarray:
    """Return a small slice of a kind."""
    values = np.random.default_rng(0).uniform(-2.9, 4, (6, 7)).astype(np.float32)
    inside = np.pad(np.ones((4, 5), bool), 1)
    if kind == "flair":
        return np.where(inside, values, np.float32(-3))
    return (inside * (4 if kind == "seg" else 1)).astype(np.uint8)


DTYPES = ("u1", "i1", "i2", ">i4", "i8", "u8", "f2", "<f4", ">f8", "g", "?", "c8", "S3", "U2", "O", "M8[s]")
VALUES = (-3, -3.0005, -3.01, -2, 0, -0.0, 0.5, 1, 2, 3.5, 255, 256, 1000, 1001, -1e30, 1e39, np.nan, np.inf, -np.inf)
SHAPINGS = {
    "same": lambda array: array,
    "turned": lambda array: array.T,
    "a line": lambda array: array[:1],
    "fewer lines": lambda array: array[:-1],
    "none": lambda array: array[:0],
    "a volume": lambda array: array[None],
    "flat": lambda array: array.ravel(),
    "a number": lambda array: array[0, 0],
    "columns first": np.asfortranarray,
}


@st.composite
def slice_files(draw, kind: str) -> bytes:
    """Draw the bytes of a slice whose type, values, shape or file may be wrong."""
    array, how = valid_slice(kind), draw(st.sets(st.sampled_from(("dtype", "values", "shape", "bytes"))))
    if "values" in how:
        for index, value in draw(st.dictionaries(st.integers(0, 41), st.sampled_from(VALUES), max_size=3)).items():
            array = array.astype(np.float64)
            array.flat[index] = value
    if "dtype" in how:
        with np.errstate(all="ignore"):
            array = np.nan_to_num(array).astype(draw(st.sampled_from(DTYPES)))
    if "shape" in how:
        array = SHAPINGS[draw(st.sampled_from(list(SHAPINGS)))](array)
    np.save(file := io.BytesIO(), array)
    data = bytearray(file.getvalue())
    if "bytes" in how:
        end = draw(st.sampled_from(("cut", "add", "change")))
        if end == "cut":
            return bytes(data[: draw(st.integers(0, len(data)))])
        if end == "add":
            return bytes(data) + draw(st.binary(min_size=1, max_size=20))
        for place in draw(st.lists(st.integers(0, 127) | st.integers(0, len(data) - 1), min_size=1, max_size=3)):
            data[place] = draw(st.integers(0, 255))
    return bytes(data)


def test_any_file_is_refused_or_gives_a_valid_slice(tmp_path, write_slices):
    kinds, outcomes = ("flair", "seg", "brainmask"), {"read": 0, "refused": 0}
    write_slices(tmp_path, "test", {kind: {("A", 1): valid_slice(kind)} for kind in kinds})
    paths = {kind: tmp_path / f"test/{kind}/A_{kind}_1.npy" for kind in kinds}
    valid = {kind: path.read_bytes() for kind, path in paths.items()}

    @settings(max_examples=500, deadline=None, derandomize=True, database=None)
    @given(data=st.data(), kind=st.sampled_from(kinds), alone=st.booleans(), keep=st.booleans())
    def check(data, kind, alone, keep):
        paths[kind].write_bytes(data.draw(slice_files(kind)))
        asked = (kind,) if alone else kinds
        try:
            dataset, refusal = BraTS2021Dataset(tmp_path, "test", asked, 16, progress=False, keep=keep), ""
        except UserError as error:
            refusal = str(error)
        outcomes["refused" if refusal else "read"] += 1
        if refusal:
            assert refusal.startswith(f"a slice in {tmp_path / 'test'} cannot be read (")
            assert f"A_{kind}_1.npy: " in refusal or "slice A_1 has shapes" in refusal
            assert refusal.endswith("preprocess again with --overwrite")
            assert "\n" not in refusal
        else:
            [item] = dataset
            assert {kind: (item[kind].dtype, tuple(item[kind].shape)) for kind in asked} == {
                kind: (torch.float32 if kind == "flair" else torch.bool, (1, 16, 16)) for kind in asked
            }
            assert "flair" not in asked or -3.001 <= item["flair"].min() <= item["flair"].max() <= 1000.001
        paths[kind].write_bytes(valid[kind])

    check()
    assert min(outcomes.values()) > 50, f"one-sided examples: {outcomes}"


# ----------------------------------------------------------------------------------------------------------
# Fingerprints


def fingerprint(data_dir: Path, kinds: tuple[str, ...] = KINDS, **options: bool) -> dict:
    return BraTS2021Dataset(data_dir, "train", kinds, 16, progress=False, **options).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_changes_the_fingerprint_of_its_kind_only(data_dir, kind):
    before = fingerprint(data_dir)

    def change(array: np.ndarray) -> np.ndarray:
        array.view(np.uint8)[20, 20 * array.itemsize] ^= 1  # the byte of a pixel that matters least
        return array

    rewrite(data_dir, kind, change)
    after = fingerprint(data_dir)
    assert sorted(before["contents"]) == sorted(KINDS)
    assert {other for other in KINDS if before["contents"][other] != after["contents"][other]} == {kind}
    assert before | {"contents": None} == after | {"contents": None}


def test_the_fingerprint_depends_on_the_slices_only(data_dir, tmp_path_factory, memory):
    """It depends neither on the folder, nor on the order of kinds, nor on where the slices are kept."""
    before = fingerprint(data_dir)
    assert before["slices"] == 3
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "x"
    shutil.copytree(data_dir, elsewhere)
    assert fingerprint(elsewhere) == before
    assert json.dumps(fingerprint(data_dir, KINDS[::-1]), sort_keys=True) == json.dumps(before, sort_keys=True)
    assert fingerprint(data_dir, keep=False) == before
    memory(0)
    assert fingerprint(data_dir) == before
    one = data_dir / "train/flair/BraTS2021_00007_flair_70.npy"
    other = one.with_name("BraTS2021_00007_flair_71.npy")
    pixels = one.read_bytes(), other.read_bytes()
    one.write_bytes(pixels[1])
    other.write_bytes(pixels[0])
    assert fingerprint(data_dir)["contents"]["flair"] != before["contents"]["flair"]


def test_other_names_and_kinds_have_other_fingerprints(data_dir):
    before = fingerprint(data_dir, ("flair", "seg"))
    assert fingerprint(data_dir, ("flair",))["sha256"] != before["sha256"]
    for kind in ("flair", "seg"):
        path = data_dir / f"train/{kind}/BraTS2021_00007_{kind}_70.npy"
        path.rename(path.with_name(path.name.replace("_70", "_69")))
    after = fingerprint(data_dir, ("flair", "seg"))
    assert after["sha256"] != before["sha256"]
    assert after["contents"] == before["contents"]


def test_kinds_given_twice_count_once(data_dir):
    assert fingerprint(data_dir, ("flair", "flair")) == fingerprint(data_dir, ("flair",))
    dataset = BraTS2021Dataset(data_dir, "train", ["flair", "flair"], 16, progress=False)
    assert dataset.kinds == ["flair"]
    assert set(dataset[0]) == {"flair", "name"}


# ----------------------------------------------------------------------------------------------------------
# In memory, or read on demand


@pytest.fixture
def both(data_dir, memory) -> tuple[BraTS2021Dataset, BraTS2021Dataset]:
    """Return the same slices in memory and on disk."""
    in_memory = BraTS2021Dataset(data_dir, "train", KINDS, 16)
    memory(0)
    return in_memory, BraTS2021Dataset(data_dir, "train", KINDS, 16)


NEEDED = 3 * 16 * 16 * (4 + 4 + 1 + 1)  # bytes of the slices above: two images and two masks


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("lacking", [0, 1])
def test_slices_that_fit_into_half_of_the_memory_are_kept(data_dir, memory, capsys, processes, lacking):
    memory(2 * processes * NEEDED - lacking)
    dataset = BraTS2021Dataset(data_dir, "train", KINDS, 16, processes=processes, progress=False)
    message = "read from disk on demand" if lacking else "kept in memory"
    assert f"train: 3 slices, {message}" in capsys.readouterr().out
    assert (dataset.workers > 0) == bool(lacking)
    before = dataset[0]["flair"].clone()
    for path in (data_dir / "train/flair").iterdir():
        np.save(path, np.full((SIZE, SIZE), -3) + np.eye(SIZE))
    assert torch.equal(dataset[0]["flair"], before) == (not lacking)


def test_items_are_the_same_in_memory_and_on_disk(both):
    assert len(both[0]) == len(both[1]) == 3
    for kept, read in zip(*both, strict=True):
        assert set(kept) == set(read)
        assert kept.pop("name") == read.pop("name")
        for kind, image in kept.items():
            assert type(read[kind]) is type(image) is torch.Tensor
            assert torch.equal(read[kind], image)


def test_workers_yield_the_same_batches_in_order(both):
    kept, read = (
        list(islice(training_batches(dataset, 2, 0, 3, workers=workers), 7))
        for dataset, workers in zip(both, (0, 2), strict=True)
    )
    for one, other in zip(kept, read, strict=True):
        assert one["name"] == other["name"]
        assert torch.equal(one["flair"], other["flair"])


def test_shares_concatenate_to_the_batch(both):
    whole, *shares = (
        next(training_batches(both[0], 5, 0, 2, share=share)) for share in (slice(None), slice(0, 2), slice(2, 5))
    )
    assert [len(share["name"]) for share in shares] == [2, 3]
    assert torch.equal(torch.cat([share["t2"] for share in shares]), whole["t2"])


class SignalledDataset(torch.utils.data.Dataset):
    """A dataset whose worker receives SIGINT and SIGTERM, as Ctrl-C and Slurm send them to all processes."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return torch.tensor(index)


def test_workers_ignore_stop_signals():
    batches = training_batches(SignalledDataset(), 2, seed=0, first_step=0, workers=1)
    assert sorted(torch.cat([next(batches), next(batches)]).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["cut off", "of another size"])
def test_damaged_file_is_found_at_the_start(data_dir, memory, damage):
    path = data_dir / "train/t2/BraTS2021_00007_t2_70.npy"
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, np.zeros((SIZE, SIZE + 1), np.float32))
    memory(0)
    with pytest.raises(UserError, match=r"a slice in .*train cannot be read \(.*\): preprocess again"):
        BraTS2021Dataset(data_dir, "train", KINDS, 16)


# ----------------------------------------------------------------------------------------------------------
# Batches


def indices(n_batches, dataset_size=10, batch_size=4, seed=0, first_step=0):
    return list(islice(step_indices(dataset_size, batch_size, seed, first_step), n_batches))


@pytest.mark.parametrize(("dataset_size", "batch_size"), [(10, 5), (10, 4), (10, 1), (3, 10), (1, 4), (7, 7)])
def test_every_epoch_has_every_slice_once(dataset_size, batch_size):
    epochs = 6
    n_batches = math.ceil(epochs * dataset_size / batch_size)
    batches = indices(n_batches, dataset_size, batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    flat = [index for batch in batches for index in batch]
    for epoch in range(epochs):
        assert sorted(flat[epoch * dataset_size :][:dataset_size]) == list(range(dataset_size))


def test_every_epoch_has_its_own_order():
    orders = indices(4, dataset_size=20, batch_size=20)
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(20)) not in orders


@pytest.mark.parametrize(("dataset_size", "batch_size"), [(10, 4), (10, 5), (3, 10)])
@pytest.mark.parametrize("first_step", [1, 2, 5, 13])
def test_resuming_from_any_step(dataset_size, batch_size, first_step):
    whole = indices(20, dataset_size, batch_size)
    assert indices(20 - first_step, dataset_size, batch_size, first_step=first_step) == whole[first_step:]


def test_order_depends_on_the_seed():
    assert indices(5, seed=3) == indices(5, seed=3)
    assert indices(5, seed=3) != indices(5, seed=4)


def test_training_batches(data_dir):
    dataset = BraTS2021Dataset(data_dir, "train", ["flair", "t2"], 16)
    batches = list(islice(training_batches(dataset, 2, seed=0, first_step=0), 6))
    for batch, chosen in zip(batches, indices(6, 3, 2), strict=True):
        assert batch["flair"].shape == batch["t2"].shape == (2, 1, 16, 16)
        assert batch["name"] == [NAMES[i] for i in chosen]
        for kind in ("flair", "t2"):
            assert torch.equal(batch[kind], torch.stack([dataset[i][kind] for i in chosen]))
    later = training_batches(dataset, 2, seed=0, first_step=4)
    assert torch.equal(next(later)["flair"], batches[4]["flair"])
    assert torch.equal(next(later)["flair"], batches[5]["flair"])


def test_batch_larger_than_the_dataset(data_dir):
    dataset = BraTS2021Dataset(data_dir, "train", ["flair"], 16)
    batch = next(training_batches(dataset, 8, seed=0, first_step=0))
    assert batch["flair"].shape == (8, 1, 16, 16)
    assert sorted(batch["name"][:3]) == sorted(batch["name"][3:6]) == NAMES


def test_all_slices_in_order(data_dir):
    dataset = BraTS2021Dataset(data_dir, "train", KINDS, 16)
    batch = all_slices(dataset)
    assert batch["name"] == NAMES
    assert {kind: tuple(batch[kind].shape) for kind in KINDS} == dict.fromkeys(KINDS, (3, 1, 16, 16))
    assert batch["seg"].dtype == torch.bool
    assert torch.equal(batch["flair"][2], dataset[2]["flair"])

"""The dataset of preprocessed slices, and the batches for training and testing."""

import math
import os
import shutil
import signal
from itertools import islice

import numpy as np
import pytest
import torch
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
# In memory, or read on demand


@pytest.fixture
def memory(monkeypatch):
    """Set the available memory, in bytes."""
    return lambda n: monkeypatch.setattr("datasets.brats2021.available_memory", lambda: n)


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

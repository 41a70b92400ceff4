"""Precision, memory layout and batches that do not fit, with devices that are not there played by stand-ins."""

import copy
import sys
from pathlib import Path

import pytest
import torch

from guided_diffusion.unet import UNetModel
from utils.cli import UserError
from utils.device import autocast, available_memory, in_batches, pick_precision, speed_up

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ----------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
@pytest.mark.parametrize(("limit", "expected"), [("max", 8000 * 1024), ("5000", 4000), ("900000000", 8000 * 1024)])
def test_available_memory_is_that_of_the_control_group_too(monkeypatch, limit, expected):
    files = {
        "/proc/meminfo": "MemTotal:       9000 kB\nMemAvailable:   8000 kB\n",
        "/proc/self/cgroup": "0::/job/step\n",
        "/sys/fs/cgroup/job/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/job/memory.stat": "anon 1000\nfile 3000\n",
    }
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert available_memory() == expected


# ----------------------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_precision_that_is_asked_for_is_taken(name, dtype, device):
    assert pick_precision(name, device) == dtype


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_auto_on_a_gpu_depends_on_its_generation(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", GPU) == dtype


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"neon": True}, torch.float32),
    ],
)
def test_auto_on_a_cpu_depends_on_its_instructions(monkeypatch, features, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert pick_precision("auto", CPU) == dtype


def test_autocast_computes_products_in_the_precision():
    a = torch.randn(4, 4)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert (a + a).dtype == torch.float32
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------
# Layout


@pytest.fixture
def network(randomise):
    return randomise(UNetModel(1, 8, 1, 1, (2,), channel_mult=(1, 2), resblock_updown=True, norm_groups=4), seed=3)


@pytest.mark.parametrize(("training", "layout"), [(False, torch.channels_last), (True, torch.contiguous_format)])
def test_the_layout_on_a_cpu_changes_no_value(network, training, layout):
    plain = copy.deepcopy(network)
    fast = speed_up(network, CPU, training=training)
    weight = fast.input_blocks[1][0].in_layers[2].weight
    assert weight.is_contiguous(memory_format=layout)
    assert weight.shape[1] > 1  # else both layouts are one
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Batches


class Recorder:
    """Does batches of up to `capacity` items and runs out of memory beyond."""

    def __init__(self, capacity=1000):
        self.capacity, self.done, self.tried, self.progress = capacity, [], [], []

    def __call__(self, batch):
        self.tried.append(len(batch))
        if len(batch) > self.capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.done.extend(batch)

    def run(self, n_items, batch_size):
        in_batches(self, list(range(n_items)), batch_size, self.progress.append)


def test_items_are_done_in_order_and_once():
    work = Recorder()
    work.run(10, batch_size=4)
    assert work.done == list(range(10))
    assert work.tried == work.progress == [4, 4, 2]


def test_a_batch_that_does_not_fit_is_halved_and_tried_again():
    work = Recorder(capacity=3)
    with pytest.warns(UserWarning, match="does not fit.*going on with") as warned:
        work.run(11, batch_size=8)
    assert [str(warning.message).split()[3] for warning in warned] == ["8", "4"]
    assert work.done == list(range(11))
    assert work.tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert work.progress == work.tried[2:]


def test_a_single_item_that_does_not_fit_is_a_plain_error():
    with pytest.warns(UserWarning, match="going on with 1"), pytest.raises(UserError, match="batch of 1"):
        Recorder(capacity=0).run(5, batch_size=2)


def test_other_errors_are_not_swallowed():
    def fail(batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        in_batches(fail, [1, 2], 2, lambda done: None)


def test_tensors_are_batched_too():
    parts = []
    in_batches(parts.append, torch.arange(5), 2, lambda done: None)
    assert [part.tolist() for part in parts] == [[0, 1], [2, 3], [4]]


def test_no_items():
    in_batches(lambda batch: pytest.fail("nothing to do"), [], 4, lambda done: None)

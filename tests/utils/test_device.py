"""Memory, precision, layout, batch sizes, prefetching and GPU settings, with mocked GPUs."""

import copy
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from guided_diffusion.unet import UNetModel
from utils.cli import UserError
from utils.device import (
    Prefetcher,
    autocast,
    available_memory,
    in_batches,
    pick_device,
    pick_precision,
    speed_up,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ----------------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says")
@pytest.mark.parametrize(("limit", "expected"), [("max", 8000 * 1024), ("5000", 4000), ("900000000", 8000 * 1024)])
def test_available_memory_is_limited_by_the_control_group(monkeypatch, limit, expected):
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
def test_explicit_precision_is_used(name, dtype, device):
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
def test_auto_precision_on_a_gpu_depends_on_its_generation(monkeypatch, capability, dtype):
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
def test_auto_precision_on_a_cpu_depends_on_its_instructions(monkeypatch, features, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert pick_precision("auto", CPU) == dtype


def test_autocast_computes_matrix_products_in_the_precision():
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
def test_layout_on_a_cpu_does_not_change_the_output(network, training, layout):
    plain = copy.deepcopy(network)
    fast = speed_up(network, CPU, training=training)
    weight = fast.input_blocks[1][0].in_layers[2].weight
    assert weight.is_contiguous(memory_format=layout)
    assert weight.shape[1] > 1  # with 1 channel both layouts are the same
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Batches


class Recorder:
    """Processes batches of up to `capacity` items and runs out of memory on larger ones."""

    def __init__(self, capacity=1000):
        self.capacity, self.done, self.tried, self.progress = capacity, [], [], []

    def __call__(self, batch):
        self.tried.append(len(batch))
        if len(batch) > self.capacity:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.done.extend(batch)

    def run(self, n_items, batch_size):
        in_batches(self, list(range(n_items)), batch_size, self.progress.append)


def test_items_are_processed_once_and_in_order():
    work = Recorder()
    work.run(10, batch_size=4)
    assert work.done == list(range(10))
    assert work.tried == work.progress == [4, 4, 2]


def test_a_batch_that_does_not_fit_is_halved_and_retried():
    work = Recorder(capacity=3)
    with pytest.warns(UserWarning, match="does not fit.*continuing with") as warned:
        work.run(11, batch_size=8)
    assert [str(warning.message).split()[3] for warning in warned] == ["8", "4"]
    assert work.done == list(range(11))
    assert work.tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert work.progress == work.tried[2:]


def test_a_single_item_that_does_not_fit_is_a_user_error():
    with pytest.warns(UserWarning, match="continuing with 1"), pytest.raises(UserError, match="batch of 1"):
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


# ----------------------------------------------------------------------------------------------------------
# Prefetching


class Draws:
    """Draws with the step as shape; records each request and whether it came from the main thread."""

    def __init__(self):
        self.requests: list[tuple[int, bool]] = []

    def __call__(self, step):
        self.requests.append((step, threading.current_thread() is threading.main_thread()))
        return torch.zeros(step), torch.zeros(2, step)


def shapes(draws) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in draws]


@pytest.mark.parametrize(("ahead", "steps"), [(1, [4, 5, 6]), (-1, [2, 1, 0])])
def test_the_next_step_is_drawn_in_a_thread_except_on_a_cpu(ahead, steps):
    draws = Draws()
    prefetcher = Prefetcher(draws, torch.device("meta"), ahead)
    for step in steps:
        found = prefetcher(step)
        assert shapes(found) == [(step,), (2, step)]
        assert all(one.device.type == "meta" for one in found)
    prefetcher(8)  # not prefetched, so drawn in the main thread
    prefetcher._pool.shutdown()
    in_main = [step for step, in_main in draws.requests if in_main]
    assert in_main == [steps[0], 8]
    assert sorted({step for step, _ in draws.requests}) == sorted({*steps, 8, 8 + ahead, max(steps[-1] + ahead, 0)})


@pytest.mark.parametrize(("device", "ahead"), [("cpu", 1), ("meta", 0)])
def test_no_prefetching_on_a_cpu_or_with_ahead_0(device, ahead):
    draws = Draws()
    prefetcher = Prefetcher(draws, torch.device(device), ahead)
    assert [shapes(prefetcher(step)) for step in (3, 4)] == [[(3,), (2, 3)], [(4,), (2, 4)]]
    assert draws.requests == [(3, True), (4, True)]


# ----------------------------------------------------------------------------------------------------------
# GPU settings


@pytest.fixture
def two_gpus(monkeypatch):
    """Mock two GPUs; return the list of devices that were made current."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield chosen
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)


def test_the_requested_gpu_is_made_current_without_tf32(two_gpus):
    assert pick_device("1") == torch.device("cuda", 1)
    assert two_gpus == [torch.device("cuda", 1)]
    assert torch.backends.cudnn.allow_tf32 is False
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(UserError, match=r"--gpu_id 2 does not exist: the devices are 0 … 1"):
        pick_device("2")


def test_deterministic_algorithms_are_enabled_on_request(two_gpus):
    pick_device("0", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cuda.mem_efficient_sdp_enabled()


def test_cpu_does_not_initialise_a_gpu(two_gpus):
    assert pick_device("cpu", deterministic=True) == CPU
    assert two_gpus == []
    assert not torch.are_deterministic_algorithms_enabled()

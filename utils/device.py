"""Device, precision, memory and speed."""

import copy
import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import compiling, recording
from .cli import UserError

Item = TypeVar("Item")
Network = TypeVar("Network", bound=nn.Module)

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(gpu_id: str, deterministic: bool = False) -> torch.device:
    """Return the device selected by `--gpu_id`, or the CPU, with a message, if there is no CUDA device.

    Disables TF32. `deterministic` makes CUDA results bitwise reproducible, at some cost; CPU results are anyway.

    Raises:
        UserError: if gpu_id is neither `cpu` nor the index of an existing device.
    """
    if gpu_id == "cpu":
        return torch.device("cpu")
    if not gpu_id.isdigit():
        raise UserError(f"--gpu_id {gpu_id!r} is neither a number nor cpu")
    if not torch.cuda.is_available():
        print("no CUDA device found: running on the CPU")
        return torch.device("cpu")
    if int(gpu_id) >= torch.cuda.device_count():
        raise UserError(f"--gpu_id {gpu_id} does not exist: the devices are 0 … {torch.cuda.device_count() - 1}")
    device = torch.device("cuda", int(gpu_id))
    torch.cuda.set_device(device)  # else pinning memory, for one, would open a context on device 0
    torch.backends.cudnn.allow_tf32 = False  # on by default
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # its gradients are summed in arbitrary order
        torch.use_deterministic_algorithms(True)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the precision of matrix products: one of `PRECISIONS` by name, or for `auto` the fastest on the device.

    This is bfloat16 where it is supported natively (CUDA capability 8.0 or higher, CPUs with AMX or AVX512-BF16),
    float16 on older GPUs with tensor cores (capability 7), and float32 elsewhere.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if generation >= 8 else torch.float16 if generation == 7 else torch.float32
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Return a context that computes matrix products and convolutions in `precision`, and all else in float32."""
    # A recorded step must not depend on conversions cached by an earlier one.
    cached = device.type == "cpu"
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision, cache_enabled=cached)


def require_memory(device: torch.device, n_bytes: int, purpose: str, setting: str) -> None:
    """Raise a UserError, with a `setting` of the config to reduce, if the device's memory is below `n_bytes`."""
    available = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[1]
    if n_bytes > available:
        needs = f"{purpose} needs about {n_bytes / 1e9:,.1f} GB, but only {available / 1e9:,.1f} GB are available"
        raise UserError(f"{needs}: reduce --config.{setting}")


def _pin_for(device: torch.device, tensor: Tensor) -> Tensor:
    """Pin a CPU tensor's memory if the device is a GPU, so that copying it does not block the host."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device asynchronously."""
    return _pin_for(device, tensor).to(device, non_blocking=True)


class Prefetcher:
    """Prefetcher of random numbers, so that a GPU does not wait for them.

    While the GPU computes one step, a thread draws the numbers of the next. On a CPU, where the thread would slow down
    the network, they are drawn on demand.

    Args:
        draw: `draw(step)` returns a tuple of CPU tensors that depend only on the step.
        device: device to copy the tensors to.
        ahead: offset of the step to prefetch: 1 in training, −1 in sampling, 0 if its draws depend on this step.
    """

    def __init__(self, draw: Callable[[int], tuple[Tensor, ...]], device: torch.device, ahead: int = 1):
        self.draw, self.device = draw, device
        self.ahead = 0 if device.type == "cpu" else ahead
        self._pool = ThreadPoolExecutor(1)  # starts its thread on first use
        self._drawn: dict[int, Future] = {}

    def __call__(self, step: int) -> list[Tensor]:
        """Return the random numbers of a step, on the device."""
        drawn = self._drawn.pop(step, None)
        draws = drawn.result() if drawn else self.draw(step)
        if self.ahead and step + self.ahead >= 0:
            self._drawn = {step + self.ahead: self._pool.submit(self._draw_pinned, step + self.ahead)}
        return [to_device(tensor, self.device) for tensor in draws]

    def _draw_pinned(self, step: int) -> list[Tensor]:
        return [_pin_for(self.device, tensor) for tensor in self.draw(step)]


def available_cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def available_memory() -> int:
    """Return the available main memory in bytes, within cgroup limits (on other systems than Linux, the total)."""
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(machine["MemAvailable"].split()[0])
    root = Path("/sys/fs/cgroup")
    group = root / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
    for folder in (group, *group.parents):  # a parent may have a lower limit, as under Slurm
        limit = folder / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            available = min(available, int(text) - int(used["anon"]))  # the page cache can be reclaimed
    return available


def speed_up(network: Network, device: torch.device, *, training: bool) -> Network:
    """Move a network to the device in its fastest memory layout; results change only by rounding."""
    if device.type == "cpu":
        _retain_freed_memory()
    # Convolutions are fastest in channels-last, but group norm loses more than they gain: on CPUs in the backward pass,
    # on CUDA, where it copies to the contiguous layout and back, in both.
    fast = torch.channels_last if device.type == "cpu" and not training else torch.contiguous_format
    return network.to(device, memory_format=fast)


def copy_in_precision(network: Network, precision: torch.dtype) -> Network:
    """Return a copy of a network whose parameters have another precision; it shares the network's buffers."""
    low = copy.deepcopy(network)
    for parameter in low.parameters():
        parameter.data = parameter.data.to(precision)
    for ours, theirs in zip(low.buffers(), network.buffers(), strict=True):
        ours.data = theirs.data
    return low


def speed_up_passes(
    network: nn.Module, device: torch.device, precision: torch.dtype, samples: Callable[[], int]
) -> nn.Module:
    """Move a network to the device in evaluation mode, and make its passes as fast as the device allows.

    On a GPU they all have one batch size and are recorded as a CUDA graph. In bfloat16, weights are converted at once,
    and the network is compiled if the `samples()` to come, counted at the first pass, repay it.
    """
    network = speed_up(network.eval(), device, training=False)
    if not recording.available(device):
        return network
    if precision == torch.bfloat16:
        network = copy_in_precision(network, precision)

    def accelerate(network: nn.Module, call: Callable[[nn.Module], object]) -> nn.Module:
        if not compiling.PASSES.pays(device, samples()):
            return network
        return compiling.compiled(network.to(memory_format=torch.channels_last), call, samples(), compiling.PASSES)

    return recording.RecordedPasses(network, accelerate)


def in_batches(
    work: Callable[[Sequence[Item]], None],
    items: Sequence[Item],
    batch_size: int,
    progress: Callable,
) -> None:
    """Call `work` on all items in batches, in order, and `progress` with the size of each finished batch.

    A batch that does not fit into a GPU's memory is halved, with a warning, and retried.

    Raises:
        UserError: if a single item does not fit.
    """
    done = 0
    while done < len(items):
        batch = items[done : done + batch_size]
        try:
            work(batch)
        except torch.cuda.OutOfMemoryError as error:
            if len(batch) == 1:
                raise UserError("even a batch of 1 does not fit into the GPU's memory: use a smaller model") from error
            batch_size = len(batch) // 2
        else:
            done += len(batch)
            progress(len(batch))
            continue
        # Outside the except clause, in which the exception still holds the batch's tensors.
        torch.cuda.empty_cache()
        message = f"a batch of {len(batch)} does not fit into the GPU's memory: continuing with {batch_size}"
        warnings.warn(message, stacklevel=2)


def _retain_freed_memory() -> None:
    """Make malloc keep freed memory: requesting it from the system again takes a fifth of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # glibc only
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**31 - 1)

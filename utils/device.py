"""Where a run computes, in which precision, and what makes it fast there."""

import ctypes
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .cli import UserError

Item = TypeVar("Item")
Network = TypeVar("Network", bound=nn.Module)

WORTH_COMPILING = 5_000  # calls of a network: an estimate, a call saves some 10 ms of the paper's 30

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(gpu_id: str, deterministic: bool = False) -> torch.device:
    """The device that `--gpu_id` names; the CPU, said in one line, where there is no CUDA device.

    A CUDA device computes float32 in float32, and if it is to be `deterministic`, the same bits in every run, at some
    cost. CPUs do so anyway. A UserError if it is neither `cpu` nor the number of a device that is there.
    """
    if gpu_id == "cpu":
        return torch.device("cpu")
    if not gpu_id.isdigit():
        raise UserError(f"--gpu_id {gpu_id!r} is neither a number nor cpu")
    if not torch.cuda.is_available():
        print("no CUDA device found: running on the CPU")
        return torch.device("cpu")
    if int(gpu_id) >= torch.cuda.device_count():
        raise UserError(f"--gpu_id {gpu_id} is not there: the devices are 0 … {torch.cuda.device_count() - 1}")
    device = torch.device("cuda", int(gpu_id))
    torch.cuda.set_device(device)  # what names no device, pinned memory say, would open a context on the first one
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cuda.enable_mem_efficient_sdp(False)  # whose gradients are added up in any order
        torch.use_deterministic_algorithms(True)
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """What matrix products are computed in: one of `PRECISIONS` by its name, or `auto`, the fastest on the device.

    That is bfloat16 where the device computes in it (CUDA from capability 8.0 on; CPUs with AMX or AVX512-BF16),
    float16 on the CUDA devices before those that have tensor cores (capability 7), and float32 elsewhere.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        generation, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if generation >= 8 else torch.float16 if generation == 7 else torch.float32
    cpu = torch.cpu.get_capabilities()
    return torch.bfloat16 if cpu.get("amx_bf16") or cpu.get("avx512_bf16") else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> AbstractContextManager:
    """Compute matrix products and convolutions in `precision`, all else in float32."""
    return nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision)


def require_memory(device: torch.device, batch_size: int, an_item: int) -> None:
    """Raise a UserError, before anything is computed, if a training batch does not fit, by the bytes an item takes."""
    available = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[1]
    if batch_size * an_item > available:
        raise UserError(
            f"a training step takes about {batch_size * an_item / 1e9:,.1f} GB, {an_item / 1e9:,.3f} for each slice of "
            f"the batch, and there are {available / 1e9:,.1f}: use a smaller --config.score_model.training.batch_size"
        )


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU in memory that a CUDA device copies from while the host goes on; as it is for others."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for it."""
    return pinned(tensor, device).to(device, non_blocking=True)


class DrawnAhead:
    """Calls `draw(step)`, which returns a tuple of CPU tensors, for one step after another.

    A GPU should not wait for random numbers: while it works at a step, a thread draws those of the next. On a CPU,
    where that thread would only take time from the network, they are drawn when they are asked for.

    Args:
        draw: depends on the step alone.
        device: where the draws are needed.
        ahead: how far the next step lies from one step: 1 in training, −1 in sampling; 0 where its draws depend on
            this one.
    """

    def __init__(self, draw: Callable[[int], tuple[Tensor, ...]], device: torch.device, ahead: int = 1):
        self.draw, self.device = draw, device
        self.ahead = 0 if device.type == "cpu" else ahead
        self._pool = ThreadPoolExecutor(1)  # which starts no thread before it has work
        self._drawn: dict[int, Future] = {}

    def __call__(self, step: int) -> list[Tensor]:
        """The draws of a step, on the device."""
        drawn = self._drawn.pop(step, None)
        draws = drawn.result() if drawn else self.draw(step)
        if self.ahead and step + self.ahead >= 0:
            self._drawn = {step + self.ahead: self._pool.submit(self._draw_pinned, step + self.ahead)}
        return [to_device(tensor, self.device) for tensor in draws]

    def _draw_pinned(self, step: int) -> list[Tensor]:
        return [pinned(tensor, self.device) for tensor in self.draw(step)]


def available_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of main memory that may still be used: the machine's, or less where its control group is held to less.

    Off Linux, where nothing says what is in use, it is all that the machine has.
    """
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(machine["MemAvailable"].split()[0])
    root = Path("/sys/fs/cgroup")
    group = root / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
    for folder in (group, *group.parents):  # Slurm's limit, say, is that of a group further up
        limit = folder / "memory.max"
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            used = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            available = min(available, int(text) - int(used["anon"]))  # what files take can be taken back
    return available


def speed_up(network: Network, device: torch.device, *, training: bool) -> Network:
    """Move a network to its device, in the memory layout that is fastest there.

    Parameters, their names and the results to rounding stay as they are.
    """
    if device.type == "cpu":
        _keep_memory()
    # Convolutions are fastest with channels last. On a CPU, group norm's backward pass loses more by it.
    plain = training and device.type == "cpu"
    return network.to(device, memory_format=torch.contiguous_format if plain else torch.channels_last)


def compile_if_it_pays(network: nn.Module, device: torch.device, calls: int) -> None:
    """Compile a network for CUDA, in place, if it will be called so often that the minute this takes comes back.

    Where Triton or a C compiler is missing, it stays as it is, which is said. TORCH_COMPILE_DISABLE=1 in the
    environment leaves compiling out, too.
    """
    if device.type != "cuda" or calls < WORTH_COMPILING:
        return
    compilers = filter(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))
    if importlib.util.find_spec("triton") and next(compilers, None):
        network.compile()
    else:
        print("networks are not compiled, which takes Triton and a C compiler: the run is slower, its results the same")


def in_batches(
    work: Callable[[Sequence[Item]], None],
    items: Sequence[Item],
    batch_size: int,
    progress: Callable,
    device: torch.device,
) -> None:
    """Call `work` with all items in order, `batch_size` at a time, and `progress` with how many were done.

    On a GPU the first batch shows what an item takes, and those after it fill the memory. A batch that does not fit is
    halved, with a warning, and tried again. A UserError if not even a single item fits.
    """
    done = 0
    while done < len(items):
        batch = items[done : done + batch_size]
        try:
            if done == 0 and device.type == "cuda":
                batch_size = max(batch_size, _measure_batch(partial(work, batch), len(batch), device))
            else:
                work(batch)
        except torch.cuda.OutOfMemoryError as error:
            if len(batch) == 1:
                raise UserError("not even a batch of 1 fits into the GPU's memory: use a smaller model") from error
            batch_size = len(batch) // 2
        else:
            done += len(batch)
            progress(len(batch))
            continue
        # outside the except clause, whose error still holds the batch's tensors
        torch.cuda.empty_cache()
        message = f"a batch of {len(batch)} does not fit into the GPU's memory: going on with {batch_size}"
        warnings.warn(message, stacklevel=2)


def _measure_batch(work: Callable[[], None], n_items: int, device: torch.device) -> int:
    """Do a batch of `n_items`; returns how many of them four fifths of the GPU's free memory take."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    an_item = max(torch.cuda.max_memory_allocated(device) - before, 1) / n_items
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(0.8 * (free + unused) / an_item)


def _keep_memory() -> None:
    """Have the C library keep freed memory: asking the system for it again takes a fifth of a training step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # glibc has it
        m_trim_threshold, m_mmap_threshold = -1, -3
        mallopt(m_mmap_threshold, 2**30)
        mallopt(m_trim_threshold, 2**31 - 1)

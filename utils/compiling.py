"""Compiling networks where that pays, and saying so."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

REFRESH_SECONDS = 1


class Compilation(NamedTuple):
    """The cost and the benefit of compiling a network, measured on an H100 with the paper's (docs/speed.md).

    Attributes:
        seconds: time to compile.
        saved: seconds saved for each sample that passes through the compiled network.
    """

    seconds: float
    saved: float

    def pays(self, device: torch.device, samples: int) -> bool:
        """Whether compiling saves more time than it takes; never on CPUs, or with TORCH_COMPILE_DISABLE=1."""
        allowed = device.type == "cuda" and os.environ.get("TORCH_COMPILE_DISABLE") != "1"
        return allowed and samples * self.saved > self.seconds


TRAINING = Compilation(seconds=180, saved=20e-3 / 32)
PASSES = Compilation(seconds=60, saved=0.4e-3)


def compiled(
    network: nn.Module,
    call: Callable[[nn.Module], object],
    samples: int,
    cost: Compilation,
    report: Callable[[str], object] = print,
) -> nn.Module:
    """Return the network compiled, or as it is if that is impossible; either is reported.

    What was compiled is kept in TORCHINDUCTOR_CACHE_DIR (`utils.cli.keep_compiled_code`) for other runs of the same
    network and batch.

    Args:
        network: in training or evaluation mode, on a GPU.
        call: calls a network with its inputs, and computes gradients if it is to be trained.
        samples: to come, over which it pays.
        cost: as estimated.
        report: called with messages.

    Raises:
        torch.cuda.OutOfMemoryError: if the call does not fit into memory.
    """
    if not importlib.util.find_spec("triton") or not next(
        filter(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")), None
    ):
        report("networks are not compiled (Triton or a C compiler is missing): slower, with the same results")
        return network
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torch's cache")
    report(
        f"compiling the network: about {cost.seconds:.0f} s at first, less if {cache} has it from an earlier run. "
        f"It saves about {samples * cost.saved / 60:,.0f} minutes, {1e3 * cost.saved:.1f} ms for each of {samples:,} "
        "slices"
    )
    fast = torch.compile(network, dynamic=False)
    try:
        with show_life("compiling"):
            call(fast)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo, Inductor, Triton and the C compiler have errors of their own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        report(f"the network cannot be compiled ({reason}): slower, with the same results")
        return network
    return fast


@contextmanager
def show_life(text: str) -> Iterator[None]:
    """Show the elapsed time, every second, during a block that reports no progress."""
    done = Event()

    def refresh() -> None:
        while not done.wait(REFRESH_SECONDS):
            bar.refresh()

    with tqdm(desc=text, bar_format="{desc}: {elapsed}", leave=False) as bar:
        thread = Thread(target=refresh)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

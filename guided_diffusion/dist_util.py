"""Distributed processes: initialisation, ranks and communication.

A single process needs no launcher; start several with torchrun or mpiexec. Values are exchanged over gloo, on the CPU;
gradients are reduced over nccl if there are GPUs.
"""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.cli import UserError

T = TypeVar("T")

# Environment variables for the number of processes: MPICH and derivatives, Open MPI, MVAPICH.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SLURM_SIZE = "SLURM_STEP_NUM_TASKS"


def setup() -> None:
    """Initialise the process group, if there are several processes, and silence stdout on all ranks but 0.

    Raises:
        UserError: if several tasks were started that cannot find each other, or torchrun's variables are damaged.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and not _init_from_mpi():
        return
    try:
        if not 0 <= int(os.environ.get("RANK", 0)) < int(os.environ.get("WORLD_SIZE", 1)):  # init would wait for long
            raise ValueError("RANK is not below WORLD_SIZE")
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
        # CPU tensors always use gloo, so that exchanging a value never waits for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        local_world_size()
    except (ValueError, dist.DistError) as error:
        remedy = "start with torchrun again, or unset TORCHELASTIC_RUN_ID for a single process"
        raise UserError(f"torchrun's environment variables are incomplete or damaged ({error}): {remedy}") from error
    if rank() > 0:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (open until exit)


def _tasks(*names: str) -> int:
    """Return the number of processes in a launcher's variables; 1 for those that are not set to a number."""
    return max(int(text) if (text := os.environ.get(name, "")).isdecimal() else 1 for name in names)


def _init_from_mpi() -> bool:
    """Set torchrun's environment variables from MPI; return False for a single process."""
    mpi = _tasks(*_MPI_SIZES)
    if max(mpi, _tasks(_SLURM_SIZE)) == 1:
        return False
    size = 1
    if mpi > 1:
        import mpi4py

        # Finalize in shut_down, not at exit, where a crashed process would wait for the others and hang the run.
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        size = MPI.COMM_WORLD.size
    if size == 1:
        raise UserError(
            "several tasks were started, but they cannot find each other: start them with torchrun "
            "(under Slurm: srun --ntasks-per-node=1 torchrun …) or with the mpiexec of the MPI that mpi4py uses"
        )
    world = MPI.COMM_WORLD
    with socket.socket() as free:
        free.bind(("", 0))
        address = world.bcast((socket.gethostname(), free.getsockname()[1]))
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address[0], str(address[1])
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(size)
    machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(machine.rank), str(machine.size)
    return True


def rank() -> int:
    """Return the rank of this process; only rank 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the rank of this process on its machine, which is also its GPU index."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def gpu_id(requested: str) -> str:
    """Return the `--gpu_id` of this process: with several, each uses its own GPU unless `cpu` was requested."""
    return requested if world_size() == 1 or requested == "cpu" else str(local_rank())


def shard(n: int) -> slice:
    """Return this process's contiguous range of n items, with ranges as even as possible."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def barrier() -> None:
    """Wait for all processes."""
    broadcast(None)


def broadcast(value: T) -> T:
    """Return the value passed by rank 0, in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """Return the values passed by all processes, ordered by rank, in every process."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor: Tensor) -> None:
    """Add up a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)


def any_of(flag: bool) -> bool:
    """Return, in every process, whether `flag` is set in any of them."""
    if world_size() == 1:
        return flag
    result = torch.tensor(int(flag))
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return bool(result)


def shut_down() -> None:
    """Destroy the process group. Call it in every process: mpiexec reports one that exits without it as failed."""
    if dist.is_initialized():
        # After the last exchange, a gloo thread still needs the interpreter to free its tensors, and aborts the process
        # if Python exits first. It takes microseconds, longer on busy cores, and there is nothing to wait on.
        time.sleep(0.3)
        dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()

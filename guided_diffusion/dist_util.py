"""Several processes: how they were launched, which is which, and how they exchange values.

One process needs no launcher. Several are started by torchrun or by mpiexec. What is exchanged here goes over gloo, on
the CPU; gradients go over nccl where there are GPUs.
"""

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from utils.cli import UserError

T = TypeVar("T")

# Where MPI launchers put the number of processes: MPICH and its relatives, Open MPI, MVAPICH.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SLURM_SIZE = "SLURM_STEP_NUM_TASKS"


def setup() -> None:
    """Join the other processes, if there are any. Call it once, before anything else here.

    Of several processes only the first prints to stdout. A UserError if several tasks do not know of each other.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ and not _described_by_mpi():
        return
    on_gpus = torch.cuda.is_available()
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    # Tensors on the CPU go over gloo in any case, so that nothing said between processes has to wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    if rank() > 0:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  (until the process ends)


def _described_by_mpi() -> bool:
    """Set torchrun's variables from what MPI knows; False if this process is alone."""
    mpi = max(int(os.environ.get(name, 1)) for name in _MPI_SIZES)
    if max(mpi, int(os.environ.get(_SLURM_SIZE, 1))) == 1:
        return False
    size = 1
    if mpi > 1:
        import mpi4py

        # A process that dies must not wait in MPI's farewell for the others, so that mpiexec ends them: see shut_down.
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        size = MPI.COMM_WORLD.size
    if size == 1:
        raise UserError(
            "several tasks were started, and each believes itself alone: start them by torchrun "
            "(under Slurm: srun --ntasks-per-node=1 torchrun …), or by the mpiexec of the MPI that mpi4py uses"
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
    """The rank of this process, 0 … world_size − 1; only rank 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The rank of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def gpu_id(asked: str) -> str:
    """What `--gpu_id` means in this process: of several, each has a GPU of its own, unless `cpu` was asked for."""
    return asked if world_size() == 1 or asked == "cpu" else str(local_rank())


def share(n: int) -> slice:
    """The contiguous range of n items that belongs to this process; ranges are as even as possible."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def barrier() -> None:
    """Wait until all processes are here."""
    broadcast(None)


def broadcast(value: T) -> T:
    """The value that process 0 passes, in all processes."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather(value: T) -> list[T]:
    """The values that the processes pass, in the order of their ranks, in all processes."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether any process says so, in all processes."""
    if world_size() == 1:
        return flag
    said = torch.tensor(int(flag))
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said)


def shut_down() -> None:
    """Leave the group of processes, all together. To mpiexec, a process that ends without this has failed."""
    if dist.is_initialized():
        # After the last exchange, a thread of gloo's still frees its tensors, for which it needs the interpreter: if
        # Python ends first, it aborts the process. That takes microseconds, on busy cores longer, and nothing tells.
        time.sleep(0.3)
        dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:
        sys.modules["mpi4py.MPI"].Finalize()

"""Ranks, devices and communication of a single process and of several started by torchrun or mpiexec."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from guided_diffusion import dist_util
from utils.cli import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

# Each process writes its ranks and the results of communication.
SCRIPT = """
import json, sys, time
from pathlib import Path
from guided_diffusion import dist_util

dist_util.setup()
rank = dist_util.rank()
print("heard")
print("heard", file=sys.stderr)
told = {
    "rank": rank,
    "world_size": dist_util.world_size(),
    "local": [dist_util.local_rank(), dist_util.local_world_size()],
    "gpu_id": [dist_util.gpu_id("0"), dist_util.gpu_id("cpu")],
    "share": list(range(7))[dist_util.shard(7)],
    "broadcast": dist_util.broadcast(f"by {rank}"),
    "gather": dist_util.gather(f"by {rank}"),
    "any_of": [dist_util.any_of(rank == 1), dist_util.any_of(False), dist_util.any_of(True)],
    "mpi4py": "mpi4py" in sys.modules,
}
dist_util.barrier()
dist_util.shut_down()
time.sleep(0.5 * (told["world_size"] - 1 - rank))  # the first process, which writes, goes on alone
Path(f"{rank}.json").write_text(json.dumps(told))
"""


def run_script(folder: Path, *launcher: str, **environment: str) -> tuple[list[dict], subprocess.CompletedProcess]:
    """Run SCRIPT in each process; return their records in order of rank, and the finished job."""
    (folder / "tell.py").write_text(SCRIPT, encoding="utf-8")
    binaries = Path(sys.executable).parent
    command = [str(binaries / launcher[0]), *launcher[1:]] if launcher else [sys.executable]
    done = subprocess.run(
        [*command, "tell.py"],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))], done


def test_single_process(tmp_path):
    (record,), done = run_script(tmp_path)
    assert record == {
        "rank": 0,
        "world_size": 1,
        "local": [0, 1],
        "gpu_id": ["0", "cpu"],
        "share": list(range(7)),
        "broadcast": "by 0",
        "gather": ["by 0"],
        "any_of": [False, False, True],
        "mpi4py": False,
    }
    assert done.stdout == done.stderr == "heard\n"


@pytest.mark.parametrize(("launcher", "n"), [("torchrun", 2), ("mpiexec", 3)])
def test_several_processes(tmp_path, launcher, n):
    if launcher == "torchrun":  # under Slurm, with srun starting one torchrun on each of two machines
        how = ("torchrun", "--standalone", f"--nproc-per-node={n}")
        records, done = run_script(tmp_path, *how, SLURM_STEP_NUM_TASKS="2")
    else:
        records, done = run_script(tmp_path, "mpiexec", "-n", str(n), sys.executable)
    shares = {2: [[0, 1, 2], [3, 4, 5, 6]], 3: [[0, 1], [2, 3], [4, 5, 6]]}[n]
    assert records == [
        {
            "rank": rank,
            "world_size": n,
            "local": [rank, n],
            "gpu_id": [str(rank), "cpu"],
            "share": shares[rank],
            "broadcast": "by 0",
            "gather": [f"by {i}" for i in range(n)],
            "any_of": [True, False, True],
            "mpi4py": launcher == "mpiexec",
        }
        for rank in range(n)
    ]
    assert done.stdout.count("heard") == 1
    assert done.stderr.count("heard") == n


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_launcher_of_another_mpi_than_mpi4pys_is_refused(variable):
    """tests/scripts/test_distributed.py tests the error of the scripts."""
    done = subprocess.run(
        [sys.executable, "-c", "from guided_diffusion import dist_util; dist_util.setup()"],
        cwd=REPOSITORY,
        env=os.environ | {variable: "2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "UserError: several tasks were started, but they cannot find each other" in done.stderr


@pytest.mark.parametrize("value", ["", "x", "-3", "0", "1", "2.5", "²"])
@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_variable_without_a_number_of_processes_is_ignored(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    dist_util.setup()
    assert dist_util.world_size() == 1


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29777", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dict.fromkeys(TORCHRUN), "RANK expected"),
        *[({name: "x"}, "'x'") for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")],
        *[({"RANK": rank}, "RANK is not below WORLD_SIZE") for rank in ("1", "-1")],
        ({"MASTER_PORT": "in use"}, "address already in use"),
    ],
)
def test_damaged_variables_of_torchrun_are_refused(monkeypatch, damage, message):
    """TORCHELASTIC_RUN_ID alone, for example, as a shell may keep it from an earlier job."""
    with socket.create_server(("localhost", 0)) as server:
        for name, value in ({"TORCHELASTIC_RUN_ID": "none"} | TORCHRUN | damage).items():
            value = str(server.getsockname()[1]) if value == "in use" else value
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"incomplete or damaged .*{message}.* unset TORCHELASTIC_RUN_ID"):
            dist_util.setup()
    dist_util.shut_down()


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 5, 7, 139])
def test_shares_are_contiguous_and_even(monkeypatch, processes, n):
    monkeypatch.setattr(dist_util, "world_size", lambda: processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        shares.append(range(n)[dist_util.shard(n)])
    assert [i for share in shares for i in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1

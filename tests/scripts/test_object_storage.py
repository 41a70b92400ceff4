"""Training, testing and prediction on object storage, against Azurite, a local emulator of Azure Blob Storage.

The tests are skipped without Azurite, which `make azurite` installs from npm.
"""

import csv
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import blobfile
import pytest
import torch

from utils.storage import Mirror, StorageError

pytestmark = pytest.mark.xdist_group("predict")  # one worker, so that the cohort is built once

TRAIN, TEST = "modality_cyclic_train.py", "modality_cyclic_test.py"
FORWARD, BACKWARD = "unet_forward_phantom_t2_flair", "unet_backward_phantom_t2_flair"
ACCOUNT = "devstoreaccount1"  # Azurite's public account and key
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
TWENTY = ("--config.score_model.training.iterations=20", "--config.score_model.training.save_interval=5")

# Redirect blobfile from Azure to the server at PORT, and send this process SIGNAL before the first upload to AT.
REDIRECT = """
import os
import urllib.parse

import blobfile
import urllib3


class Loopback(urllib3.PoolManager):
    asked = []

    def request(self, method, url, headers, **kwargs):
        global SIGNAL
        address = urllib.parse.urlsplit(url)
        path = urllib.parse.unquote(address.path)
        self.asked.append((method, path))
        if SIGNAL and method == "PUT" and path.endswith(AT):
            number, SIGNAL = SIGNAL, 0
            os.kill(os.getpid(), number)
        url = urllib.parse.urlunsplit(("http", f"127.0.0.1:{PORT}", address.path, address.query, ""))
        return super().request(method, url, headers={**(headers or {}), "Host": address.netloc}, **kwargs)


pool = Loopback()
original = blobfile.create_context
blobfile.create_context = lambda **kwargs: original(**kwargs | {"get_http_pool": lambda: pool, "retry_limit": 2})
"""
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def port(tmp_path_factory) -> Iterator[int]:
    """Port of an in-memory Azurite server."""
    azurite = os.environ.get("AZURITE") or shutil.which("azurite-blob")
    if not azurite or not shutil.which("node"):
        pytest.skip("no Azurite: `make azurite` installs it, and AZURITE says where it is")
    command = [azurite, "--blobHost", "127.0.0.1", "--blobPort", "0", "--inMemoryPersistence", "--disableTelemetry"]
    folder = tmp_path_factory.mktemp("azurite")
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = next((line for line in server.stdout if "listens on" in line), None)
            assert line, "Azurite did not start"
            yield int(line.strip().rpartition(":")[2])
        finally:
            server.terminate()
            server.stdout.read()  # drain the pipe, or a full one would block the server


@pytest.fixture
def calls(port, monkeypatch, tmp_path) -> list[tuple[str, str]]:
    """Redirect this process to Azurite, with credentials; return its requests as a growing list of (method, path)."""
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # a killed process leaves its local mirror behind
    monkeypatch.setattr(blobfile, "create_context", blobfile.create_context)  # restored afterwards
    monkeypatch.setattr(blobfile._azure.access_token_manager, "_tokens", {})
    monkeypatch.setattr(blobfile._azure.access_token_manager, "_expirations", {})
    names = {"PORT": port, "SIGNAL": 0, "AT": ""}
    exec(REDIRECT, names)
    return names["pool"].asked


@pytest.fixture
def logdir(calls) -> str:
    """An address in a new container."""
    from blobfile import _azure as azure

    container = f"experiments-{uuid.uuid4()}"
    context = blobfile.create_context(save_access_token_to_disk=False)
    url = azure.build_url(ACCOUNT, "/{container}", container=container)
    made = blobfile.Request(url=url, method="PUT", params={"restype": "container"}, success_codes=(201,))
    azure.execute_api_request(context._conf, made)
    calls.clear()
    return f"az://{ACCOUNT}/{container}/a/b"


def interrupted(as_subprocess, port: int, signal: int, at: str, *command: object, cwd: Path):
    code = f"PORT, SIGNAL, AT = {port}, {signal}, {at!r}\n{REDIRECT}{RUN}"
    return as_subprocess("-c", code, *command, cwd=cwd)


def names(logdir: str, folder: str) -> set[str]:
    context = blobfile.create_context(save_access_token_to_disk=False)
    return {name for name in context.listdir(f"{logdir}/{folder}") if not name.startswith("events")}


def fetch(address: str, target: Path) -> Path:
    blobfile.create_context(save_access_token_to_disk=False).copy(address, str(target), overwrite=True)
    return target


def read_losses(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


def test_killed_stopped_and_resumed_training_equals_local_training(
    port, calls, logdir, repository, workspace, tiny, short, in_process, as_subprocess, tmp_path
):
    flags = (*tiny, *short, *TWENTY, "--config.score_model.training.keep_last=2")
    local = tmp_path / "local"
    done = in_process(TRAIN, *flags, f"--logdir={local}", cwd=workspace)
    assert done.code == 0, done.stderr
    assert calls == []

    remote = (repository / TRAIN, *flags, f"--logdir={logdir}")
    killed = interrupted(as_subprocess, port, 9, "/ema_0.5_000010.pt", *remote, cwd=workspace)
    assert killed.code == -9
    assert f"{logdir} has no locks" in killed.stdout
    sets = {f"{kind}000005.pt" for kind in ("model", "ema_0.5_", "opt")}
    found = names(logdir, FORWARD)
    assert found == {*sets, "config.json", "log.txt", "progress.csv"}, killed.stderr  # no file of the second checkpoint

    stopped = interrupted(as_subprocess, port, 15, "/model000010.pt", *remote, cwd=workspace)
    assert stopped.code == 143, stopped.stderr
    assert "resuming from opt000005.pt" in stopped.stdout
    assert {"opt000010.pt", "opt000011.pt"} < names(logdir, FORWARD)
    assert "opt000005.pt" not in names(logdir, FORWARD)

    calls.clear()
    done = in_process(*remote, cwd=workspace)
    assert done.code == 0, done.stderr
    assert "resuming from opt000011.pt" in done.stdout
    assert f"done, all in {logdir}/{FORWARD}" in done.stdout
    assert [path[-12:] for method, path in calls if method == "PUT" and "/opt" in path] == [
        *["opt000015.pt"] * 2,
        *["opt000020.pt"] * 2,
    ]  # each upload: one block, then the block list

    last = {name for name in names(logdir, FORWARD) if name.endswith(".pt")}
    assert last == {path.name for path in (local / FORWARD).glob("*.pt")}
    for name in last:
        here = torch.load(local / FORWARD / name, weights_only=True)
        theirs = torch.load(fetch(f"{logdir}/{FORWARD}/{name}", tmp_path / name), weights_only=True)
        torch.testing.assert_close(theirs, here, rtol=0, atol=0)
    progress = fetch(f"{logdir}/{FORWARD}/progress.csv", tmp_path / "progress.csv")
    assert read_losses(progress) == read_losses(local / FORWARD / "progress.csv")
    log = fetch(f"{logdir}/{FORWARD}/log.txt", tmp_path / "log.txt").read_text(encoding="utf-8")
    assert log.count("resuming from opt") == 2
    assert "stopped by SIGTERM" in log


def test_a_test_run_on_object_storage_equals_a_local_one(calls, logdir, workspace, chain, in_process, tmp_path):
    context = blobfile.create_context(save_access_token_to_disk=False)
    for name in (FORWARD, BACKWARD):
        for path in (workspace / "experiments" / name).iterdir():
            if path.suffix in (".pt", ".json"):
                context.copy(str(path), f"{logdir}/{name}/{path.name}")
    calls.clear()
    for _ in range(2):  # the second run replaces the first
        done = in_process(TEST, "--dataset=phantom", "--data_dir=datasets/data", f"--logdir={logdir}", cwd=workspace)
        assert done.code == 0, done.stderr
    pulled = {
        path.split("/a/b/")[1]
        for method, path in calls
        if method == "GET" and path.endswith((".pt", ".json")) and "/results/" not in path
    }
    assert pulled == {f"{name}/{file}" for name in (FORWARD, BACKWARD) for file in ("config.json", "ema_0.5_000004.pt")}

    results = f"{logdir}/results/{FORWARD}__{BACKWARD}"
    local = workspace / "experiments/results" / f"{FORWARD}__{BACKWARD}"
    assert f"results: {results}\nfigures: {results}/figures\n" in done.stdout
    there = {path.removeprefix(f"{results}/") for path in context.glob(f"{results}/**") if "." in path}
    here = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    events = "events.out.tfevents"
    assert there - {path for path in there if events in path} == {path for path in here if events not in path}
    assert len(there) == len(here)
    ours, theirs = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (local / "metrics.json", fetch(f"{results}/metrics.json", tmp_path / "metrics.json"))
    )
    assert theirs.pop("checkpoints")["forward"] == f"{logdir}/{FORWARD}/ema_0.5_000004.pt"
    ours.pop("checkpoints")
    assert theirs == ours


def test_a_scan_is_scored_with_experiments_on_object_storage(calls, logdir, workspace, chain, in_process, tmp_path):
    context = blobfile.create_context(save_access_token_to_disk=False)
    results = f"results/{FORWARD}__{BACKWARD}"
    for name in (FORWARD, BACKWARD, results):
        for path in (workspace / "experiments" / name).iterdir():
            if path.suffix in (".pt", ".json"):
                context.copy(str(path), f"{logdir}/{name}/{path.name}")
    calls.clear()
    scan = next((workspace / "datasets").glob("*/*/*_flair.nii.gz"))
    flags = ("--dataset=phantom", f"--scan={scan}", f"--output_dir={tmp_path / 'out'}", "--slices", 70, 72)
    done = in_process("modality_cyclic_predict.py", *flags, f"--logdir={logdir}", cwd=workspace)
    assert done.code == 0, done.stderr
    assert f"the validation threshold in {logdir}/{results}/metrics.json" in done.stdout
    assert len(list((tmp_path / "out").iterdir())) == 3
    assert {method for method, _ in calls} <= {"GET", "HEAD"}  # nothing is written there
    pulled = {path.split("/a/b/")[1] for method, path in calls if method == "GET" and path.endswith((".pt", ".json"))}
    assert pulled == {
        *(f"{name}/{file}" for name in (FORWARD, BACKWARD) for file in ("config.json", "ema_0.5_000004.pt")),
        f"{results}/metrics.json",
    }


def test_training_survives_a_failed_push(calls, logdir, workspace, tiny, short, in_process, monkeypatch):
    push, pushes = Mirror.push, []

    def fail_once(mirror: Mirror) -> None:
        pushes.append(mirror)
        if len(pushes) == 2:  # the first pushes config.json
            raise StorageError("no network")
        push(mirror)

    monkeypatch.setattr(Mirror, "push", fail_once)
    done = in_process(TRAIN, *tiny, *short, f"--logdir={logdir}", cwd=workspace)
    assert done.code == 0, done.stderr
    assert "warning: no network; the next save tries again" in done.stdout
    assert {"opt000002.pt", "opt000004.pt"} < names(logdir, FORWARD)


def expect_refusal(done, *phrases: str) -> None:
    assert done.code == 2
    assert "Traceback" not in done.stderr
    *_, line = done.stderr.splitlines()  # a progress bar may precede it
    for phrase in ("error: ", *phrases):
        assert phrase in line


def test_errors_are_one_sentence(calls, logdir, workspace, tiny, short, in_process, monkeypatch):
    nowhere = f"az://{ACCOUNT}/nowhere/a"
    done = in_process(TRAIN, *tiny, *short, f"--logdir={nowhere}", cwd=workspace)
    expect_refusal(done, nowhere, "cannot be written to", "No such file or container")
    assert "saved" not in done.stdout  # refused before training begins
    done = in_process(TEST, "--dataset=phantom", "--data_dir=datasets/data", f"--logdir={logdir}", cwd=workspace)
    expect_refusal(done, f"no experiment '{FORWARD}' in {logdir}; train it first")
    done = in_process(TEST, f"--rescore={logdir}/results/a", cwd=workspace)
    expect_refusal(done, "copy it here first")

    monkeypatch.setattr(blobfile._azure.access_token_manager, "_tokens", {})
    monkeypatch.setattr(blobfile._azure.access_token_manager, "_expirations", {})
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY.replace("Eby8", "AAAA"))
    done = in_process(TRAIN, *tiny, *short, f"--logdir={logdir}", cwd=workspace)
    expect_refusal(done, logdir, "cannot be read", "credentials")

"""When networks are compiled, and what is said about it; nothing is compiled here."""

import time

import pytest
import torch
from torch import nn

from utils import compiling
from utils.compiling import PASSES, TRAINING, Compilation, compiled, show_life

GPU = torch.device("cuda", 0)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """Pretend that Triton and a C compiler are installed, and that compiling wraps a network in a list of calls."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: "/bin/cc")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: nn.Sequential(network))


def test_it_pays_if_it_saves_more_than_it_takes(monkeypatch):
    cost = Compilation(seconds=10, saved=0.01)
    assert not cost.pays(GPU, 1000)
    assert cost.pays(GPU, 1001)
    assert not cost.pays(torch.device("cpu"), 10**9)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not cost.pays(GPU, 1001)


def test_the_papers_runs_are_compiled_and_short_ones_are_not():
    assert TRAINING.pays(GPU, 32 * 100_000)
    assert not TRAINING.pays(GPU, 4 * 1_200)  # the demo's
    assert PASSES.pays(GPU, 139 * 11_413)
    assert not PASSES.pays(GPU, 139 * 171)  # --sampling fast


def test_compiling_is_announced_with_its_time_and_gain(tools, said, tmp_path):
    network = nn.Linear(1, 1)
    fast = compiled(network, lambda network: network(torch.ones(1, 1)), 3_200_000, TRAINING, said.append)
    assert fast[0] is network
    assert said == [
        f"compiling the network: about 180 s at first, less if {tmp_path} has it from an earlier run. "
        "It saves about 33 minutes, 0.6 ms for each of 3,200,000 slices"
    ]


@pytest.mark.parametrize("missing", ["find_spec", "which"])
def test_without_tools_nothing_is_compiled(tools, said, monkeypatch, missing):
    monkeypatch.setattr({"find_spec": "importlib.util.find_spec", "which": "shutil.which"}[missing], lambda name: None)
    network = nn.Identity()
    assert compiled(network, pytest.fail, 10, PASSES, said.append) is network
    assert said == ["networks are not compiled (Triton or a C compiler is missing): slower, with the same results"]


def test_a_network_that_cannot_be_compiled_is_used_as_it_is(tools, said):
    def fail(network):
        raise ValueError("\nno header Python.h\nmuch more")

    network = nn.Identity()
    assert compiled(network, fail, 10, PASSES, said.append) is network
    assert said[1:] == ["the network cannot be compiled (no header Python.h): slower, with the same results"]


def test_memory_errors_are_not_swallowed(tools, said):
    def fail(network):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        compiled(nn.Identity(), fail, 10, PASSES, said.append)


def test_waiting_shows_the_elapsed_time(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "REFRESH_SECONDS", 0.01)
    with show_life("compiling"):
        time.sleep(1.2)
    shown = capsys.readouterr().err
    assert "compiling: 00:00" in shown
    assert "compiling: 00:01" in shown

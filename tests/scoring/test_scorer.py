"""Batch sizes of scoring are limited by the memory of a CPU."""

import pytest
import torch

from config import get_config
from models import load_method
from models.training import bytes_a_sample
from scoring import scorer
from scoring.chain import Chain, TrainedTranslator
from utils import recording
from utils.cli import UserError
from utils.compiling import Compilation

CPU = torch.device("cpu")


@pytest.fixture
def chain(tmp_path) -> Chain:
    """Cyclic UNet with the same untrained weights in both directions, and a batch size beyond any memory."""
    config = get_config("phantom")
    config.data.image_size = 16
    config.score_model.model.update({"model_channels": 8, "channel_mult": (1, 1), "norm_groups": 4, "num_heads": 1})
    config.score_model.sampling.batch_size = 10**12
    torch.manual_seed(0)
    torch.save(load_method("unet").create_network(config.score_model).state_dict(), tmp_path / "ema.pt")
    translator = TrainedTranslator("translator", tmp_path / "ema.pt", config, {})
    return Chain("unet", translator, translator)


def test_batch_size_is_limited_by_memory(chain, monkeypatch):
    monkeypatch.setattr(scorer, "available_memory", lambda: 3 * bytes_a_sample(load_method("unet"), chain.config) + 1)
    found = scorer.Scorer(chain, CPU)
    assert found.batch_size == 3
    image = torch.randn(7, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    in_threes = found.cycle(image, image > 0, image)
    found.batch_size = 7
    assert torch.allclose(found.cycle(image, image > 0, image).error, in_threes.error, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(scorer, "available_memory", lambda: 0)
    assert scorer.Scorer(chain, CPU).batch_size == 1


def test_a_batch_size_that_fits_is_kept(chain):
    chain.config.score_model.sampling.batch_size = 2
    assert scorer.Scorer(chain, CPU).batch_size == 2


@pytest.mark.parametrize(
    ("image_size", "available", "message"),
    [
        (16, 10**3, "the network of .*ema.pt needs .* --config.score_model.model.model_channels"),
        (2**14, 10**9, "a network pass of one slice needs .* --config.data.image_size"),
    ],
)
def test_what_no_memory_holds_is_refused_at_once(chain, monkeypatch, image_size, available, message):
    monkeypatch.setattr("utils.device.available_memory", lambda: available)
    chain.config.data.image_size = image_size
    with pytest.raises(UserError, match=message):
        scorer.Scorer(chain, CPU)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_scores_on_a_gpu_equal_those_of_a_cpu(chain, graphs, monkeypatch, precision):
    """With stand-ins for CUDA graphs: both networks run all passes in one shape, in bfloat16 with copied weights."""
    chain.config.score_model.sampling.batch_size = 2
    image = torch.randn(15, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as as_on_a_cpu:
        as_on_a_cpu.setattr(recording, "available", lambda device: False)
        expected = scorer.Scorer(chain, CPU).cycle(image, image > 0, image)
    monkeypatch.setattr(scorer, "pick_precision", lambda name, device: precision)
    found = scorer.Scorer(chain, CPU)
    assert found.forward.size is None
    error = found.cycle(image, image > 0, image).error
    assert found.forward.size == 2
    assert len(graphs) == 2
    assert {parameter.dtype for parameter in found.forward.parameters()} == {precision}
    exact = precision == torch.float32
    torch.testing.assert_close(error, expected.error, rtol=1e-4 if exact else 0.1, atol=1e-5 if exact else 0.05)


def test_networks_are_compiled_if_the_announced_passes_repay_it(chain, graphs, monkeypatch):
    compiled = []

    def compile(network, call, samples, cost):
        compiled.append(samples)
        call(network)
        return network

    monkeypatch.setattr("utils.compiling.compiled", compile)
    monkeypatch.setattr(Compilation, "pays", lambda cost, device, samples: samples >= 40)
    chain.config.score_model.sampling.batch_size = 4
    image = torch.randn(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for announced in (image, torch.cat([image, image])):
        found = scorer.Scorer(chain, CPU)
        scorer.print_cost(found, announced > 0)
        found.cycle(image, image > 0, image)
    assert compiled == [40, 40]  # forward and backward

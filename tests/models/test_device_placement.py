"""Device placement, tested without a GPU on torch's meta device.

Operations on it are checked but not computed: they fail if they mix devices or need a value on the host. Blocking
copies are recorded here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import config as configs
from guided_diffusion.logger import NullLogger
from guided_diffusion.train_util import TrainLoop
from models import load_method
from models.cycle import modality_cycle
from models.masks import sweep
from models.mmccd import mmccd
from models.training import create_losses

META = torch.device("meta")
SIZE = 32


class CopyRecorder(TorchDispatchMode):
    """Records the operations that copy between devices and block the host."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        tensors = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
        moves = "copy" in str(function) or "index" in str(function)  # an index on the CPU is copied to the device
        if moves and len({one.device for one in tensors}) > 1 and not kwargs.get("non_blocking"):
            self.found.append(str(function))
        return out


class ListRecorder(TorchFunctionMode):
    """Records tensors and indices made from Python numbers on a device other than the CPU, which are copies, too."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        makes = function in (torch.tensor, torch.as_tensor) and out.device.type != "cpu"
        indexes = function in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type != "cpu"
        if makes or (indexes and isinstance(args[1], list)):
            self.found.append(str(function))
        return out


@contextmanager
def blocking_copies() -> Iterator[list[str]]:
    """Record the copies in the block that the host would wait for."""
    found: list[str] = []
    with CopyRecorder(found), ListRecorder(found):
        yield found


@pytest.fixture
def small_config():
    config = configs.get_config("phantom")
    config.data.image_size = SIZE
    config.score_model.training.batch_size = 3
    config.score_model.sampling.batch_size = 5
    return config


def slices(n: int = 3) -> Tensor:
    return torch.zeros(n, 1, SIZE, SIZE, device=META)


def test_blocking_copies_and_mixed_devices_are_found():
    with blocking_copies() as copies:
        torch.zeros(2).to(META, non_blocking=True)
        assert copies == []
        torch.zeros(2).to(META)
        slices().copy_(torch.zeros(SIZE))
        slices()[torch.tensor([0, 2])]
        slices()[[0, 2]]
        torch.tensor([0, 2], device=META)
        assert len(copies) == 5
    with pytest.raises(RuntimeError, match="device"):
        slices() + torch.zeros(SIZE)
    with pytest.raises(RuntimeError, match="meta"):
        slices().sum().item()


@pytest.mark.parametrize("model_name", ["unet", "diffusion", "autoencoder", "dae", "ddpm"])
def test_training_step_has_no_blocking_copies(model_name, small_config, tmp_path):
    losses, draws, schedule_sampler = create_losses(load_method(model_name), small_config, META)
    batch = (slices(), slices())
    loop = TrainLoop(
        model=load_method(model_name).create_network(small_config.score_model).to(META),
        compute_losses=losses,
        inputs_of=lambda batch, step: (*batch, *draws(step)),
        batches_from=lambda step: repeat(batch),
        directory=tmp_path,
        logger=NullLogger(),
        settings=small_config.score_model.training,
        precision=torch.float32,
        seed=0,
        schedule_sampler=schedule_sampler,
        on_save=lambda network, step: None,
    )
    loop.train_step.optimizer = torch.optim.AdamW(
        loop.train_step.trained, foreach=True, capturable=False
    )  # fused: not on meta
    loop._train_step(batch)  # copies the schedules to the device
    with blocking_copies() as copies:
        loop._train_step(batch)
    assert copies == []


@pytest.mark.parametrize("use_ddim", [True, False])
def test_sweep_has_no_blocking_copies(use_ddim, small_config):
    small_config.score_model.sampling.use_ddim = use_ddim
    small_config.score_model.sampling.timestep_respacing = "4"
    forward, backward = (
        load_method(name).create_network(small_config.score_model).to(META).eval() for name in ("diffusion", "unet")
    )
    translator = load_method("diffusion").create_translator(forward, small_config)
    brainmask = torch.zeros(2, 1, SIZE, SIZE, dtype=torch.bool)
    brainmask[:, :, 8:20, 8:20] = True
    how = {"bands": sweep(SIZE, 8), "batch_size": 3}
    mmccd(slices(2), brainmask, translator, backward, **how)
    with blocking_copies() as copies:
        cycle = mmccd(slices(2), brainmask, translator, backward, **how)
    assert copies == []
    assert cycle.error.device == META


@pytest.mark.parametrize("model_name", ["unet", "autoencoder", "ddpm", "histogram"])
def test_pass_has_no_blocking_copies(model_name, small_config):
    small_config.score_model.sampling.timestep_respacing = "4"
    network = load_method(model_name).create_network(small_config.score_model).to(META).eval()
    forward = load_method(model_name).create_translator(network, small_config)
    modality_cycle(slices(), forward, torch.nn.Identity(), batch_size=2)
    with blocking_copies() as copies:
        modality_cycle(slices(), forward, torch.nn.Identity(), batch_size=2)
    assert copies == []

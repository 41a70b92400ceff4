"""The timed work: untrained networks and their inputs, a network pass, a training step.

Torch is imported inside the functions, so that `--help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[..., object]


def untrained_network(model_name: str, config: Any) -> Any:
    """Return a translator's initial network, except that layers initialised to 0 get random weights, too."""
    import torch
    from torch import nn

    from models import load_method

    torch.manual_seed(config.seed)
    network = load_method(model_name).create_network(config.score_model)
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and not (module.weight.is_meta or module.weight.any()):
            module.reset_parameters()
    return network


def network_inputs(config: Any, batch_size: int, device: Any) -> tuple:
    """Return x_t, t and the condition of a batch for the masked conditional UNet."""
    import torch

    from models.masked_diffusion import masked_condition

    x_t, image, noise = random_images(3, batch_size, config).to(device)
    t = torch.arange(batch_size, device=device)
    mask = torch.zeros_like(image, dtype=torch.bool)
    mask[:, :, : config.score_model.mask.width] = True
    return x_t, t, masked_condition(image, mask, noise)


def random_images(kinds: int, batch_size: int, config: Any) -> Any:
    """Return noise [kinds, batch_size, 1, H, W], the same in every process."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(kinds, batch_size, 1, *[config.data.image_size] * 2, generator=generator)


def count_flops(config: Any, *, training: bool) -> int:
    """Return the FLOP of the masked conditional UNet for one sample: forward, or in training forward and backward.

    Torch counts products and convolutions, a multiply-add as 2, on the meta device. It counts those of the plain
    network, because fused attention kernels hide their products.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.shared.reference import plain_network

    with torch.device("meta"):
        network = plain_network(untrained_network("diffusion", config))
    inputs = network_inputs(config, 1, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        output = network(*inputs)
        if training:
            output.sum().backward()
    return counter.get_total_flops()


def prepare_optimised_pass(config: Any, batch_size: int, device: Any, samples: int = 0) -> Work:
    """Return a pass of the masked conditional UNet as in modality_cyclic_test.py with so many samples to come."""
    import torch

    from utils.device import autocast, pick_precision, speed_up_passes

    precision = pick_precision(config.precision, device)
    network = speed_up_passes(untrained_network("diffusion", config), device, precision, lambda: samples)
    inputs = network_inputs(config, batch_size, device)

    @torch.inference_mode()
    def work() -> Any:
        with autocast(device, precision):
            return network(*inputs)

    return work


def prepare_optimised_step(config: Any, batch_size: int, device: Any, samples: int = 0) -> Work:
    """Return a function that does one step of the training loop as in modality_cyclic_train.py.

    It is compiled if there are `samples` to come over which that pays.
    """
    from itertools import repeat
    from types import SimpleNamespace

    from guided_diffusion.train_util import TrainLoop
    from utils.device import pick_precision, speed_up

    training = config.score_model.training
    losses, inputs_of = create_problem(config, batch_size, device)
    loop = TrainLoop(
        model=speed_up(untrained_network("diffusion", config), device, training=True),
        compute_losses=losses,
        batches_from=lambda step: repeat(None),
        inputs_of=lambda batch, step: inputs_of(step),
        directory=Path(),
        logger=SimpleNamespace(info=print),  # single steps do not save or resume
        settings=training,
        precision=pick_precision(config.precision, device),
        seed=config.seed,
        compile_for=samples,
        on_save=lambda network, step: None,
    )
    loop.train_step.train()
    return lambda: loop._train_step(None)


def create_problem(config: Any, batch_size: int, device: Any) -> tuple:
    """Return the masked diffusion's losses, (model, *inputs) → [N], and a function of the step that returns inputs."""
    from models import load_method
    from models.training import create_losses
    from utils.device import to_device

    losses, draws, _ = create_losses(load_method("diffusion"), config, device)
    images = random_images(2, batch_size, config)
    return losses, lambda step: [*to_device(images, device), *draws(step)]

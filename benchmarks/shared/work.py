"""The work that benchmarks time: networks, what goes into them, a network pass, a training step.

Torch is imported where it is used, so that the scripts answer to `--help` at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[..., object]


def untrained_network(model_name: str, config: Any) -> Any:
    """A translator's network as training begins with it, but for the layers that start at 0: they are drawn, too."""
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
    """x_t, t and the condition of a batch for the masked conditional UNet."""
    import torch

    from models.masked_diffusion import masked_condition

    x_t, image, noise = random_images(3, batch_size, config).to(device)
    t = torch.arange(batch_size, device=device)
    mask = torch.zeros_like(image, dtype=torch.bool)
    mask[:, :, : config.score_model.mask.width] = True
    return x_t, t, masked_condition(image, mask, noise)


def random_images(kinds: int, batch_size: int, config: Any) -> Any:
    """Noise the size of slices, the same in every process: [kinds, batch_size, 1, H, W]."""
    import torch

    generator = torch.Generator().manual_seed(config.seed)
    return torch.randn(kinds, batch_size, 1, *[config.data.image_size] * 2, generator=generator)


def count_flops(config: Any, *, training: bool) -> int:
    """What the masked conditional UNet computes for one sample, forward or (in training) forward and backward.

    Torch counts products and convolutions, a multiply-add as 2. It is the plain network that is counted, as attention's
    fused kernels hide their products; nothing is computed for it.
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


def prepare_optimised_pass(config: Any, batch_size: int, device: Any) -> Work:
    """The masked conditional UNet as modality_cyclic_test.py computes it."""
    import torch

    from utils.device import WORTH_COMPILING, autocast, compile_if_it_pays, pick_precision, speed_up

    network = speed_up(untrained_network("diffusion", config).eval(), device, training=False)
    compile_if_it_pays(network, device, WORTH_COMPILING)
    inputs = network_inputs(config, batch_size, device)
    precision = pick_precision(config.precision, device)

    @torch.inference_mode()
    def work() -> Any:
        with autocast(device, precision):
            return network(*inputs)

    return work


def prepare_optimised_step(config: Any, batch_size: int, device: Any) -> Work:
    """Steps of the training loop as modality_cyclic_train.py sets it up, one for each call."""
    from utils.device import compile_if_it_pays, speed_up

    network = speed_up(untrained_network("diffusion", config), device, training=True)
    compile_if_it_pays(network, device, config.score_model.training.iterations)
    return training_steps(network, config, batch_size, device)


def training_steps(network: Any, config: Any, batch_size: int, device: Any) -> Work:
    """Steps of the training loop for a network on its device, one for each call."""
    from itertools import repeat

    from guided_diffusion.train_util import TrainLoop
    from utils.device import pick_precision

    training = config.score_model.training
    batch, compute_losses = create_problem(config, batch_size, device)
    loop = TrainLoop(
        model=network,
        compute_losses=compute_losses,
        batches_from=lambda step: repeat(batch),
        directory=Path(),
        logger=None,  # single steps neither log nor save nor resume
        settings=training,
        precision=pick_precision(config.precision, device),
        seed=config.seed,
        on_save=lambda network, step: None,
    )
    loop.model.train()
    return lambda: loop._train_step(batch)


def create_problem(config: Any, batch_size: int, device: Any) -> tuple:
    """A batch of two modalities, and what training minimises on it: losses of (model, batch, step)."""
    from models import load_method
    from models.training import create_losses

    losses, _ = create_losses(load_method("diffusion"), config, device)
    return random_images(2, batch_size, config), lambda model, batch, step: losses(
        model, *batch.to(device, non_blocking=True), step
    )

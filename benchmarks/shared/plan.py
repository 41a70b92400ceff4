"""Which trainings a method takes, and where they are: for benchmarks that compare methods over inputs and seeds."""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

from models import METHODS as ENTRIES
from models import load_method

from .points import run_training

# The methods that can be compared, baselines first: --model_name, and the flags of testing.
ONE_WAY = {f"one_way_{name}": (name, "--score=one_way") for name, entry in ENTRIES.items() if entry.translates}
METHODS = {
    **{entry.key: (name,) for name, entry in ENTRIES.items() if not entry.translates},
    **{entry.key: (name, "--sampling=fast") for name, entry in ENTRIES.items() if entry.translates},
    **ONE_WAY,
}
DEFAULT_METHODS = [*(method for method in METHODS if method not in ONE_WAY), next(iter(ONE_WAY))]


def translates(method: str) -> bool:
    """Whether a method translates to another modality."""
    return ENTRIES[METHODS[method][0]].translates


class Training(NamedTuple):
    """One experiment, in the folder of its seed."""

    seed: int
    model_name: str
    process: str
    input: str
    trans: str | None  # none for a baseline


def needed(args: argparse.Namespace, input: str, trans: str, method: str, seed: int) -> Iterator[Training]:
    """The trainings that a test takes, forward first. Networks of one cycle serve another the other way around."""
    model_name = METHODS[method][0]
    entry = ENTRIES[model_name]
    if not entry.translates:
        yield Training(seed, model_name, "forward", input, None)
        return
    if entry.backward:  # a forward network serves no other cycle
        yield Training(seed, model_name, "forward", input, trans)
    ways = [(input, trans)] * (not entry.backward) + [(trans, input)] * (method not in ONE_WAY)
    for source, target in ways:
        cycle = next(cycle for cycle in args.cycles if set(cycle) == {source, target})
        process = "forward" if cycle == (source, target) else "backward"
        yield Training(seed, entry.backward or model_name, process, *cycle)


def ended(args: argparse.Namespace, training: Training, iterations: int) -> bool:
    """Whether a training has saved its last step."""
    from guided_diffusion.checkpoint import saved

    steps = saved(args.logdir / f"seed{training.seed}" / name_of(args, training))
    return bool(steps) and (load_method(training.model_name).fit is not None or max(steps) >= iterations)


def name_of(args: argparse.Namespace, training: Training) -> str:
    from utils.experiment import experiment_name

    _, model_name, process, input, trans = training
    return experiment_name(model_name, process, args.dataset, trans or input, input)


def flags_of(args: argparse.Namespace, seed: int, model_name: str, input: str, trans: str | None) -> list[str]:
    """What training and testing share."""
    return [
        *(f"--dataset={args.dataset}", f"--data_dir={args.data_dir}", f"--gpu_id={args.gpu_id}", f"--seed={seed}"),
        *(f"--model_name={model_name}", f"--input={input}", *([f"--trans={trans}"] if trans else [])),
    ]


def train(args: argparse.Namespace, training: Training) -> None:
    """Bring one training to its end; one that has ended already is left as it is."""
    seed, model_name, process, input, trans = training
    flags = flags_of(args, seed, model_name, input, trans)
    flags += [f"--training_process={process}", f"--logdir={args.logdir / f'seed{seed}'}"]
    if args.iterations:
        flags.append(f"--config.score_model.training.iterations={args.iterations}")
    run_training(f"{name_of(args, training)} of seed {seed}", *flags, one_thread=args.workers > 1)


def chain_of(args: argparse.Namespace, input: str, trans: str, method: str, seed: int) -> Any:
    """The trained networks of a method, chained as modality_cyclic_test.py does."""
    from scoring.chain import chain_parser, find_chain
    from utils.storage import Folder

    model_name, *how = METHODS[method]
    chained = zip(("forward", "backward"), needed(args, input, trans, method, seed), strict=False)
    flags = flags_of(args, seed, model_name, input, trans if translates(method) else None)
    flags += [*how, *(f"--experiment_name_{direction}={name_of(args, one)}" for direction, one in chained)]
    return find_chain(chain_parser("").parse_args(flags), [], Folder(args.logdir / f"seed{seed}"))


def grid_of(args: argparse.Namespace) -> list[Any]:
    """Return all scores of the config that validation slices choose from."""
    import config as configs
    from evaluation.scores import parse_grid

    return parse_grid(configs.get_config(args.dataset).score_model.scoring)


def cycle(text: str) -> tuple[str, str]:
    """INPUT and TRANS of a cycle; a ValueError, as argparse expects, for anything else."""
    input, trans = text.split(":")
    return input, trans

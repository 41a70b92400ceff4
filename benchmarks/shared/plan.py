"""Tests of several methods, inputs and seeds: the trainings they need, and the chains and slices they score."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from models import METHODS as ENTRIES
from models import load_method
from utils.cli import ArgumentParser, UserError

from .script import create_parser

REPOSITORY = Path(__file__).resolve().parents[2]

# By method: --model_name and the flags of testing, first of methods that need a single modality at test time.
SINGLE_INPUT = {entry.key: (name,) for name, entry in ENTRIES.items() if not entry.translates}
SINGLE_INPUT |= {entry.key: (name, "--sampling=fast") for name, entry in ENTRIES.items() if entry.translates}
ONE_WAY = {f"one_way_{name}": (name, "--score=one_way") for name, entry in ENTRIES.items() if entry.translates}
METHODS = SINGLE_INPUT | ONE_WAY


class Test(NamedTuple):
    """One method with one input and one training seed; a baseline's `trans` is its input."""

    input: str
    trans: str
    method: str
    seed: int


class Training(NamedTuple):
    """One experiment, in the folder of its seed; a baseline's `trans` is None."""

    seed: int
    model_name: str
    process: str
    input: str
    trans: str | None


def experiment_parser(doc: str, **flags: Any) -> ArgumentParser:
    """Return a parser as from `create_parser`, with the flags of benchmarks that train networks."""
    data_dir, workers = Path("datasets/phantom"), os.cpu_count() or 1
    trained = {"dataset": "phantom", "data_dir": data_dir, "gpu_id": "0", "seeds": [0, 1, 2], "workers": workers}
    return create_parser(doc, **trained, **flags)


def add_methods(parser: ArgumentParser, choices: Sequence[str], default: Sequence[str]) -> None:
    """Add `--cycles` and `--methods`, which `list_tests` combines."""
    cycles = "modalities at hand and translated to, as INPUT:TRANS; a baseline takes each input once"
    three = [("flair", "t2"), ("t2", "flair"), ("t1", "t2")]
    parser.add_argument("--cycles", type=cycle, nargs="+", default=three, help=cycles)
    parser.add_argument("--methods", nargs="+", default=default, choices=choices, help="methods to compare")


def cycle(text: str) -> tuple[str, str]:
    """Split INPUT:TRANS; argparse reports the ValueError for any other text."""
    input, trans = text.split(":")
    return input, trans


def translates(method: str) -> bool:
    """Whether a method translates to another modality."""
    return ENTRIES[METHODS[method][0]].translates


def list_tests(args: argparse.Namespace) -> list[Test]:
    """Return the tests of every cycle, method and seed."""
    every = product(args.seeds, args.methods, args.cycles)
    tests = (
        Test(input, trans if translates(method) else input, method, seed) for seed, method, (input, trans) in every
    )
    return list(dict.fromkeys(tests))


def list_trainings(args: argparse.Namespace, tests: Sequence[Test]) -> list[Training]:
    """Return the trainings of all tests, each once."""
    return list(dict.fromkeys(training for test in tests for training in trainings_of(args, test)))


def trainings_of(args: argparse.Namespace, test: Test) -> Iterator[Training]:
    """Yield the trainings of a test, forward first. The networks of a cycle also serve the reverse cycle."""
    input, trans, method, seed = test
    model_name = METHODS[method][0]
    entry = ENTRIES[model_name]
    if not entry.translates:
        yield Training(seed, model_name, "forward", input, None)
        return
    if entry.backward:  # this forward network serves no other cycle
        yield Training(seed, model_name, "forward", input, trans)
    ways = [(input, trans)] * (not entry.backward) + [(trans, input)] * (method not in ONE_WAY)
    for source, target in ways:
        cycle = next(cycle for cycle in args.cycles if set(cycle) == {source, target})
        process = "forward" if cycle == (source, target) else "backward"
        yield Training(seed, entry.backward or model_name, process, *cycle)


def folder_of(args: argparse.Namespace, training: Training) -> Path:
    """Return the folder of an experiment."""
    from utils.experiment import experiment_name

    seed, model_name, process, input, trans = training
    name = experiment_name(model_name, process, args.dataset, trans or input, input)
    return args.logdir / f"seed{seed}" / name


def ended(args: argparse.Namespace, training: Training, iterations: int) -> bool:
    """Whether a training has saved its last step."""
    from guided_diffusion.checkpoint import list_checkpoints

    steps = list_checkpoints(folder_of(args, training))
    return bool(steps) and (load_method(training.model_name).fit is not None or max(steps) >= iterations)


def flags_of(args: argparse.Namespace, seed: int, model_name: str, input: str, trans: str | None) -> list[str]:
    """Return the flags that training and testing share."""
    return [
        *(f"--dataset={args.dataset}", f"--data_dir={args.data_dir}", f"--gpu_id={args.gpu_id}", f"--seed={seed}"),
        *(f"--model_name={model_name}", f"--input={input}", *([f"--trans={trans}"] if trans else [])),
    ]


def train_all(
    args: argparse.Namespace, trainings: Sequence[Training], settings: Callable[[Training], Mapping[str, int]]
) -> None:
    """Run or resume trainings, `args.workers` at a time; finished ones stay as they are.

    `settings` returns fields of `config.score_model.training` that differ from the config's.

    Raises:
        UserError: if a training fails, with the last line of its stderr.
    """
    from tqdm import tqdm

    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if args.workers > 1 else {})

    def train(training: Training) -> None:
        seed, model_name, process, input, trans = training
        folder = folder_of(args, training)
        flags = flags_of(args, seed, model_name, input, trans)
        flags += [f"--training_process={process}", f"--logdir={folder.parent}"]
        flags += [f"--config.score_model.training.{key}={value}" for key, value in settings(training).items()]
        command = [sys.executable, REPOSITORY / "modality_cyclic_train.py", *flags]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{folder.name} of seed {seed}: {done.stderr.strip().splitlines()[-1]}")

    with ThreadPoolExecutor(args.workers) as pool:
        list(tqdm(pool.map(train, trainings), total=len(trainings), desc="training", unit="network"))


def chain_of(args: argparse.Namespace, test: Test) -> Any:
    """Return the trained networks of a test, chained as modality_cyclic_test.py does."""
    from scoring.chain import chain_parser, find_chain
    from utils.storage import Folder

    model_name, *how = METHODS[test.method]
    flags = flags_of(args, test.seed, model_name, test.input, test.trans if translates(test.method) else None)
    for direction, training in zip(("forward", "backward"), trainings_of(args, test), strict=False):
        flags.append(f"--experiment_name_{direction}={folder_of(args, training).name}")
    return find_chain(chain_parser("").parse_args([*flags, *how]), [], Folder(args.logdir / f"seed{test.seed}"))


def load_cohorts(chain: Any, cohorts: Mapping[str, Path]) -> dict[str, Any]:
    """Load the validation slices of the chain's data, as `val`, and the test slices of other folders by name.

    Raises:
        UserError: if there are no validation slices, or a folder has no test slices.
    """
    from scoring.scorer import load_slices

    slices, data = {"val": load_slices(chain, "val")}, chain.config.data
    if slices["val"] is None:
        raise UserError(f"{data.data_dir} has no validation slices: preprocess some")
    for name, folder in cohorts.items():
        data.data_dir = str(folder)
        slices[name] = load_slices(chain, "test")
    return slices


def grid_of(args: argparse.Namespace) -> list[Any]:
    """Return all scores of the config that validation slices choose from."""
    import config as configs
    from evaluation.scores import parse_grid

    return parse_grid(configs.get_config(args.dataset).score_model.scoring)

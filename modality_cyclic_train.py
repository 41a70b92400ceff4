"""Train one translator of the modality cycle, forward (input → trans) or backward (trans → input)."""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from models import METHODS, load_method, method_help
from utils.cli import UserError, config_fields, parse_run_args, run, run_parser
from utils.storage import Folder, StorageError, open_folder


def main() -> None:
    args, overrides = parse_args()
    with open_folder(args.logdir) as experiments:
        train(args, overrides, experiments)


def train(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> None:
    """Train the translator that the flags describe, from where it is."""
    # Only now what takes seconds to import.
    import torch

    import config as configs
    from datasets.brats2021 import BraTS2021Dataset, fingerprint
    from datasets.loader import all_slices, training_batches
    from evaluation.window import side_by_side
    from guided_diffusion import checkpoint, dist_util
    from guided_diffusion.logger import create_logger
    from guided_diffusion.train_util import TrainLoop
    from models.training import bytes_a_sample, create_losses, seconds_a_step
    from utils import experiment
    from utils.device import compile_if_it_pays, pick_device, pick_precision, require_memory, speed_up
    from utils.files import locked, writing

    config, _ = configs.resolve(args.dataset, config_fields(args), overrides, args.model_name, args.preset)
    configs.check(config, args.model_name)
    method = load_method(args.model_name)
    dist_util.setup()
    first = dist_util.rank() == 0
    experiments.writes = first
    data, training = config.data, config.score_model.training
    image, target = (data.input, data.trans)[:: 1 if args.training_process == "forward" else -1]
    if training.batch_size < dist_util.world_size():
        raise UserError(
            f"score_model.training.batch_size={training.batch_size} is the total over all processes, and leaves "
            f"some of these {dist_util.world_size()} with nothing"
        )

    device = pick_device(dist_util.gpu_id(args.gpu_id), config.deterministic)
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)
    try:
        network = method.create_network(config.score_model)
        share = dist_util.share(training.batch_size)
        if method.fit is None:
            losses, schedule_sampler = create_losses(method, config, device, share)
            in_float32 = bytes_a_sample(method, config)
            require_memory(device, share.stop - share.start, in_float32 * precision.itemsize // 4)
        method.create_translator(network, config)  # so that it fails now, not at the first save
    except ValueError as error:
        raise UserError(str(error)) from error

    kind = {key: getattr(args, key) for key in ("model_name", "training_process", "dataset")}
    name = args.experiment_name or experiment.experiment_name(*kind.values(), data.trans, data.input)
    directory = experiments.local / experiment.require_name("--experiment_name", name)
    slices = fingerprint(data.data_dir, "train", [image, target])
    record = {**kind, "config": config.to_dict(), "data": slices}
    if not args.overwrite:
        needed = checkpoint.needed_to_resume(experiments.names(name), training.keep_last)
        experiments.pull(name, experiment.RECORD, "log.txt", "progress.csv", *needed)
        if checkpoint.saved(directory):
            uses_bands = any(key.startswith("score_model.mask.") for key in method.fixed)
            unused = () if uses_bands else ("config.score_model.mask.",)
            experiment.refuse_other_settings(directory, record, unused)

    where = (data.data_dir, "train", [image, target], data.image_size)
    dataset = BraTS2021Dataset(*where, processes=dist_util.local_world_size(), progress=first)
    with locked(directory, "--logdir", "give another --experiment_name") if first else nullcontext():
        if first and args.overwrite:
            experiments.remove(name, *checkpoint.WRITTEN, experiment.RECORD)
        dist_util.barrier()
        with writing(directory, "--logdir"):
            logger = create_logger(directory)
        logger.info(f"{name}\n{config}")
        if experiments.remote:
            logger.info(f"there are no locks on {experiments.remote}: see that nothing else trains {name} there")
        where = f"{dist_util.world_size()} × {device.type} in {str(precision).removeprefix('torch.')}"
        logger.info(f"{image} → {target}: {len(dataset)} slices, {training.iterations} steps, on {where}")

        if device.type == "cpu" and method.fit is None:
            hours = training.iterations * seconds_a_step(method, config, device) / 3600
            if hours > 24:
                logger.info(f"warning: about {hours:,.0f} hours on this CPU: take a GPU, or give --preset small")
        example = dataset[len(dataset) // 2]

        def record_run() -> None:
            experiment.write_record(directory, record | {"run": experiment.describe_run(device)})
            experiments.push()  # so that it fails now, not at the first save

        def show_and_store(network: Any, step: int) -> None:
            source = example[image][None].to(device)
            row = (*method.translate_example(network, source, config), example[target][None])
            shown, translation, truth = (picture[0, 0].float().cpu().numpy() for picture in row)
            logger.image(step, "input | target | translation", side_by_side(shown, truth, translation))
            try:
                experiments.push()
            except StorageError as error:
                logger.info(f"warning: {error}; the next save tries again")

        def descend() -> None:
            compile_if_it_pays(network, device, training.iterations)
            TrainLoop(
                model=speed_up(network, device, training=True),
                compute_losses=lambda model, batch, step: losses(
                    model, *(batch[kind].to(device, non_blocking=True) for kind in (image, target)), step
                ),
                batches_from=lambda step: training_batches(
                    dataset,
                    training.batch_size,
                    config.seed,
                    step,
                    share=share,
                    workers=dataset.workers,
                    pinned=device.type == "cuda",
                ),
                directory=directory,
                logger=logger,
                settings=training,
                precision=precision,
                seed=config.seed,
                schedule_sampler=schedule_sampler,
                on_start=record_run,
                on_save=show_and_store,
            ).run()

        def fit() -> None:
            record_run()
            slices = all_slices(dataset)
            method.fit(network, slices[image], slices[target])
            state = network.state_dict()
            paths = checkpoint.paths_of(directory, training.ema_rate, 0)
            checkpoint.save(paths, {"model": state, "ema": state, "opt": {"step": 0}})
            show_and_store(network.to(device), 0)

        try:
            with plain_errors(directory, experiments):
                if method.fit is None:
                    descend()
                elif first:
                    fit()
                logger.info(f"done, all in {experiments.address(directory)}")
        finally:
            logger.close()
        dist_util.shut_down()


@contextmanager
def plain_errors(directory: Path, experiments: Folder) -> Iterator[None]:
    """Say what to do where training cannot go on; end with a signal's exit code where one has stopped it."""
    from guided_diffusion import dist_util
    from guided_diffusion.checkpoint import CheckpointError, UnreadableError
    from guided_diffusion.train_util import Stopped

    room = f"make room in {tempfile.gettempdir()} (or set TMPDIR)" if experiments.remote else "make room"
    remedies = {
        FloatingPointError: "try a lower --config.score_model.training.lr, or --config.precision=float32 if this was "
        "float16",
        UnreadableError: "restore one, or start over with --overwrite",
        CheckpointError: f"{room}, or see --config.score_model.training.keep_last",
    }
    try:
        yield
    except tuple(remedies) as error:
        raise UserError(f"{error}: {remedies[type(error)]}") from error
    except OSError as error:  # what is logged, to a disk that has become full
        raise UserError(
            f"{directory} cannot be written to ({error.strerror or error}): make room, and the same command "
            "goes on from the last checkpoint"
        ) from error
    except Stopped as stopped:
        dist_util.shut_down()  # as in all processes
        sys.exit(128 + stopped.received)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--training_process", default="forward", choices=["forward", "backward"], help="input → trans, or back")
    add("--model_name", default="unet", choices=METHODS, help=method_help())
    add("--experiment_name", help="folder below logdir (default: {model}_{process}_{dataset}_{trans}_{input})")
    add("--overwrite", action="store_true", help="start over where an experiment of this name lies already")
    args, overrides = parse_run_args(parser)
    entry = METHODS[args.model_name]
    if not entry.translates and args.training_process == "backward":
        raise UserError(
            f"--model_name {args.model_name} reconstructs the input modality: there is no way back to train"
        )
    if entry.backward and args.training_process == "backward":
        raise UserError(
            f"only the forward translator of {entry.title} is a {args.model_name} model: use --model_name "
            f"{entry.backward} for backward"
        )
    return args, overrides


if __name__ == "__main__":
    run(main)

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
    """Train the translator that the flags describe, or resume its training."""
    # Imported here because these take seconds to load.
    import torch

    import config as configs
    from datasets.brats2021 import BraTS2021Dataset
    from datasets.loader import all_slices, training_batches
    from evaluation.window import side_by_side
    from guided_diffusion import checkpoint, dist_util
    from guided_diffusion.logger import create_logger
    from guided_diffusion.train_util import TrainLoop
    from models.training import bytes_a_sample, create_losses, seconds_a_step, weight_bytes
    from utils import compiling
    from utils.device import pick_device, pick_precision, require_memory, speed_up
    from utils.experiment import RECORD, describe_run, write_record
    from utils.files import locked, writing

    config, _ = configs.resolve(args.dataset, config_fields(args), overrides, args.model_name, args.preset)
    configs.check(config, args.model_name)
    method = load_method(args.model_name)
    dist_util.setup()
    is_first = dist_util.rank() == 0
    experiments.writable = is_first
    data, training = config.data, config.score_model.training
    image, target = (data.input, data.trans)[:: 1 if args.training_process == "forward" else -1]
    if training.batch_size < dist_util.world_size():
        raise UserError(
            f"score_model.training.batch_size={training.batch_size} is the total over all processes, and must be at "
            f"least their number, {dist_util.world_size()}"
        )

    device = pick_device(dist_util.gpu_id(args.gpu_id), config.deterministic)
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)
    try:
        # Weights, gradients, AdamW's two moments, and the EMA.
        n_bytes, setting = 5 * weight_bytes(method, config), "score_model.model.model_channels"
        require_memory(device, n_bytes, "training this network", setting)
        network = method.create_network(config.score_model)
        share = dist_util.shard(training.batch_size)
        if method.fit is None:
            losses, draws, schedule_sampler = create_losses(method, config, device, share)
            n_slices = share.stop - share.start
            n_bytes = n_slices * bytes_a_sample(method, config) * precision.itemsize // 4
            settings = "score_model.training.batch_size or --config.data.image_size"
            require_memory(device, n_bytes, f"a training step of {n_slices} slices", settings)
        method.create_translator(network, config)  # fail now rather than at the first save
    except ValueError as error:
        raise UserError(str(error)) from error

    directory, record = open_experiment(args, config, experiments)
    slices = (data.data_dir, "train", [image, target], data.image_size)
    dataset = BraTS2021Dataset(*slices, processes=dist_util.local_world_size(), progress=is_first)
    record["data"] = dataset.fingerprint
    require_same_start(args, directory, record)
    if method.fit:  # to all slices at once, in double precision: about 64 bytes a pixel
        n_bytes = 64 * len(dataset) * data.image_size**2
        require_memory(torch.device("cpu"), n_bytes, "fitting all training slices", "data.image_size")
    with locked(directory, "--logdir", "give another --experiment_name") if is_first else nullcontext():
        if is_first and args.overwrite:
            experiments.remove(directory.name, *checkpoint.TRAINING_FILES, RECORD)
        dist_util.barrier()
        with writing(directory, "--logdir"):
            logger = create_logger(directory)
        logger.info(f"{directory.name}\n{config}")
        if experiments.remote:
            logger.info(f"{experiments.remote} has no locks: do not train {directory.name} in two places at once")
        devices = f"{dist_util.world_size()} × {device.type} in {str(precision).removeprefix('torch.')}"
        logger.info(f"{image} → {target}: {len(dataset)} slices, {training.iterations} steps, on {devices}")

        if device.type == "cpu" and method.fit is None:
            hours = training.iterations * seconds_a_step(method, config, device) / 3600
            if hours > 24:
                logger.info(f"warning: about {hours:,.0f} hours on this CPU: use a GPU or --preset small")
        example = dataset[len(dataset) // 2]

        def on_start() -> None:
            write_record(directory, record | {"run": describe_run(device)})
            experiments.push()  # fail now rather than at the first save

        def on_save(network: Any, step: int) -> None:
            source = example[image][None].to(device)
            row = (*method.translate_example(network, source, config), example[target][None])
            shown, translation, truth = (picture[0, 0].float().cpu().numpy() for picture in row)
            logger.image(step, "input | target | translation", side_by_side(shown, truth, translation))
            try:
                experiments.push()
            except StorageError as error:
                logger.info(f"warning: {error}; the next save tries again")

        def run_gradient_descent() -> None:
            samples = training.iterations * (share.stop - share.start)
            loading = {"share": share, "workers": dataset.workers, "pinned": device.type == "cuda"}
            TrainLoop(
                model=speed_up(network, device, training=True),
                compile_for=samples if compiling.TRAINING.pays(device, samples) else 0,
                compute_losses=losses,
                inputs_of=lambda batch, step: [
                    *(batch[kind].to(device, non_blocking=True) for kind in (image, target)),
                    *draws(step),
                ],
                batches_from=lambda step: training_batches(dataset, training.batch_size, config.seed, step, **loading),
                directory=directory,
                logger=logger,
                settings=training,
                precision=precision,
                seed=config.seed,
                schedule_sampler=schedule_sampler,
                on_start=on_start,
                on_save=on_save,
            ).run()

        def fit_all_slices() -> None:
            on_start()
            slices = all_slices(dataset)
            method.fit(network, slices[image], slices[target])
            state = network.state_dict()
            paths = checkpoint.paths_of(directory, training.ema_rate, 0)
            checkpoint.save(paths, {"model": state, "ema": state, "opt": {"step": 0}})
            on_save(network.to(device), 0)

        try:
            with explain_errors(directory, experiments):
                if method.fit is None:
                    run_gradient_descent()
                elif is_first:
                    fit_all_slices()
                logger.info(f"done, all in {experiments.address(directory)}")
        finally:
            logger.close()
        dist_util.shut_down()


def open_experiment(args: argparse.Namespace, config: Any, experiments: Folder) -> tuple[Path, dict]:
    """Return an experiment's folder, with the files needed to resume, and the record of its settings.

    Raises:
        UserError: if the name is invalid, or the experiment was started with other settings.
    """
    from guided_diffusion import checkpoint
    from utils import experiment

    kind = {key: getattr(args, key) for key in ("model_name", "training_process", "dataset")}
    name = args.experiment_name or experiment.experiment_name(*kind.values(), config.data.trans, config.data.input)
    directory = experiments.local / experiment.require_name("--experiment_name", name)
    record = {**kind, "config": config.to_dict()}
    if not args.overwrite:
        needed = checkpoint.needed_to_resume(experiments.list_files(name), config.score_model.training.keep_last)
        experiments.pull(name, experiment.RECORD, "log.txt", "progress.csv", *needed)
        require_same_start(args, directory, record)
    return directory, record


def require_same_start(args: argparse.Namespace, directory: Path, record: dict) -> None:
    """Raise a UserError if a training that is to be resumed was started with other settings or slices."""
    from guided_diffusion import checkpoint
    from utils import experiment

    if not args.overwrite and checkpoint.list_checkpoints(directory):
        unused = (f"config.{key}" for key in load_method(args.model_name).unused)
        experiment.require_same_settings(directory, record, tuple(unused))


@contextmanager
def explain_errors(directory: Path, experiments: Folder) -> Iterator[None]:
    """Turn the errors of training into a UserError with a remedy, and exit with a signal's code if stopped by one."""
    from guided_diffusion import dist_util
    from guided_diffusion.checkpoint import CheckpointError, UnreadableError
    from guided_diffusion.train_util import Stopped

    room = f"make room in {tempfile.gettempdir()} (or set TMPDIR)" if experiments.remote else "make room"
    remedies = {
        FloatingPointError: "lower --config.score_model.training.lr, or replace float16 by --config.precision=float32",
        UnreadableError: "restore one, or start over with --overwrite",
        CheckpointError: f"{room}, or see --config.score_model.training.keep_last",
    }
    try:
        yield
    except tuple(remedies) as error:
        raise UserError(f"{error}: {remedies[type(error)]}") from error
    except BrokenPipeError:  # from printing
        raise
    except OSError as error:  # from writing a log, when the disk is full
        remedy = "make room, and resume from the last checkpoint with the same command"
        raise UserError(f"{directory} cannot be written to ({error.strerror or error}): {remedy}") from error
    except Stopped as stopped:
        dist_util.shut_down()  # all processes stop
        sys.exit(128 + stopped.received)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = run_parser(__doc__)
    add = parser.add_argument
    add("--training_process", default="forward", choices=["forward", "backward"], help="input → trans, or the reverse")
    add("--model_name", default="unet", choices=METHODS, help=method_help())
    add("--experiment_name", help="folder in --logdir (default: {model}_{process}_{dataset}_{trans}_{input})")
    add("--overwrite", action="store_true", help="start over if the experiment exists already")
    args, overrides = parse_run_args(parser)
    entry = METHODS[args.model_name]
    if not entry.translates and args.training_process == "backward":
        raise UserError(f"--model_name {args.model_name} reconstructs its input: there is no backward translator")
    if entry.backward and args.training_process == "backward":
        raise UserError(f"{entry.title} has no backward {args.model_name} model: use --model_name {entry.backward}")
    return args, overrides


if __name__ == "__main__":
    run(main)

"""Train one translator of the modality cycle, forward (input → trans) or backward (trans → input)."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from utils.cli import UserError, parse_run_args, run, run_parser
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
    from datasets.loader import training_batches
    from guided_diffusion import checkpoint, dist_util
    from guided_diffusion.logger import Logger
    from guided_diffusion.train_util import TrainLoop
    from models.build import create_losses, create_masked_translator, create_network
    from utils.device import pick_device, pick_precision, speed_up
    from utils.experiment import (
        RECORD,
        describe_run,
        experiment_name,
        refuse_other_settings,
        require_name,
        write_record,
    )
    from utils.files import locked

    flags = {
        "data.data_dir": args.data_dir,
        "data.input": args.input,
        "data.trans": args.trans,
        "seed": args.seed,
    }
    config, _ = configs.resolve(args.dataset, flags, overrides)
    configs.check(config)
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

    device = pick_device(dist_util.gpu_id(args.gpu_id))
    precision = pick_precision(config.precision, device)
    torch.manual_seed(config.seed)
    try:
        network = create_network(args.model_name, config.score_model.model)
        share = dist_util.share(training.batch_size)
        losses, remembered = create_losses(args.model_name, config, share)
        if args.model_name == "diffusion":
            create_masked_translator(network, config)  # so that it fails now, not at the first save
    except ValueError as error:
        raise UserError(str(error)) from error

    kind = {key: getattr(args, key) for key in ("model_name", "training_process", "dataset")}
    name = args.experiment_name or experiment_name(*kind.values(), data.trans, data.input)
    directory = experiments.local / require_name("--experiment_name", name)
    record = {
        **kind,
        "config": config.to_dict(),
        "data": fingerprint(data.data_dir, "train", [image, target]),
    }
    if not args.overwrite:
        needed = checkpoint.needed_to_resume(experiments.names(name), training.keep_last)
        experiments.pull(name, RECORD, "log.txt", "progress.csv", *needed)
        if checkpoint.saved_steps(directory):
            refuse_other_settings(directory, record)

    dataset = BraTS2021Dataset(
        data.data_dir,
        "train",
        [image, target],
        data.image_size,
        processes=dist_util.local_world_size(),
        progress=first,
    )
    alone = locked(directory, "--logdir", "give another --experiment_name") if first else nullcontext()
    with alone:
        if first:
            if args.overwrite:
                experiments.remove(name, *checkpoint.WRITTEN, RECORD)
            # The record of a finished run stays.
            if max(checkpoint.saved_steps(directory), default=0) < training.iterations:
                write_record(directory, record | {"run": describe_run(device)})
            experiments.push()  # so that it fails now, not at the first save
        dist_util.barrier()
        logger = Logger(directory)
        logger.info(f"{name}\n{config}")
        if experiments.remote:
            logger.info(
                f"there are no locks on {experiments.remote}: see that nothing else trains {name} there"
            )
        where = f"{dist_util.world_size()} × {device.type} in {str(precision).removeprefix('torch.')}"
        logger.info(f"{image} → {target}: {len(dataset)} slices, {training.iterations} steps, on {where}")

        preview = translation_preview(args.model_name, config, dataset, image, target, logger, device)

        def show_and_store(network: Any, step: int) -> None:
            preview(network, step)
            try:
                experiments.push()
            except StorageError as error:
                logger.info(f"warning: {error}; the next save tries again")

        loop = TrainLoop(
            model=speed_up(network, device, training=True),
            compute_losses=lambda model, batch, step: losses(
                model, *(batch[kind].to(device, non_blocking=True) for kind in (image, target)), step
            ),
            batches_from=partial(
                training_batches,
                dataset,
                training.batch_size,
                config.seed,
                share=share,
                workers=dataset.workers,
            ),
            directory=directory,
            logger=logger,
            settings=training,
            precision=precision,
            seed=config.seed,
            remembered=remembered,
            on_save=show_and_store,
        )
        try:
            with plain_errors(directory, experiments):
                loop.run()
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

    try:
        yield
    except FloatingPointError as error:
        raise UserError(f"{error}: try a lower --config.score_model.training.lr") from error
    except UnreadableError as error:
        raise UserError(f"{error}: restore one, or start over with --overwrite") from error
    except CheckpointError as error:
        room = f"make room in {tempfile.gettempdir()} (or set TMPDIR)" if experiments.remote else "make room"
        raise UserError(f"{error}: {room}, or see --config.score_model.training.keep_last") from error
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
    add(
        "--training_process",
        choices=["forward", "backward"],
        default="forward",
        help="input → trans, or back",
    )
    add(
        "--model_name",
        choices=["unet", "diffusion"],
        default="unet",
        help="diffusion: MMCCD's forward translator",
    )
    add(
        "--experiment_name", help="folder below logdir (default: {model}_{process}_{dataset}_{trans}_{input})"
    )
    add("--overwrite", action="store_true", help="start over where an experiment of this name lies already")
    args, overrides = parse_run_args(parser)
    if args.model_name == "diffusion" and args.training_process == "backward":
        raise UserError(
            "in MMCCD only the forward translator is a diffusion model: use --model_name unet for backward"
        )
    return args, overrides


def translation_preview(
    model_name: str, config: Any, dataset: Any, image: str, target: str, logger: Any, device: Any
) -> Callable[[Any, int], None]:
    """What is shown of one slice at every save: input | target | translation, in TensorBoard.

    Of a diffusion model it is the translation with the middle of the input hidden, which is drawn as a grey band.
    """
    from evaluation.figures import side_by_side
    from models.build import create_masked_translator
    from models.masks import Band

    example = dataset[len(dataset) // 2]
    source = example[image][None].to(device)
    middle = Band("horizontal", (config.data.image_size - config.score_model.mask.width) // 2)

    def show(network: Any, step: int) -> None:
        if model_name == "diffusion":
            translator = create_masked_translator(network, config)
            shown = source.masked_fill(translator.mask([middle]).to(device), 0.0)
            translation = translator.sample(source, [middle])
        else:
            shown, translation = source, network(source)
        row = (picture[0, 0].float().cpu().numpy() for picture in (shown, example[target][None], translation))
        logger.image(step, "input | target | translation", side_by_side(*row))

    return show


if __name__ == "__main__":
    run(main)

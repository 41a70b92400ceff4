"""Chain a forward and a backward translator and score the cyclic error on the test slices: Dice, AUPRC and more."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.cli import ArgumentParser, UserError, parse_run_args, run, run_parser
from utils.storage import Folder, local_path, open_folder

if TYPE_CHECKING:  # these take seconds to import
    from torch import Tensor
    from tqdm import tqdm

    from models.cycle import Cycle

ERROR_MAPS = "error_maps.npz"


def main() -> None:
    args, overrides = parse_args()
    if args.compare:
        from utils.report import comparison

        print(comparison(*args.compare))
    elif args.rescore:
        score_again(args.rescore)
    else:
        with open_folder(args.logdir) as experiments:
            score_translators(args, overrides, experiments)


def score_translators(args: argparse.Namespace, overrides: list[str], experiments: Folder) -> None:
    """Make the error maps of the test and validation slices, and score them."""
    # Only now what takes seconds to import.
    from datasets.brats2021 import fingerprint
    from guided_diffusion import dist_util
    from utils.device import pick_device
    from utils.experiment import describe_run, trained_steps, write_record
    from utils.report import write_maps

    join_processes()
    experiments.writes = dist_util.rank() == 0
    forward, backward = find_translators(args, overrides, experiments)
    config = forward.config
    require_same_preprocessing(forward, backward, Path(config.data.data_dir))
    scorer = Scorer(args.model_name, forward, backward, pick_device(dist_util.gpu_id(args.gpu_id)))
    slices = {split: load_slices(config, split) for split in ("test", "val")}
    translators = {"forward": forward, "backward": backward}
    checkpoints = {process: experiments.address(found.checkpoint) for process, found in translators.items()}
    print(f"{config}\nforward:  {checkpoints['forward']}\nbackward: {checkpoints['backward']}")

    maps, cost = create_maps(scorer, {split: batch for split, batch in slices.items() if batch})
    writes = dist_util.rank() == 0
    dist_util.shut_down()
    if not writes:
        return
    run = {
        "method": "mmccd" if args.model_name == "diffusion" else "cyclic_unet",
        "input": config.data.input,
        "trans": config.data.trans,
        "image_size": config.data.image_size,
        "sampling": sampling_name(config) if args.model_name == "diffusion" else None,
        **cost,
        "checkpoints": checkpoints,
        "trained_steps": {process: trained_steps(found.checkpoint) for process, found in translators.items()},
    }
    results = experiments.local / "results" / results_name(args.model_name, forward, backward)
    data = {split: fingerprint(config.data.data_dir, split, kinds_scored(config)) for split in maps}
    write_record(
        results, {**run, "config": config.to_dict(), "data": data, "run": describe_run(scorer.device)}
    )
    write_maps(results / ERROR_MAPS, run, maps)
    experiments.remove(f"results/{results.name}", "events.out.tfevents.*")  # as those of a local folder are
    score_maps(results, run, maps, experiments.address(results))


def score_again(path: Path) -> None:
    """Score the error maps of an earlier test run, given by its folder or its file of error maps."""
    from utils.report import read_maps

    path = path / ERROR_MAPS if path.is_dir() else path
    score_maps(path.parent, *read_maps(path), str(path.parent))


def score_maps(results: Path, run: dict[str, Any], maps: dict[str, dict], address: str) -> None:
    """Score error maps; write metrics.json, per_slice.csv, figures and TensorBoard events, and print the tables.

    Args:
        results: folder of the test run.
        run: what was chained, for the head of metrics.json.
        maps: by split, `names` and arrays [N, H, W], as `utils.report.write_maps` takes them.
        address: what to call the folder.
    """
    from utils.figures import draw_scores, write_figures
    from utils.metrics import by_lesion_size, evaluate, ranked_scores
    from utils.report import METHODS, size_table, table, write_events, write_scores

    cyclic_error, intensity = (
        evaluate(*labelled(maps["test"], key), val=labelled(maps["val"], key) if "val" in maps else None)
        for key in ("scores", "image")
    )
    metrics, baseline = (
        evaluation.summary | {"by_lesion_size": by_lesion_size(evaluation.per_slice)}
        for evaluation in (cyclic_error, intensity)
    )
    metrics = {**run, **metrics, "baseline_intensity": baseline}
    ranked = {
        METHODS[run["method"]]: ranked_scores(*labelled(maps["test"], "scores")),
        f"intensity ({run['input']})": ranked_scores(*labelled(maps["test"], "image")),
    }
    write_scores(results, metrics, maps["test"]["names"], cyclic_error.per_slice)
    write_figures(results / "figures", draw_scores(maps["test"], metrics, cyclic_error.per_slice, ranked))
    write_events(results, metrics, ranked)
    print(f"\n{table([metrics])}\n\n{size_table(metrics)}\n\nresults: {address}\nfigures: {address}/figures")


class Translator(NamedTuple):
    """A trained translator on disk, and the config of this run with what its training fixed."""

    name: str  # of its experiment, or of a checkpoint without one
    checkpoint: Path
    config: Any  # ConfigDict
    normalisation: dict[str, float] | None  # of the slices that it was trained on, where that is known
    grid: dict[str, Any] | None  # that they lie on, likewise; the JSON of a `datasets.grid.TrainingGrid`


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(__doc__)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--compare",
        nargs=2,
        type=local_path,
        metavar=("RUN_A", "RUN_B"),
        help="only compare the test runs in two folders, slice by slice (paired bootstrap)",
    )
    instead.add_argument(
        "--rescore",
        type=local_path,
        metavar="RUN",
        help="only score the error maps in a test run's folder again, without a model",
    )
    return parse_run_args(parser)


def chain_parser(description: str, *, on_slices: bool = True) -> ArgumentParser:
    """A parser with the flags that say which translators are chained, and how MMCCD samples."""
    parser = run_parser(description, on_slices=on_slices)
    add = parser.add_argument
    add(
        "--model_name",
        "--model",
        choices=["unet", "diffusion"],
        default="unet",
        help="unet: Cyclic UNet; diffusion: MMCCD",
    )
    for process, model in (("forward", "{model}"), ("backward", "unet")):
        default = f"{model}_{process}_{{dataset}}_{{trans}}_{{input}}"
        add(
            f"--experiment_name_{process}",
            help=f"experiment of the {process} translator (default: {default})",
        )
        add(
            f"--checkpoint_{process}",
            type=local_path,
            help="state dict to use (default: the experiment's newest EMA)",
        )
    add(
        "--use_ddim",
        choices=["True", "False"],
        help="DDIM or ancestral sampling (default: the config's, True)",
    )
    add(
        "--sampling",
        choices=["paper", "fast"],
        help="how MMCCD samples: paper, or fast at a small part of the cost (default: the config's, paper)",
    )
    add(
        "--timestep_respacing",
        help="sampling steps; 1000 or empty: all; trailing2 and so on: few, well placed (default: the config's, 100)",
    )
    return parser


def config_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that stand for fields of the config; None where they were not given."""
    return {
        "data.data_dir": getattr(args, "data_dir", None),
        "data.input": args.input,
        "data.trans": args.trans,
        "seed": args.seed,
        "score_model.sampling.use_ddim": None if args.use_ddim is None else args.use_ddim == "True",
        "score_model.sampling.timestep_respacing": args.timestep_respacing,
    }


# What the training of a translator fixes, by the beginning of its key in the config.
HELD_BY_BOTH = ("data.input", "data.trans", "data.image_size")
HELD = {
    "unet": (*HELD_BY_BOTH, "score_model.model."),
    "diffusion": (*HELD_BY_BOTH, "score_model.model.", "score_model.diffusion.", "score_model.mask.width"),
}


def find_translators(
    args: argparse.Namespace, overrides: list[str], experiments: Folder
) -> tuple[Translator, Translator]:
    """The forward and the backward translator that the flags name; the forward one's config is that of the run.

    Raises:
        UserError: as `find_translator`, or a value that no run can work with.
    """
    import config as configs

    config, given = configs.resolve(args.dataset, config_flags(args), overrides)
    forward = find_translator("forward", args, experiments, config, given)
    config = forward.config
    if args.sampling:
        preset = configs.sampling_preset(args.sampling, config.score_model.mask.width)
        config.update_from_flattened_dict({key: value for key, value in preset.items() if key not in given})
    backward = find_translator("backward", args, experiments, config, given | set(HELD_BY_BOTH))
    configs.check(config)
    return forward, backward


def find_translator(
    process: str, args: argparse.Namespace, experiments: Folder, config: Any, given: set[str]
) -> Translator:
    """The checkpoint of one direction, and the config with what its experiment's config.json says.

    A checkpoint without a config.json is taken with the config as it is.

    Raises:
        UserError: nothing is there, it is a translator of another kind, or it was trained with settings that
            contradict a `given` key.
    """
    from utils.experiment import experiment_name, leaves, newest_ema, read_record, require_name

    model_name = args.model_name if process == "forward" else "unet"
    checkpoint = getattr(args, f"checkpoint_{process}")
    if checkpoint is None:
        flag = f"experiment_name_{process}"
        name = getattr(args, flag) or experiment_name(
            model_name, process, args.dataset, config.data.trans, config.data.input
        )
        checkpoint = newest_ema(experiments, require_name(f"--{flag}", name))
    elif not checkpoint.is_file():
        raise UserError(f"no checkpoint at {checkpoint}: check --checkpoint_{process}")
    record = read_record(checkpoint)
    if record is None:
        return Translator(checkpoint.stem, checkpoint, config, None, None)
    if not {"model_name", "training_process", "config"} <= set(record):
        raise UserError(f"{checkpoint.parent / 'config.json'} is not what training writes: restore it")
    if (record["model_name"], record["training_process"]) != (model_name, process):
        kind = f"{record['training_process']} {record['model_name']}"
        raise UserError(f"{checkpoint.parent} is a {kind}, not the {process} {model_name} that is asked for")
    asked, fixed = dict(leaves(config)), config.copy_and_resolve_references()
    for key, value in leaves(record["config"]):
        if not key.startswith(HELD[model_name]):
            continue
        value = tuple(value) if isinstance(value, list) else value
        if key in given and asked[key] != value:
            raise UserError(
                f"{key}={asked[key]} contradicts {checkpoint.parent}, which was trained with {value}"
            )
        fixed.update_from_flattened_dict({key: value})
    data = record.get("data", {})
    name = checkpoint.absolute().parent.name
    return Translator(name, checkpoint, fixed, data.get("normalisation"), data.get("grid"))


def require_same_preprocessing(
    forward: Translator, backward: Translator, data_dir: Path | None = None
) -> None:
    """Refuse translators, and slices where the run has any, whose intensities or pixels mean different things.

    Raises:
        UserError: the slices of the run, or those that one of them was trained on, were normalised otherwise, or lie
            on another grid. What nobody recorded is taken to be right.
    """
    from datasets.records import read_grid, read_normalisation

    for what, read, remedy in (
        ("normalisation", read_normalisation, "with the same --percentage_lower and --percentage_upper"),
        ("grid", read_grid, "volumes of the same orientation, voxel size and shape, or all of them by --csv"),
    ):
        known = {str(found.checkpoint): getattr(found, what) for found in (forward, backward)}
        if data_dir:
            known[str(data_dir)] = read(data_dir)
        known = {where: value for where, value in known.items() if value}
        (first, expected), *others = known.items() or [("", None)]
        for where, value in others:
            if value != expected:
                raise UserError(
                    f"{first} and {where} do not fit: the {what} of their slices is {expected} and {value}; "
                    f"preprocess {remedy}"
                )


class Scorer:
    """Both translators of a cycle, loaded: turns slices of any number into anomaly scores.

    Raises:
        UserError: a config that no network or diffusion can be made of, or weights that do not fit it.
    """

    def __init__(self, model_name: str, forward: Translator, backward: Translator, device: Any):
        from models.build import create_masked_translator, create_network
        from models.masks import sweep
        from utils.device import pick_precision, speed_up
        from utils.experiment import load_weights

        self.config, self.device = forward.config, device
        self.batch_size = self.config.score_model.sampling.batch_size
        self.precision = pick_precision(self.config.precision, device)
        self.masked_translator = None  # Cyclic UNet has none
        self.networks = []
        try:
            for name, found in ((model_name, forward), ("unet", backward)):
                network = create_network(name, found.config.score_model.model)
                load_weights(network, found.checkpoint)
                self.networks.append(speed_up(network.eval(), device, training=False))
            if model_name == "diffusion":
                self.masked_translator = create_masked_translator(self.networks[0], self.config)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.bands = sweep(self.config.data.image_size, self.config.score_model.sampling.stride)
        steps = self.masked_translator.diffusion.num_timesteps if self.masked_translator else 1
        self.passes_a_sample = steps + 1  # forward, and one back

    def samples(self, brainmask: "Tensor") -> list[int]:
        """How many samples each slice of these brain masks [N, 1, H, W] takes: one, or one for each band."""
        from collections import Counter

        from models.cycle import slices_and_bands

        if not self.masked_translator:
            return [1] * len(brainmask)
        taken = Counter(i for i, _ in slices_and_bands(brainmask, self.masked_translator, self.bands))
        return [taken[i] for i in range(len(brainmask))]

    def score(self, image: "Tensor", brainmask: "Tensor", progress: Callable[[int], None]) -> "Cycle":
        """The cycle of slices [N, 1, H, W], on the CPU; `progress` is told of network passes made.

        Of several processes each makes its share of the slices, and all get the whole.
        """
        import torch

        from guided_diffusion import dist_util
        from models.cycle import Cycle, cyclic_unet, mmccd
        from utils.device import autocast, in_batches

        def made(samples: int) -> None:
            progress(samples * self.passes_a_sample)

        share = dist_util.share(len(image))
        image, brainmask = image[share].to(self.device), brainmask[share].to(self.device)
        with autocast(self.device, self.precision):
            if self.masked_translator:
                cycle = mmccd(
                    image,
                    brainmask,
                    self.masked_translator,
                    self.networks[1],
                    bands=self.bands,
                    batch_size=self.batch_size,
                    average=self.config.score_model.sampling.average,
                    progress=made,
                )
            else:
                parts = [Cycle(*(image[:0],) * 3)]  # a process may have no slices
                in_batches(
                    lambda batch: parts.append(cyclic_unet(batch, *self.networks)),
                    image,
                    self.batch_size,
                    made,
                )
                cycle = Cycle(*(torch.cat(field) for field in zip(*parts, strict=True)))
        shares = dist_util.gather(Cycle(*(field.cpu() for field in cycle)))
        return Cycle(*(torch.cat(field) for field in zip(*shares, strict=True)))


def create_maps(scorer: Scorer, slices: dict[str, dict]) -> tuple[dict[str, dict], dict[str, Any]]:
    """Error maps, arrays [N, H, W] by name, of the slices of every split; and what they cost."""
    taken = [scorer.samples(batch["brainmask"]) for batch in slices.values()]  # by every slice of each split
    cost = announce(scorer, taken)
    maps = {}
    with progress_bar(scorer, taken) as bar:
        for split, batch in slices.items():
            image = batch[scorer.config.data.input]
            cycle = scorer.score(image, batch["brainmask"], bar.update)
            images = {
                "image": image,
                "translation": cycle.translation,
                "reconstruction": cycle.reconstruction,
                "scores": cycle.score,
                "truth": batch["seg"],
                "brainmask": batch["brainmask"],
            }
            maps[split] = {
                "names": batch["name"],
                **{key: value[:, 0].numpy() for key, value in images.items()},
            }
    return maps, cost


def announce(scorer: Scorer, taken: list[list[int]]) -> dict[str, Any]:
    """Say what it costs to score batches of slices that take so many samples each; the same for metrics.json."""
    from guided_diffusion import dist_util

    samples = sum(map(sum, taken))
    passes = samples * scorer.passes_a_sample
    cost = {"precision": str(scorer.precision).removeprefix("torch."), "network_passes": passes}
    print(
        f"{passes:,} network passes, on {dist_util.world_size()} × {scorer.device.type} in {cost['precision']}"
    )
    if scorer.masked_translator:
        print(
            f"({samples:,} slices with a band hidden × {scorer.passes_a_sample - 1} steps forward and 1 back)"
        )
        if scorer.device.type == "cpu" and sampling_name(scorer.config) != "fast":
            print("that takes long on a CPU: --sampling fast makes far fewer")
    return cost


def progress_bar(scorer: Scorer, taken: list[list[int]], desc: str = "scoring") -> "tqdm":
    """A bar over the network passes of this process's share of the slices, shown by the first process."""
    from tqdm import tqdm

    from guided_diffusion import dist_util

    samples = sum(sum(batch[dist_util.share(len(batch))]) for batch in taken)
    shown = {"desc": desc, "unit": "pass", "unit_scale": True, "dynamic_ncols": True}
    return tqdm(total=samples * scorer.passes_a_sample, disable=dist_util.rank() > 0, **shown)


def kinds_scored(config: Any) -> list[str]:
    """What scoring reads of each slice."""
    return [config.data.input, "seg", "brainmask"]


def load_slices(config: Any, split: str) -> dict | None:
    """All slices of a split as one batch; None, with a word about it, if there are no validation slices.

    Raises:
        UserError: there are no test slices, or not of the input modality.
    """
    from datasets.brats2021 import BraTS2021Dataset
    from datasets.loader import all_slices
    from guided_diffusion import dist_util

    if split == "val" and not any(Path(config.data.data_dir, split).glob("*/*.npy")):
        print(f"no validation slices in {config.data.data_dir}: only the oracle threshold can be shown")
        return None
    return all_slices(
        BraTS2021Dataset(
            config.data.data_dir,
            split,
            kinds_scored(config),
            config.data.image_size,
            processes=dist_util.local_world_size(),
            progress=dist_util.rank() == 0,
        )
    )


def labelled(maps: dict, key: str) -> tuple:
    """Scores, truth and brain mask as `evaluate` takes them, with the array named `key` as the score."""
    return maps[key], maps["truth"], maps["brainmask"]


def results_name(model_name: str, forward: Translator, backward: Translator) -> str:
    """The folder of a test run: what was chained, and how it was sampled."""
    name = f"{forward.name}__{backward.name}"
    return name if model_name == "unet" else f"{name}__{sampling_name(forward.config)}"


def sampling_name(config: Any) -> str:
    """How MMCCD sampled, for the name of its results: `fast`, `ddim100`, `ancestral1000`, `ddim10_stride8`, …"""
    from config import sampling_preset
    from guided_diffusion.respace import space_timesteps
    from utils.experiment import leaves

    sampling = config.score_model.sampling
    paper, fast = (sampling_preset(name, config.score_model.mask.width) for name in ("paper", "fast"))
    if sampling.use_ddim and fast.items() <= dict(leaves(config)).items():
        return "fast"
    steps = space_timesteps(config.score_model.diffusion.steps, sampling.timestep_respacing)
    name = f"{'ddim' if sampling.use_ddim else 'ancestral'}{len(steps)}"
    if sampling.timestep_respacing.startswith("trailing"):
        name += "_trailing"
    if sampling.stride != paper["score_model.sampling.stride"]:
        name += f"_stride{sampling.stride}"
    if sampling.average != paper["score_model.sampling.average"]:
        name += f"_{sampling.average}"
    return name


def join_processes() -> None:
    """Join the other processes that torchrun or mpiexec started, if there are any.

    Raises:
        UserError: they cannot work together.
    """
    from guided_diffusion import dist_util

    try:
        dist_util.setup()
    except dist_util.LaunchError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    run(main)

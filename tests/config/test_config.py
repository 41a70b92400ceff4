"""Settings: the paper's values, overrides, validation, and no unused keys."""

import contextlib
import inspect
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict

import config as configs
import modality_cyclic_test
import modality_cyclic_train
from config import brats_config, check, flatten, get_config, override, resolve
from models import METHODS, load_method
from models.sampling import SAMPLING, sampling_keys
from scoring.chain import chain_parser, scoring_options
from utils.cli import UserError

PAPER = {  # Liang et al. 2023, and their published settings
    "seed": 0,
    "precision": "auto",
    "deterministic": False,
    "data.data_dir": "./datasets/data",
    "data.input": "flair",
    "data.trans": "t2",
    "data.image_size": 128,
    "score_model.model.model_channels": 32,
    "score_model.model.channel_mult": (1, 1, 2, 3, 4),
    "score_model.model.num_res_blocks": 2,
    "score_model.model.attention_resolutions": (4, 8, 16),
    "score_model.model.num_heads": 1,
    "score_model.model.dropout": 0.1,
    "score_model.model.use_scale_shift_norm": True,
    "score_model.model.resblock_updown": True,
    "score_model.model.norm_groups": 16,
    "score_model.diffusion.steps": 1000,
    "score_model.diffusion.noise_schedule": "linear",
    "score_model.diffusion.model_mean_type": "START_X",
    "score_model.diffusion.model_var_type": "FIXED_LARGE",
    "score_model.diffusion.rescale_timesteps": False,
    "score_model.mask.width": 16,
    "score_model.mask.stride": 2,
    "score_model.baselines.latent_channels": 8,
    "score_model.baselines.noise_size": 16,
    "score_model.baselines.noise_std": 1.2,
    "score_model.baselines.noise_timestep": 249,
    "score_model.training.iterations": 100_000,
    "score_model.training.batch_size": 32,
    "score_model.training.lr": 1e-4,
    "score_model.training.weight_decay": 0.0,
    "score_model.training.lr_decay_steps": 150_000,
    "score_model.training.lr_decay_factor": 0.5,
    "score_model.training.ema_rate": 0.9999,
    "score_model.training.schedule_sampler": "uniform",
    "score_model.training.log_interval": 100,
    "score_model.training.save_interval": 5000,
    "score_model.training.keep_last": 0,
    "score_model.sampling.batch_size": 32,
    "score_model.sampling.stride": 2,
    "score_model.sampling.score": "errors",
    "score_model.sampling.smooth": "none",
    "score_model.sampling.use_ddim": True,
    "score_model.sampling.eta": 0.0,
    "score_model.sampling.timestep_respacing": "100",
    # ours: alternatives to the paper's score, chosen on validation slices
    "score_model.scoring.sign": "bright,dark,both",
    "score_model.scoring.norm": "absolute,squared,standardised",
    "score_model.scoring.calibration": "reconstruction,none",
    "score_model.scoring.match": "scan,affine,none",
    "score_model.scoring.smoothing": "gaussian,median,none",
    "score_model.scoring.width": "0.03125,0.015625",
    "score_model.scoring.outside": "zeros,left_out",
    "score_model.scoring.neighbours": "0,3",
    "score_model.scoring.rim": "0,4",
    "score_model.threshold.healthy_share": 0.01,
}


@pytest.fixture
def brats() -> ConfigDict:
    return get_config("brats")


# ----------------------------------------------------------------------------------------------------------
# The configs


def test_brats_config_has_the_settings_of_the_paper(brats):
    assert dict(flatten(brats)) == PAPER


def test_phantom_config_has_the_same_keys_and_smaller_sizes(brats):
    phantom = get_config("phantom")
    assert dict(flatten(phantom)).keys() == dict(flatten(brats)).keys()
    assert phantom.score_model.diffusion.to_dict() == brats.score_model.diffusion.to_dict()
    assert phantom.data.data_dir == "./datasets/phantom"
    for key in ("model.model_channels", "model.num_res_blocks", "training.iterations", "training.batch_size"):
        assert phantom.score_model[key] < brats.score_model[key]


@pytest.mark.parametrize("dataset", ["brats", "phantom"])
def test_configs_are_locked_and_valid(dataset):
    config = get_config(dataset)
    check(config)
    for section in (config, config.data, config.score_model, config.score_model.training):
        with pytest.raises((AttributeError, KeyError)):
            section.new_key = 1
    with pytest.raises(TypeError):
        config.data.image_size = "128"


def test_get_config_returns_a_new_config(brats):
    brats.data.image_size = 64
    assert get_config("brats").data.image_size == 128


def test_modality_as_dataset_is_refused():
    with pytest.raises(UserError, match=r"'flair' is a modality, use --input flair with --dataset brats\|phantom"):
        get_config("flair")


def test_unknown_dataset():
    with pytest.raises(UserError, match=r"unknown --dataset 'brat', did you mean 'brats'\? \(known: brats, phantom"):
        get_config("brat")


# ----------------------------------------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "7", 7),
        ("data.trans", "t1", "t1"),
        ("score_model.training.iterations", "2000", 2000),
        ("score_model.training.lr", "1e-3", 1e-3),
        ("score_model.training.lr", "1", 1.0),
        ("score_model.sampling.use_ddim", "False", False),
        ("score_model.sampling.timestep_respacing", "50", "50"),
        ("score_model.sampling.timestep_respacing", "", ""),
        ("score_model.model.channel_mult", "(1, 2)", (1, 2)),
        ("score_model.model.attention_resolutions", "2,4", (2, 4)),
    ],
)
def test_override(brats, key, text, value):
    assert override(brats, [f"--config.{key}={text}"]) == [key]
    changed = dict(flatten(brats))
    assert changed[key] == value
    assert type(changed[key]) is type(PAPER[key])
    assert {other: changed[other] for other in PAPER if other != key} == {
        other: PAPER[other] for other in PAPER if other != key
    }


def test_later_overrides_win(brats):
    assert override(brats, ["--config.seed=1", "--config.data.input=t1", "--config.seed=2"]) == [
        "seed",
        "data.input",
        "seed",
    ]
    assert (brats.seed, brats.data.input) == (2, "t1")
    assert override(brats, []) == []


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("score_model.training.iteration", "score_model.training.iterations"),
        ("score_model.mask.with", "score_model.mask.width"),
        ("data.img_size", "data.image_size"),
        ("score_model.model", "score_model.model."),  # a section has no value
    ],
)
def test_unknown_key_suggests_the_nearest(brats, key, nearest):
    with pytest.raises(UserError, match=f"unknown config key '{key}', did you mean '{nearest}"):
        override(brats, [f"--config.{key}=1"])
    assert dict(flatten(brats)) == PAPER


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("score_model.training.iterations", "many", "int"),
        ("score_model.training.iterations", "1.5", "int"),
        ("score_model.training.lr", "fast", "float"),
        ("score_model.sampling.use_ddim", "perhaps", "bool"),
        ("score_model.model.channel_mult", "(1, 2", "tuple"),
    ],
)
def test_value_of_the_wrong_type(brats, key, text, kind):
    with pytest.raises(UserError) as error:
        override(brats, [f"--config.{key}={text}"])
    assert str(error.value) == f"--config.{key}={text} is not of type {kind}"
    assert dict(flatten(brats)) == PAPER


def test_override_without_a_value(brats):
    with pytest.raises(UserError, match="needs a value: write --config"):
        override(brats, ["--config.seed"])


def test_overrides_win_over_flags():
    flags = {"data.input": "t1", "data.trans": None, "seed": 3}
    config, given = resolve("brats", flags, ["--config.seed=4", "--config.data.image_size=64"])
    assert (config.data.input, config.data.trans, config.seed, config.data.image_size) == ("t1", "t2", 4, 64)
    assert given == {"data.input", "seed", "data.image_size"}
    assert config.is_locked


@pytest.mark.parametrize(("preset", "like"), [("small", "phantom"), ("paper", "brats"), (None, "brats")])
def test_preset_uses_the_sizes_of_another_config(preset, like):
    config, given = resolve("brats", {"seed": 3}, ["--config.data.input=t1"], preset=preset)
    expected = dict(flatten(get_config(like))) | {"data.data_dir": get_config("brats").data.data_dir}
    assert dict(flatten(config)) == expected | {"seed": 3, "data.input": "t1"}
    assert given == {"seed", "data.input"}
    assert config.is_locked


# ----------------------------------------------------------------------------------------------------------
# Invalid values


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.trans=flair", "both 'flair': a translation needs two modalities"),
        ("data.image_size=120", "image_size=120 cannot be halved 4 times.*multiple of 16"),
        ("data.input=seg", "--input 'seg' is a mask: name a modality"),
        ("data.trans=brainmask", "--trans 'brainmask' is a mask: name a modality"),
        ("data.image_size=0", "image_size=0"),
        ("data.image_size=32768", "data.image_size: 32768 is greater than the maximum of 16384"),
        ("score_model.model.model_channels=100000000", "model_channels: 100000000 is greater than .* 4096"),
        ("score_model.model.num_res_blocks=1000", "num_res_blocks: 1000 is greater than the maximum of 64"),
        ("score_model.model.channel_mult=(1,1,2,3,1000)", r"channel_mult\[4\]: 1000 is greater than the maximum of 64"),
        ("score_model.diffusion.steps=99999999999", "diffusion.steps: 99999999999 is greater than .* 1000000"),
        ("score_model.diffusion.steps=100000000", "diffusion.steps: 100000000 is greater than the maximum of 1000000"),
        ("score_model.baselines.latent_channels=1000000000000", "latent_channels: 1000000000000 is greater than"),
        ("score_model.training.lr=inf", "Infinity is not a finite number"),
        ("data.image_size=-16", "image_size=-16"),
        ("score_model.model.channel_mult=(1,0)", "channel_mult holds 0"),
        ("score_model.model.channel_mult=(1,1.5)", "channel_mult holds 1.5"),
        ("score_model.model.channel_mult=(1,'a')", "channel_mult holds 'a'"),
        ("score_model.mask.width=0", "mask.width=0 must be between 1 and 128"),
        ("score_model.mask.width=129", "mask.width=129 must be between 1 and 128"),
        ("score_model.mask.stride=0", "mask.stride=0"),
        ("score_model.mask.stride=17", "mask.stride=17.*to skip no pixel"),
        ("score_model.sampling.stride=0", "sampling.stride=0"),
        ("score_model.sampling.stride=17", "sampling.stride=17.*to skip no pixel"),
        ("precision=half", "precision='half' must be one of.*float16"),
        ("score_model.diffusion.steps=0", "diffusion.steps=0 must be at least 1"),
        ("score_model.training.iterations=0", "training.iterations=0 must be at least 1"),
        ("score_model.training.batch_size=0", "training.batch_size=0 must be at least 1"),
        ("score_model.training.lr_decay_steps=0", "training.lr_decay_steps=0 must be at least 1"),
        ("score_model.training.log_interval=0", "training.log_interval=0 must be at least 1"),
        ("score_model.training.save_interval=-1", "training.save_interval=-1 must be at least 1"),
        ("score_model.sampling.batch_size=0", "sampling.batch_size=0 must be at least 1"),
        ("score_model.training.keep_last=-1", "keep_last=-1 must be at least 0"),
        ("score_model.training.lr=-1", "lr=-1.0 must be at least 0"),
        ("score_model.training.weight_decay=-1", "weight_decay=-1.0 must be at least 0"),
        ("score_model.training.ema_rate=2", "ema_rate=2.0 must be between 0 and 1"),
        ("score_model.model.norm_groups=0", "norm_groups=0 must be at least 1"),
        ("score_model.model.norm_groups=7", "norm_groups=7 does not divide the 32 channels"),
        ("score_model.model.num_heads=0", "num_heads=0 must be at least 1"),
        ("score_model.model.model_channels=0", "model_channels=0 must be at least 1"),
        ("score_model.model.channel_mult=()", "channel_mult is empty"),
        ("score_model.model.dropout=1.5", "dropout=1.5 must be between 0 and 1"),
        ("score_model.model.dropout=nan", "dropout=nan must be between 0 and 1"),
        ("score_model.model.attention_resolutions=(0,)", "attention_resolutions holds 0"),
        ("score_model.model.attention_resolutions=(3,)", "attention_resolutions holds 3: .*1, 2, 4"),
        ("score_model.sampling.eta=-1", "eta=-1.0 must be between 0 and 1"),
        ("score_model.sampling.score=scores", "score='scores' must be one of errors, reconstructions, standardised"),
    ],
)
def test_invalid_values_are_refused(brats, setting, message):
    override(brats, [f"--config.{setting}"])
    with pytest.raises(UserError, match=message):
        check(brats)


def test_noise_finer_than_the_image_is_refused(brats):
    override(brats, ["--config.score_model.baselines.noise_size=129"])
    check(brats)  # only the denoising autoencoder draws noise on this grid
    with pytest.raises(UserError, match="noise_size=129 must be between 1 and 128"):
        check(brats, "dae")


@pytest.mark.parametrize(("channel_mult", "refused"), [("(1, 1, 1)", True), ("(1, 1, 2)", True), ("(1, 2, 2)", False)])
def test_groups_of_single_values_are_refused(brats, channel_mult, refused):
    """Their norm is 0 whatever the slice; torch refuses to compute it for a single slice."""
    settings = {"data.image_size": 4, "score_model.model.model_channels": 16, "score_model.mask.width": 4}
    override(brats, [f"--config.{key}={value}" for key, value in settings.items()])
    override(brats, [f"--config.score_model.model.channel_mult={channel_mult}"])
    network = load_method("unet").create_network(brats.score_model)
    single = torch.zeros(1, 1, 4, 4)
    if refused:
        with pytest.raises(UserError, match=r"last of the 3 levels .* has 1 px, and norm_groups=16 leaves one value"):
            check(brats)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            network(single)
    else:
        check(brats)
        network(single)


@pytest.mark.parametrize(
    "settings",
    [
        ["score_model.mask.width=128", "score_model.mask.stride=128"],
        ["score_model.mask.width=1", "score_model.mask.stride=1", "score_model.sampling.stride=1"],
        ["data.image_size=16"],
        ["data.image_size=16384"],
        ["score_model.model.model_channels=4096", "score_model.diffusion.steps=1000000"],
        ["data.image_size=50", "score_model.model.channel_mult=(1,2)"],
    ],
)
def test_values_at_the_limits_are_accepted(brats, settings):
    override(brats, [f"--config.{setting}" for setting in settings])
    check(brats)


# ----------------------------------------------------------------------------------------------------------
# Sampling presets


def test_paper_preset_is_the_default(brats):
    settings = dict(flatten(brats))
    assert sampling_keys(*SAMPLING["paper"], brats.score_model.mask.width).items() <= settings.items()


@pytest.mark.parametrize(
    ("width", "paper_stride", "fast_stride"), [(16, 2, 8), (8, 1, 4), (4, 1, 2), (12, 1, 6), (3, 1, 1), (1, 1, 1)]
)
def test_preset_strides_scale_with_the_band_width(width, paper_stride, fast_stride):
    for name, stride in (("paper", paper_stride), ("fast", fast_stride)):
        assert sampling_keys(*SAMPLING[name], width)["score_model.sampling.stride"] == stride


# ----------------------------------------------------------------------------------------------------------
# Unused keys

SIZE = 16
OVERRIDES = (
    f"--config.data.image_size={SIZE}",
    "--config.score_model.model.model_channels=16",
    "--config.score_model.model.channel_mult=(1, 1)",
    "--config.score_model.model.num_res_blocks=1",
    "--config.score_model.mask.width=4",
    "--config.score_model.mask.stride=4",
    "--config.score_model.sampling.stride=4",
    "--config.score_model.training.iterations=2",
    "--config.score_model.training.batch_size=2",
    "--config.score_model.training.save_interval=2",
    "--config.score_model.sampling.timestep_respacing=2",
)
# These read all keys, or only validate or change values, so they do not count as using a key.
UNCOUNTED_METHODS = (
    "__init__",
    "__str__",
    "__repr__",
    "__eq__",
    "items",
    "values",
    "lock",
    "to_dict",
    "to_json",
    "to_json_best_effort",
    "to_yaml",
    "copy_and_resolve_references",
    "update",
    "update_from_flattened_dict",
)
UNCOUNTED_FUNCTIONS = ("check", "override", "resolve", "get_config", "flatten")


class KeyReads:
    """Records the dotted keys that are read from `config` or a copy of it.

    A section of a copy is recognised by its set of keys, which is unique within a config.
    """

    def __init__(self, config: ConfigDict):
        self.keys: set[str] = set()
        self.sections = {frozenset(section.keys()): name for name, section in self._sections(config)}
        assert len(self.sections) == len(list(self._sections(config)))
        self._uncounted = 0

    def _sections(self, config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, ConfigDict]]:
        yield prefix, config
        for key, value in config.items():
            if isinstance(value, ConfigDict):
                yield from self._sections(value, f"{prefix}{key}.")

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        self._uncounted += 1
        try:
            yield
        finally:
            self._uncounted -= 1

    def without_counting(self, function):
        def wrapped(*args, **kwargs):
            with self.uncounted():
                result = function(*args, **kwargs)
                return iter(list(result)) if inspect.isgenerator(result) else result

        return wrapped

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = ConfigDict.__getitem__  # attributes are read through it too

        def getitem(section, key):
            if not self._uncounted:
                with self.uncounted():
                    name = self.sections.get(frozenset(section.keys()))
                if name is not None:
                    self.keys.add(f"{name}{key}")
            return original(section, key)

        monkeypatch.setattr(ConfigDict, "__getitem__", getitem)
        for name in UNCOUNTED_METHODS:
            monkeypatch.setattr(ConfigDict, name, self.without_counting(getattr(ConfigDict, name)))
        for name in UNCOUNTED_FUNCTIONS:
            monkeypatch.setattr(configs, name, self.without_counting(getattr(configs, name)))


@pytest.fixture
def slices(tmp_path, write_slices):
    """Write two slices per split, each of a brain with a bright lesion."""
    rng = np.random.default_rng(0)
    brain = np.zeros((SIZE, SIZE), np.uint8)
    brain[3:13, 2:14] = 1
    lesion = np.zeros_like(brain)
    lesion[6:9, 6:9] = 4
    for split in ("train", "val", "test"):
        arrays = {kind: {} for kind in ("flair", "t2", "seg", "brainmask")}
        for subject in (f"{split}-A", f"{split}-B"):
            for kind in ("flair", "t2"):
                image = np.where(brain, rng.uniform(-2, 2, brain.shape) + lesion, -3)
                arrays[kind][subject, 70] = image.astype(np.float32)
            arrays["seg"][subject, 70] = lesion
            arrays["brainmask"][subject, 70] = brain
        write_slices(tmp_path / "data", split, arrays)
    return tmp_path / "data"


@pytest.fixture
def run_everything(slices, tmp_path, monkeypatch):
    """Train and test every method for a few steps, in this process."""

    def call(main, *args):
        shared = ("--gpu_id=cpu", f"--data_dir={slices}", f"--logdir={tmp_path / 'experiments'}", *OVERRIDES)
        monkeypatch.setattr(sys, "argv", ["script", *shared, *args])
        main()

    def everything():
        call(modality_cyclic_train.main)
        call(modality_cyclic_train.main, "--training_process=backward")
        call(modality_cyclic_train.main, "--model_name=diffusion")
        call(modality_cyclic_test.main)
        call(modality_cyclic_test.main, "--model_name=diffusion")
        for baseline in (name for name, entry in METHODS.items() if not entry.translates):
            call(modality_cyclic_train.main, f"--model_name={baseline}")
        call(modality_cyclic_test.main, "--model_name=ddpm")

    return everything


@pytest.mark.parametrize("dead", [(), ("dead", "data.dead", "score_model.training.dead", "score_model.mask.dead")])
def test_every_key_is_read_by_training_or_testing(run_everything, monkeypatch, capsys, dead):
    """The second case adds unused keys, which must be found."""

    def variant():
        config = brats_config.get_config()
        for name in dead:
            section, _, key = name.rpartition(".")
            (config[section] if section else config)[key] = 1
        return config

    monkeypatch.setitem(configs.CONFIGS, "brats", variant)
    reads = KeyReads(variant())
    expected = {key for key, _ in flatten(variant())}
    reads.patch(monkeypatch)
    run_everything()
    assert expected - reads.keys == set(dead)
    assert "results:" in capsys.readouterr().out


def test_network_refuses_an_unused_key(brats):
    """Unpacking the section reads all of its keys, so the test above cannot find unused ones there."""
    with brats.unlocked():
        brats.score_model.model.dead = 1
    with pytest.raises(TypeError, match="dead"):
        load_method("unet").create_network(brats.score_model)


@pytest.mark.parametrize("share", ["-0.1", "0.6", "nan"])
def test_the_share_of_marked_healthy_pixels_is_at_most_a_half(share):
    args = chain_parser("").parse_args([])
    with pytest.raises(UserError, match="healthy_share"):
        scoring_options(args, [f"--config.score_model.threshold.healthy_share={share}"])

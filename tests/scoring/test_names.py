"""Names of results folders: runs that sample differently have different names."""

import itertools
from pathlib import Path

import pytest

import config as configs
from models import load_method
from models.sampling import SAMPLING, sampling_keys, sampling_name, sampling_settings
from scoring.chain import Chain, TrainedTranslator, results_name

FAST = {key.rpartition(".")[2]: value for key, value in sampling_keys(*SAMPLING["fast"], 16).items()}

# Keys of config.score_model.sampling, and the seed; each of these samples differently from all others.
SAMPLINGS = {
    "paper": {},
    "eta": {"eta": 0.5},
    "another eta": {"eta": 1.0},
    "seed": {"seed": 1},
    "another seed": {"seed": 2},
    "both": {"eta": 0.5, "seed": 1},
    "ancestral": {"use_ddim": False},
    "ancestral, all steps": {"use_ddim": False, "timestep_respacing": ""},
    "all steps": {"timestep_respacing": ""},
    "50": {"timestep_respacing": "50"},
    "50 at a whole stride": {"timestep_respacing": "ddim50"},
    "50 that end at the last": {"timestep_respacing": "trailing50"},
    "50 in three sections": {"timestep_respacing": "10,15,25"},
    "50 in other sections": {"timestep_respacing": "25,15,10"},
    "50 in two sections": {"timestep_respacing": "25,25"},
    "stride": {"stride": 8},
    "score": {"score": "reconstructions"},
    "another score": {"score": "standardised"},
    "smooth": {"smooth": "median3"},
    "another smooth": {"smooth": "median5"},
    "fast": FAST,
    "fast, eta": FAST | {"eta": 0.5},
    "fast, seed": FAST | {"seed": 1},
    "fast, but unsmoothed": FAST | {"smooth": "none"},
    "nearly fast": {"timestep_respacing": "trailing2", "stride": 8},
}


def config_of(**keys):
    config = configs.get_config("brats")
    config.seed = keys.pop("seed", config.seed)
    config.score_model.sampling.update(keys)
    return config


def chain_of(model_name: str = "diffusion", **keys) -> Chain:
    config = config_of(**keys)
    names = ("masked", "unet")
    return Chain(model_name, *(TrainedTranslator(name, Path(name, "ema_0.9_000002.pt"), config, {}) for name in names))


def test_different_samplings_have_different_names():
    names = {which: sampling_name(config_of(**keys)) for which, keys in SAMPLINGS.items()}
    for one, other in itertools.combinations(SAMPLINGS, 2):
        assert names[one] != names[other], (one, other)
        assert sampling_settings(config_of(**SAMPLINGS[one])) != sampling_settings(config_of(**SAMPLINGS[other]))
    assert all("/" not in name and "," not in name and " " not in name for name in names.values())


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("paper", "ddim100"),
        ("fast", "fast"),
        ("ancestral, all steps", "ancestral1000"),
        ("all steps", "ddim1000"),
        ("50", "ddim50"),
        ("both", "ddim100_eta0.5_seed1"),
        ("50 in three sections", "ddim50_10-15-25"),
        ("stride", "ddim100_stride8"),
    ],
)
def test_names_contain_only_differences_from_the_presets(which, name):
    assert sampling_name(config_of(**SAMPLINGS[which])) == name
    assert results_name(chain_of(**SAMPLINGS[which])) == f"masked__unet__{name}"


@pytest.mark.parametrize("same", [{"timestep_respacing": "100"}, {"batch_size": 7}, {"use_ddim": False, "eta": 0.5}])
def test_equivalent_samplings_have_the_same_name(same):
    plain = {key: value for key, value in same.items() if key == "use_ddim"}
    assert sampling_name(config_of(**same)) == sampling_name(config_of(**plain))


def test_sampling_is_not_in_the_name_of_cyclic_unet():
    chain = chain_of("unet", eta=0.5, seed=1)
    assert results_name(chain) == "masked__unet"
    assert load_method("unet").sampling_settings(chain.config) == {"smooth": "none"}
    assert results_name(chain_of("unet", smooth="median3")) == "masked__unet__median3"

"""The demo's settings: the paper's method at a size that trains in minutes on two CPU cores."""

from ml_collections import ConfigDict

from . import brats_config


def get_config() -> ConfigDict:
    """Return the paper's settings, reduced in size, for the phantom."""
    config = make_small(brats_config.get_config())
    config.data.data_dir = "./datasets/phantom"
    return config


def make_small(config: ConfigDict) -> ConfigDict:
    """Reduce network, images and training of a config, in place, to a size that a CPU trains in minutes."""
    # Lower precision hardly speeds up such a small network, and float32 results do not depend on bfloat16 support.
    config.precision = "float32"

    config.data.image_size = 64

    model = config.score_model.model
    model.model_channels = 16
    model.num_res_blocks = 1
    model.attention_resolutions = (8, 16)
    model.dropout = 0.0  # drawing its random numbers takes a quarter of a step on a CPU

    # 1/16 of the image, which suits `--sampling fast` better than the paper's 1/8.
    config.score_model.mask.width = 4
    config.score_model.mask.stride = 1

    training = config.score_model.training
    training.iterations = 1_200
    training.batch_size = 4
    training.lr = 1e-3
    training.ema_rate = 0.995
    training.save_interval = 300

    sampling = config.score_model.sampling
    sampling.batch_size = 16
    sampling.stride = 1
    return config

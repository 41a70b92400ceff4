"""The demo's settings: the paper's method at a size that two CPU cores train in minutes."""

from ml_collections import ConfigDict

from . import brats_config


def get_config() -> ConfigDict:
    """The paper's settings, made small, for the phantom."""
    config = make_small(brats_config.get_config())
    config.data.data_dir = "./datasets/phantom"
    return config


def make_small(config: ConfigDict) -> ConfigDict:
    """The config with a network, images and a training that take a CPU minutes."""
    # So small a network gains little from less, and float32 does the same with and without bfloat16 units.
    config.precision = "float32"

    config.data.image_size = 64

    model = config.score_model.model
    model.model_channels = 16
    model.num_res_blocks = 1
    model.attention_resolutions = (8, 16)
    model.dropout = 0.0  # on a CPU, drawing its random numbers takes a quarter of a step

    # A 16th of the image, which `--sampling fast` likes better than the paper's eighth.
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

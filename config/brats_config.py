"""The paper's settings (Liang et al. 2023), for BraTS 2021."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Every setting of a run, unlocked. Sizes are in pixels of the resized slice."""
    config = ConfigDict()
    config.seed = 0
    # auto: bfloat16 where the device computes in it, float16 on older GPUs, else float32; or one of the three
    config.precision = "auto"
    config.deterministic = False  # the same bits in every run on a GPU, too, which costs speed

    config.data = data = ConfigDict()
    data.data_dir = "./datasets/data"
    data.input = "flair"  # the modality at hand at test time
    data.trans = "t2"  # the modality it is translated to
    data.image_size = 128

    config.score_model = score_model = ConfigDict()

    score_model.model = model = ConfigDict()  # the UNet of either translator
    model.model_channels = 32
    model.channel_mult = (1, 1, 2, 3, 4)
    model.num_res_blocks = 2
    model.attention_resolutions = (4, 8, 16)  # downsampling rates: at 32, 16 and 8 px
    model.num_heads = 1
    model.dropout = 0.1
    model.use_scale_shift_norm = True
    model.resblock_updown = True
    model.norm_groups = 16

    score_model.diffusion = diffusion = ConfigDict()
    diffusion.steps = 1000
    diffusion.noise_schedule = "linear"
    diffusion.model_mean_type = "START_X"
    diffusion.model_var_type = "FIXED_LARGE"
    diffusion.rescale_timesteps = False

    score_model.mask = mask = ConfigDict()  # the bands that hide the input
    mask.width = 16
    mask.stride = 2  # between the starts that training draws from

    score_model.baselines = baselines = ConfigDict()
    baselines.latent_channels = 8  # of the autoencoder's bottleneck: a 32nd of the pixels
    baselines.noise_size = 16  # of the denoising autoencoder's grid of noise (Kascenas et al. 2022)
    baselines.noise_std = 1.2  # of that noise: a fifth of the brain's range, −3 … 3
    baselines.noise_timestep = 249  # that ddpm noises a slice to: 250 of 1000 steps (Wyatt et al. 2022)

    score_model.training = training = ConfigDict()
    training.iterations = 100_000
    training.batch_size = 32
    training.lr = 1e-4
    training.weight_decay = 0.0
    training.lr_decay_steps = 150_000
    training.lr_decay_factor = 0.5
    training.ema_rate = 0.9999
    training.schedule_sampler = "uniform"
    training.log_interval = 100
    training.save_interval = 5_000
    training.keep_last = 0  # checkpoints that are kept, 0: all

    score_model.sampling = sampling = ConfigDict()
    sampling.batch_size = 32  # network samples at a time, if the memory holds them
    sampling.stride = 2  # between the bands of the sweep
    sampling.score = "errors"  # of the bands that hid a pixel: or "reconstructions", "standardised"
    sampling.smooth = "none"  # or "median3", "median5"; the score of Cyclic UNet, too
    sampling.use_ddim = True
    sampling.eta = 0.0
    sampling.timestep_respacing = "100"

    # Validation slices choose one of every combination of these alternatives (evaluation/scores.py); fix some by naming
    # one alone.
    score_model.scoring = scoring = ConfigDict()
    scoring.sign = "bright,dark,both"  # count errors above the reconstruction, below it, or both
    scoring.norm = "absolute,squared,standardised"
    scoring.calibration = "reconstruction,none"  # by the error that is usual at this intensity
    scoring.match = "scan,affine,none"  # of a scan's intensities to its reconstruction
    scoring.smoothing = "gaussian,median,none"
    scoring.width = "0.03125,0.015625"  # of the smoothing, in shares of the slice
    scoring.outside = "zeros,left_out"  # of the brain, to the smoothing
    scoring.neighbours = "0,3"  # smoothing over neighbouring slices, where a scan has several
    scoring.rim = "0,4"  # of the brain mask that is not scored, px at 128
    return config

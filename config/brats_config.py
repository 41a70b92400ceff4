"""The paper's settings (Liang et al. 2023), for BraTS 2021."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return all settings, unlocked. Sizes are in pixels of the resized slice."""
    config = ConfigDict()
    config.seed = 0
    # auto: bfloat16 where the device supports it, float16 on older GPUs, else float32; or one of the three
    config.precision = "auto"
    config.deterministic = False  # bit-identical results on a GPU, too, at the cost of speed

    config.data = data = ConfigDict()
    data.data_dir = "./datasets/data"
    data.input = "flair"  # modality available at test time
    data.trans = "t2"  # modality it is translated to
    data.image_size = 128

    config.score_model = score_model = ConfigDict()

    score_model.model = model = ConfigDict()  # UNet of both translators
    model.model_channels = 32
    model.channel_mult = (1, 1, 2, 3, 4)
    model.num_res_blocks = 2
    model.attention_resolutions = (4, 8, 16)  # downsampling rates: attention at 32, 16 and 8 px
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

    score_model.mask = mask = ConfigDict()  # bands of the input that are replaced by noise
    mask.width = 16
    mask.stride = 2  # step between the band positions drawn in training

    score_model.baselines = baselines = ConfigDict()
    baselines.latent_channels = 8  # of the autoencoder's bottleneck, 1/32 of the image's values
    baselines.noise_size = 16  # grid on which the denoising autoencoder draws noise (Kascenas et al. 2022)
    baselines.noise_std = 1.2  # of that noise: a fifth of the brain's intensity range, −3 … 3
    baselines.noise_timestep = 249  # up to which ddpm adds noise: 250 of 1000 steps (Wyatt et al. 2022)

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
    training.keep_last = 0  # number of newest checkpoints to keep, 0: all

    score_model.sampling = sampling = ConfigDict()
    sampling.batch_size = 32  # samples per network pass, memory permitting
    sampling.stride = 2  # step between the bands of the sweep
    sampling.score = "errors"  # averaged over the bands that cover a pixel; or "reconstructions", "standardised"
    sampling.smooth = "none"  # or "median3", "median5": filters the score, Cyclic UNet's, too
    sampling.use_ddim = True
    sampling.eta = 0.0
    sampling.timestep_respacing = "100"

    # Alternatives; validation slices choose the best combination (evaluation/scores.py). Give a single one to fix it.
    score_model.scoring = scoring = ConfigDict()
    scoring.sign = "bright,dark,both"  # count pixels brighter than their reconstruction, darker, or both
    scoring.norm = "absolute,squared,standardised"
    scoring.calibration = "reconstruction,none"  # divide by the mean error of healthy pixels of the same intensity
    scoring.match = "scan,affine,none"  # match a scan's intensities to its reconstruction
    scoring.smoothing = "gaussian,median,none"
    scoring.width = "0.03125,0.015625"  # of the smoothing, as a fraction of the slice
    scoring.outside = "zeros,left_out"  # pixels outside the brain: smoothed as zeros, or left out of the smoothing
    scoring.neighbours = "0,3"  # σ of a Gaussian over neighbouring slices, where a scan has several
    scoring.rim = "0,4"  # width of the brain mask's unscored rim, px at 128

    score_model.threshold = threshold = ConfigDict()
    threshold.healthy_share = 0.01  # of the healthy validation pixels, marked at the threshold `healthy`
    return config

"""The paper's method (Liang et al. 2023), translators, masks, masked conditional diffusion, cycles; and baselines."""

# What `--model_name` names. Translators lead from one modality to another, and two make a cycle; a baseline
# reconstructs the input modality itself.
TRANSLATORS = ("unet", "diffusion", "histogram")
BASELINES = ("autoencoder", "dae", "ddpm")

MODEL_HELP = (
    "unet: Cyclic UNet; diffusion: MMCCD; histogram: a cycle of joint histograms; and what reconstructs the input "
    "itself: autoencoder, dae (denoising autoencoder), ddpm (AnoDDPM)"
)

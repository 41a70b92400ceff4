"""The paper's method (Liang et al. 2023), translators, masks, masked conditional diffusion, cycles; and baselines."""

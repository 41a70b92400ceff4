"""The paper's method (Liang et al. 2023): translators, band masks, masked conditional diffusion, cycles."""

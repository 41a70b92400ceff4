"""A small diffusion library after Dhariwal & Nichol 2021. Knows nothing of MRI and imports no other room."""

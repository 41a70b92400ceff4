"""General-purpose diffusion library after Dhariwal & Nichol 2021, with no dependence on MRI; imports only `utils`."""

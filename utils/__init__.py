"""Command line, files, NIfTI volumes, devices, storage and random numbers. Imports no other package of this project."""

"""Triton kernels and their launchers, one file an operator. Nothing here imports the rest of the package."""

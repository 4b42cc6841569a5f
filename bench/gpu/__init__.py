"""A whole run on a GPU in stages, ``python -m bench.gpu``, and a Triton driver without a device."""

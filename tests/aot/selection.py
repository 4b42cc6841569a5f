"""What is compiled without ``--full``."""

import pytest

triton = pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

BEFORE_3_8 = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
"""Whether this Triton compiles products as 3.6 does; without ``--full`` it then compiles for Hopper only."""

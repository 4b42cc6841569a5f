"""What every test shares: a cache of compiled code for each kind of processor, and a heap that is soon searched."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

# Inductor takes up code that it once compiled for wider vectors, or narrower ones, and then computes garbage.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"torchinductor-fastunet-{torch.backends.cpu.get_cpu_capability()}"),
)
# A compiler is asked which vectors there are, and headers are prepared, for longer than the few kernels here take.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")


@pytest.fixture(autouse=True, scope="module")
def search_for_garbage_among_what_is_new():
    """A collection takes half a second once PyTorch's compiler is loaded, all of it on what stays."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end everything is let go, so that no library complains of leaks."""
    gc.unfreeze()

"""Kernel tests run on a CUDA device where there is one, else in Triton's interpreter (``TRITON_INTERPRET=1``).

The choice is made when a kernel is decorated, so without a GPU this folder needs its own pytest process.
"""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path, config):
    """Nothing to collect without a device or the interpreter; `make test` runs this folder with TRITON_INTERPRET=1."""
    return None if GPU or INTERPRETER else (True if collection_path.name.startswith("test_") else None)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU and not INTERPRETER else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Every tensor that a launcher allocates starts as NaN, so an element that no program writes fails the test."""
    from fastunet.kernels import _launch

    with _launch.poisoned():
        yield


@pytest.fixture(autouse=True)
def ieee_float32():
    """float32 tests compare IEEE products; tf32 has tests of its own."""
    previous = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = previous

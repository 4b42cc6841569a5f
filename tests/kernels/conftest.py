"""Kernel tests run on a CUDA device where there is one, in Triton's interpreter (``TRITON_INTERPRET=1``), or compiled
in the emulator (``-p tests.emulator.plugin --emulate 90``).

The choice is made when a kernel is decorated, so without a GPU this folder needs its own pytest process.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests import emulator

EMULATED = emulator.ARCHITECTURE is not None
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETER and not EMULATED
COMPILED = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETER, reason="only compiled, on a GPU or in the emulator: the "
            "interpreter truncates casts to bfloat16, and is too slow for every case in every dtype")]
"""Marks of the cases that the interpreter leaves out."""
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16"),
          pytest.param(torch.bfloat16, id="bf16", marks=COMPILED)]  # fmt: skip


def pytest_ignore_collect(collection_path, config):
    """Nothing to collect where no kernel can run; `make test` runs this folder with TRITON_INTERPRET=1."""
    return None if GPU or INTERPRETER or EMULATED else (True if collection_path.name.startswith("test_") else None)


def pytest_collection_modifyitems(config, items):
    """The interpreter leaves bfloat16 to the emulator, where tests/emulator/test_kernels.py runs all of these cases,
    and repeats, which tests/emulator/test_orders.py has in other orders: it runs one program after another."""
    if INTERPRETER:
        theirs = [item for item in items if item.originalname == "test_repeats_are_bit_identical"
                  or (item.get_closest_marker("gpu") and hasattr(item, "callspec")
                      and torch.bfloat16 in item.callspec.params.values())]  # fmt: skip
        config.hook.pytest_deselected(items=theirs)
        items[:] = [item for item in items if item not in theirs]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A variant that a test asks for by name may need a newer GPU; one that a launcher chose may not."""
    try:
        return (yield)
    except ValueError as error:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        asked = any(hasattr(getattr(value, "config", value), "variant") for value in values)
        if asked and "need compute capability" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True, scope="session")
def brisk_interpreter():
    if not INTERPRETER:
        yield
        return
    from .interpreter import brisk

    with brisk():
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Every tensor that a launcher allocates starts as NaN, so an element that no program writes fails the test."""
    from fastunet.kernels import _launch

    with _launch.poisoned():
        yield


@pytest.fixture(autouse=True)
def ieee_float32():
    """float32 tests compare IEEE products, unless the emulator is asked for tf32."""
    previous = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = emulator.TF32
    yield
    torch.backends.cudnn.allow_tf32 = previous

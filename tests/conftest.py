"""What tests share: a cache of compiled code for each kind of processor, a heap that is soon searched, small data."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import pytest
import torch

# Inductor takes up code that it once compiled for wider vectors, or narrower ones, and then computes garbage.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"torchinductor-fastunet-{torch.backends.cpu.get_cpu_capability()}"),
)
# A compiler is asked which vectors there are, headers are prepared, and processes that compile at the same time are
# started, for longer than the few kernels here take.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # an eighth of the time, and a half of what is kept


gc.set_threshold(100_000, 20, 20)  # searched more often, it takes a tenth of the time of all tests


@pytest.fixture(autouse=True)
def numbers_of_its_own(request):
    """A test draws the same random numbers whichever ran before it, in whatever process."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="module")
def search_for_garbage_among_what_is_new():
    """A collection takes half a second once PyTorch's compiler is loaded, all of it on what stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """A folder of four cases; tests only read it."""
    from fastunet.data import make_phantoms
    from tests.cli_helpers import SHAPE

    root = tmp_path_factory.mktemp("phantoms")
    make_phantoms(root, 4, 3, shape=SHAPE)
    return root


@pytest.fixture
def data(phantoms, tmp_path) -> Path:
    """A copy of the phantoms to damage."""
    return shutil.copytree(phantoms, tmp_path / "data")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A run folder with an untrained network."""
    from tests.cli_helpers import write_checkpoint

    run = tmp_path_factory.mktemp("run")
    write_checkpoint(run / "best.safetensors")
    return run


@pytest.fixture
def cases(tmp_path) -> list:
    """Three heads, of other shapes and turned differently."""
    from fastunet.data import discover_cases
    from tests.data_files import head_case

    for number in range(3):
        head_case(tmp_path / "data" / f"case_{number}", number, (10 + number, 9, 8), ("LPS", "RAS", "SAR")[number])
    return discover_cases(tmp_path / "data")


@pytest.fixture
def nothing_said(monkeypatch) -> None:
    """The test hears the warnings that a process gives once."""
    monkeypatch.setattr("fastunet.errors._said", set())


@pytest.fixture
def tiny_chunks(monkeypatch) -> None:
    """So small that the Dice functions walk every image in many chunks, the last one shorter."""
    monkeypatch.setattr("fastunet.functional.dice_cpu._CHUNK_BYTES", 4 * 4 * 23 // torch.get_num_threads())


def pytest_unconfigure() -> None:
    """At the end everything is let go, so that no library complains of leaks."""
    gc.unfreeze()

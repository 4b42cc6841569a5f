"""Ahead-of-time checks compile for GPUs that need not be there; `--full` takes every dtype and architecture."""

from __future__ import annotations

import os

import pytest

TABLES: list[str] = []
"""Tables to print after the run."""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="ahead-of-time checks: every dtype for every architecture")


def pytest_ignore_collect(collection_path, config):
    """Nothing can be compiled where kernels are decorated for the interpreter."""
    return True if os.environ.get("TRITON_INTERPRET") == "1" and collection_path.name.startswith("test_") else None


@pytest.fixture
def newest_unless_full(request):
    """For what is no product: only products have differed between versions of Triton."""
    from tests.aot.selection import BEFORE_3_8

    if BEFORE_3_8 and not request.config.getoption("--full", default=False):
        pytest.skip("compiled with --full")


@pytest.fixture(scope="module")
def no_code(tmp_path_factory):
    """A cache of its own for kernels that are compiled as far as Triton's GPU dialect, which says what a launch passes
    on: making their code, which would not run here, takes four fifths of the time."""
    compiler = pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton is not installed")

    def without_memory(self, source, metadata, options, capability):
        metadata |= dict.fromkeys(("shared", "tmem_size", "global_scratch_size", "profile_scratch_size"), 0)
        metadata |= dict(global_scratch_align=1, profile_scratch_align=1, name="none")
        return ""

    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("triton"))
        patch.setenv("TRITON_CACHE_DIR", folder)
        patch.setattr("triton.knobs.cache.dir", folder)
        patch.setattr(compiler.CUDABackend, "make_llir", without_memory)
        patch.setattr(compiler.CUDABackend, "make_ptx", lambda *stage: "")
        patch.setattr(compiler.CUDABackend, "make_cubin", lambda *stage: b"")
        yield folder


@pytest.fixture(scope="session")
def show_table():
    """Called with a text, prints it after the run."""
    return TABLES.append


def pytest_terminal_summary(terminalreporter):
    for table in TABLES:
        terminalreporter.write_line("")
        terminalreporter.write_line(table)

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


@pytest.fixture(scope="session")
def show_table():
    """Called with a text, prints it after the run."""
    return TABLES.append


def pytest_terminal_summary(terminalreporter):
    for table in TABLES:
        terminalreporter.write_line("")
        terminalreporter.write_line(table)

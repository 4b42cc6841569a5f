"""The oldest versions that pyproject.toml allows are those that ``make test-rest`` runs a part of the tests under."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

import pytest

LISTED = dict(re.findall(r"^(\w+)==([\d.]+)", (Path(__file__).parent / "oldest.txt").read_text(), re.MULTILINE))
ELSEWHERE = {"torch", "triton"}
"""Triton has a part of its own; which PyTorch was tested, CONTRIBUTING.md says."""


def test_they_are_the_lower_bounds_of_the_project():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    required = text[text.index("\ndependencies = [") : text.index("]", text.index("\ndependencies = ["))]
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', required))
    assert {name: bound for name, bound in bounds.items() if name not in ELSEWHERE} == LISTED


@pytest.mark.skipif("OLDEST" not in os.environ, reason="asks make test-rest what it runs under")
@pytest.mark.parametrize("name", LISTED)
def test_this_part_runs_under_them(name):
    assert f"{importlib.metadata.version(name)}.0".startswith(f"{LISTED[name]}.")

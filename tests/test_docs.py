"""Every code block of README and documentation runs; every page is reached; figures are those of their script."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import create_autospec

import pytest

import fastunet
from fastunet.architecture import PRESETS
from tests.cli_helpers import run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "make ": "continuous integration runs the targets",
    "pip install": "make smoke installs the wheel",
    "torchrun": "tests/test_train_signals.py",
    "pytest bench": "tests/test_bench_measure.py",
    "python -m bench": "tests/test_bench_*.py",
    "fastunet demo": "tests/test_cli_demo.py",
}
"""Commands that are not run here, and where they are."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with what the pages name: DATA, cases with labels, and RUN, a network trained on them."""
    from fastunet.data import make_phantoms

    folder = tmp_path_factory.mktemp("docs")
    make_phantoms(folder / "DATA", 2, 0, shape=(16, 16, 16))
    command("fastunet train DATA --out RUN --epochs 1 --width 4 --depth 2", folder)
    return folder


def command(line: str, folder: Path) -> None:
    """Runs one shell line, with the ``fastunet`` of this environment: in this process where it needs no shell."""
    if line.startswith("fastunet ") and not set(line) & set("|&;<>$`*?\\"):
        before = os.getcwd()
        os.chdir(folder)
        try:
            assert run(*shlex.split(line)[1:]) == 0, line
        finally:
            os.chdir(before)
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda page: page.stem)
def test_python_blocks_run(page, folder, monkeypatch):
    """In order, as one program: what a page shows must run as it stands; tests/test_interop_onnx.py exports."""
    monkeypatch.setattr(fastunet, "to_onnx", create_autospec(fastunet.to_onnx))
    monkeypatch.chdir(folder)
    program: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), program)


def test_shell_blocks_run(folder, tmp_path, monkeypatch):
    """Page after page in one folder; a command that stands on several pages runs once. The default network is small."""
    monkeypatch.setitem(PRESETS, "brats", dict(width=4, depth=2))
    (tmp_path / "DATA").symlink_to(folder / "DATA")
    shown = "\n".join(block for page in PAGES for block in blocks(page, "bash"))
    lines = [line.partition("#")[0].strip() for line in shown.splitlines()]
    for line in dict.fromkeys(filter(None, lines)):
        if not line.startswith(tuple(ELSEWHERE)):
            command(line, tmp_path)


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_figures_are_those_of_their_script():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    for name, draw in figures.FIGURES.items():
        drawn, kept = figures.svg(draw()).decode(), (figures.FOLDER / f"kernel-{name}.svg").read_text()
        # The words, not the bytes: another matplotlib sets its paths differently.
        assert re.findall(r"<text.*?>(.*?)</text>", drawn) == re.findall(r"<text.*?>(.*?)</text>", kept), name

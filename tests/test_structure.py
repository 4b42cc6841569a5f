"""Imports go down only: which room may import which, and no circle between modules. Imports inside functions count."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"allocator", "arguments", "errors", "files", "schema", "outputs", "signals"}
NETWORK = {"architecture", "autograd", "blocks", "chains", "dispatch", "functional", "reference", "touched", "unet"}
MAY_IMPORT = {
    "allocator": set(), "errors": set(), "arguments": set(), "autograd": set(), "architecture": {"arguments"},
    "signals": BASE, "touched": set(), "schema": {"errors"}, "files": {"errors", "schema"},
    "outputs": {"errors", "files"},
    "reference": {"architecture", "arguments", "autograd"},
    "dispatch": {"autograd", "errors", "kernels", "inspection"},
    "functional": {"arguments", "autograd", "dispatch", "errors", "reference"},
    "losses": {"arguments", "functional"}, "metrics": {"arguments", "functional"},
    "chains": {"dispatch", "functional"},
    "blocks": {"architecture", "chains", "dispatch", "functional", "reference", "touched"},
    "unet": {"arguments", "blocks", "chains", "dispatch", "functional", "inference", "reference", "touched"},
    "data": BASE,
    "inference": BASE | NETWORK | {"data", "kernels", "metrics", "training"} - {"unet"},
    "pictures": BASE | {"architecture", "inference"},
    "training": BASE | NETWORK | {"fastunet", "data", "inspection", "losses", "metrics", "pictures"},
    "interop": BASE | NETWORK | {"fastunet"},
    "inspection": BASE | NETWORK | {"fastunet", "kernels", "losses"},
    "kernels": set(),
    "cli": BASE | NETWORK | {"fastunet", "data", "inference", "inspection", "interop", "kernels", "losses", "metrics",
                             "pictures", "training"},
    "__main__": {"cli"},
    "fastunet": {"data", "functional", "interop", "losses", "metrics", "reference", "unet"},
}  # fmt: skip
"""For each room or module of ``fastunet`` what else of it it may import; "fastunet" is the package's own names.

``dispatch`` names launchers, and the search that ``FASTUNET_TUNE=1`` asks for, by strings, imported at first use.
"""


def module_of(path: Path, root: Path) -> str:
    parts = [*path.relative_to(root).with_suffix("").parts]
    parts = ["fastunet", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, name: str, known: set[str]) -> set[str]:
    """The modules of ours that a file imports, by statement or by a constant name given to ``import_module``.

    For a kernel also what is neither PyTorch, Triton, NumPy nor Python's own.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            found |= {part.value.rstrip(".") for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
    ours = ("fastunet", "bench", "tests")
    others = {"torch", "triton", "numpy", *sys.stdlib_module_names} if name.startswith("fastunet.kernels") else None
    return {each for each in found if each.split(".")[0] in ours or (others and each.split(".")[0] not in others)}


def graph(root: Path) -> dict[str, set[str]]:
    files = [p for room in ("fastunet", "kernels", "bench") for p in sorted((root / room).rglob("*.py"))]
    modules = {module_of(path, root): path for path in files}
    return {name: imports(path, name, set(modules)) for name, path in modules.items()}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "fastunet" and len(parts) > 1 else parts[0]


def forbidden(arrows: dict[str, set[str]]) -> list[str]:
    found = []
    for name, targets in arrows.items():
        source = room_of(name)
        for target in sorted(targets):
            there = room_of(target)
            if name.startswith("bench"):
                allowed = not target.startswith("tests")
            else:
                allowed = there == source or there in MAY_IMPORT.get(source, set())
            if not allowed:
                found.append(f"{name} imports {target}")
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    found, state = [], {}

    def visit(name: str, path: list[str]) -> None:
        state[name] = "open"
        for target in sorted(arrows.get(name, ())):
            if state.get(target) == "open" and target != name:
                found.append([*path[path.index(target) :], target])
            elif target not in state and target in arrows:
                visit(target, [*path, target])
        state[name] = "done"

    for name in sorted(arrows):
        if name not in state:
            visit(name, [name])
    return found


def test_imports_go_down_only():
    assert forbidden(graph(ROOT)) == []


def test_no_module_is_part_of_a_circle():
    assert circles(graph(ROOT)) == []


@pytest.mark.parametrize(("file", "text", "said"), [
    ("kernels/relu.py", "from fastunet import errors", "fastunet.kernels.relu imports fastunet.errors"),
    ("fastunet/data/cases.py", "def f():\n    import fastunet.cli", "fastunet.data.cases imports fastunet.cli"),
    ("fastunet/losses.py", "import tests.tolerance", "fastunet.losses imports tests.tolerance"),
    ("fastunet/functional/relu.py", "import importlib\nimportlib.import_module('fastunet.training.loop')",
     "fastunet.functional.relu imports fastunet.training.loop"),
    ("fastunet/metrics.py", "from importlib import import_module\nimport_module('fastunet.cli')",
     "fastunet.metrics imports fastunet.cli"),
    ("kernels/max_pool.py", "import torch, scipy.ndimage", "fastunet.kernels.max_pool imports scipy.ndimage"),
])  # fmt: skip
def test_the_check_can_fail(tmp_path, file, text, said):
    for name in (file, "fastunet/cli/__init__.py", "fastunet/errors.py", "fastunet/training/loop.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text if name == file else "")
    assert forbidden(graph(tmp_path)) == [said]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]


def without_hints(text: str) -> list[str]:
    """The public functions and methods in a module's ``text`` of which a parameter or the result has no type."""
    found = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body, f"{node.name}.")
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                a = node.args
                every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
                bare = [each.arg for each in every if each.annotation is None and each.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    found.append(prefix + node.name)

    visit(ast.parse(text).body, "")
    return found


def test_all_that_is_printed_is_made_printable():
    prints = {path.name: path.read_text().count("print(") for path in (ROOT / "fastunet" / "cli").glob("*.py")}
    # say, and what goes to stderr
    assert {name: count for name, count in prints.items() if count} == {"arguments.py": 1, "__init__.py": 2}


def test_public_functions_have_hints():
    every = {path.name: without_hints(path.read_text()) for path in (ROOT / "fastunet").rglob("*.py")}
    bare = {name: functions for name, functions in every.items() if functions}
    assert bare == {}
    assert without_hints("class A:\n  def f(self, x: int): ...\ndef _g(x): ...\ndef h(y) -> None: ...") == ["A.f", "h"]

"""What the functions that a forward pass runs read from around themselves, noted while it is followed."""

from __future__ import annotations

import contextlib
import dis
import functools
import gc
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastunet.interop.followed import TYPE
from fastunet.interop.values import Kept, Missing, frozen, is_users

Place = tuple[Any, str]
"""A dictionary of globals, a module or a class, and a name in it."""


def read(place: Place) -> Any:
    """What a place holds now."""
    owner, name = place
    if isinstance(owner, dict):
        return owner.get(name, Missing)
    return vars(owner).get(name, Missing) if isinstance(owner, type) else getattr(owner, name, Missing)


class Around:
    """The functions of anybody but PyTorch and us that run, and what they read by name: in their files, in modules and
    classes that they name there, and in ``classes``.

    Args:
        classes: those of the modules whose forward passes run.
        refuse: called with the reason why a function that runs cannot be followed.
    """

    def __init__(self, classes: list[type], refuse: Callable[[str], None]):
        own = {each for kind in classes for each in kind.__mro__ if is_users(each.__module__)}
        self.classes, self.refuse = own - {object}, refuse
        self.codes = set[types.CodeType]()
        self.before: dict[tuple[int, str], tuple[Place, Any]] = {}
        self.kept = Kept()

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what runs; the garbage collector, whose callbacks are no part of it, waits."""
        profile, collects = sys.getprofile(), gc.isenabled()
        gc.disable()
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(profile)
            if collects:
                gc.enable()

    def _called(self, frame: types.FrameType, event: str, arg: object) -> None:
        code, names = frame.f_code, frame.f_globals
        if event != "call" or code in self.codes or not _is_code_of_users(names.get("__name__")):
            return
        self.codes.add(code)
        if reason := why_not(code):
            self.refuse(reason)
        attributes = {*code.co_names}
        for kind in self.classes:
            for name in attributes & vars(kind).keys():
                self._note((kind, name), attributes)
        for name in _globals(code):
            if name in names:
                self._note((names, name), attributes)
            elif name in sys.modules:
                self._within(sys.modules[name], attributes)

    def _note(self, place: Place, attributes: set[str]) -> None:
        """Notes what a place holds before what runs may change it."""
        key = id(place[0]), place[1]
        if key not in self.before:
            value = read(place)
            self.before[key] = place, value
            if not isinstance(place[0], types.ModuleType) or _is_code_of_users(place[0].__name__):
                self.kept.keep(value)
            self._within(value, attributes)

    def _within(self, value: Any, attributes: set[str]) -> None:
        """Notes ``attributes`` of a module or class."""
        if isinstance(value, types.ModuleType):
            for name in attributes:
                if name in vars(value) or hasattr(type(value), name):
                    self._note((value, name), attributes)
        elif isinstance(value, type):
            for kind in [*inspect.getmro(value), *inspect.getmro(type(value))]:
                for name in attributes & vars(kind).keys() if _is_code_of_users(kind.__module__) else ():
                    self._note((kind, name), attributes)

    def restore(self) -> bool:
        """Puts back what has changed, and tells whether anything had."""
        changed = [(place, value) for place, value in self.before.values() if read(place) is not value]
        for (owner, name), value in changed:
            if isinstance(owner, dict):
                owner[name] = value
            elif not isinstance(owner, types.ModuleType) or name in vars(owner):
                setattr(owner, name, value)
        return self.kept.restore() or bool(changed)

    def changed(self) -> Callable[[], str | None]:
        """What tells later the name of a place that does not say what it says now, or None."""
        held = [(place, value) for place, value in self.before.values() if not isinstance(value, types.ModuleType)]
        said = [(*place, frozen(value)) for place, value in held]

        def first() -> str | None:
            return next((name for owner, name, value in said if frozen(read((owner, name))) != value), None)

        constant: Callable[..., Any] = torch.compiler.assume_constant_result  # Dynamo would guard all names of a file
        changed: Callable[[], str | None] = constant(first)
        return changed


def _is_code_of_users(module: str | None) -> bool:
    return is_users(module) and (module or "").split(".")[0] not in {*sys.stdlib_module_names, "numpy"}


@functools.cache
def _globals(code: types.CodeType) -> set[str]:
    """The names that a function reads in its file, and the modules that it imports."""
    kinds = "LOAD_GLOBAL", "LOAD_NAME", "IMPORT_NAME"
    return {op.argval for op in dis.get_instructions(code) if op.opname in kinds}


_MODES = {"is_autocast_enabled", "is_autocast_cpu_enabled", "get_autocast_dtype", "get_autocast_gpu_dtype",
          "is_inference_mode_enabled", "is_inference", "get_default_dtype", "get_default_device", "get_num_threads",
          "are_deterministic_algorithms_enabled", "get_float32_matmul_precision", "initial_seed", "is_compiling",
          "is_dynamo_compiling", "is_exporting", "is_tracing", "is_in_onnx_export", "is_initialized", "get_rank",
          "get_world_size", "get_device_name", "get_device_capability"}  # fmt: skip
"""Functions of PyTorch whose answer may be another one at the next call, and that a graph does not hold."""


_WHICH = "it asks which object its input is"


@functools.cache
def why_not(code: types.CodeType) -> str | None:
    """What a function asks that nothing can answer for a tensor or for the next call, or None: a mode of PyTorch, which
    object a tensor is (``a is b``, ``id``), what it has one of by ``is``."""
    names = {*code.co_names}
    if modes := names & _MODES:
        return f"it asks PyTorch for {min(modes)}"
    if "id" in _globals(code) or {"is_", "is_not"} & names:
        return _WHICH
    asks = {"type", "__class__", "dtype", "device", "layout"} & names
    operations = [op for op in dis.get_instructions(code) if op.opname != "CACHE"]
    for before, op in itertools.pairwise(operations):
        if op.opname == "IS_OP" and before.opname != "LOAD_CONST":
            if asks:
                return TYPE
            if not _is_named(operations[: operations.index(before) + 1]):
                return _WHICH
    return None


def _is_named(operations: list[dis.Instruction]) -> bool:
    """Whether what the last of these instructions leaves is a global, or an attribute of one."""
    for op in reversed(operations):
        if op.opname != "LOAD_ATTR":
            return bool(op.opname == "LOAD_GLOBAL")
    return False

"""Any module's U-Net layers on fastunet's operators, in place of its own forward pass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastunet.arguments import checked
from fastunet.interop import steps
from fastunet.interop.followed import Untraceable
from fastunet.interop.patterns import COUNTED, Found, rewrite
from fastunet.interop.settings import State, setting, states
from fastunet.interop.trace import Changed, is_layer, layer_kind, required, trace
from fastunet.touched import attached, why_not_anywhere


@dataclass(frozen=True)
class Fused:
    """One step that an operator took over: what it computes, and the layers that it stands for."""

    pattern: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Left:
    """One layer, or module whose own code stays, that runs as before, and why."""

    layer: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`fuse` did; ``print`` shows it as a table."""

    fused: tuple[Fused, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        rows = [(each.layers[0], each.pattern) for each in self.fused]
        rows += [(each.layer, f"left as it is ({each.kind}): {each.reason}") for each in self.left]
        rows = [(name or "the module", text) for name, text in rows]
        width = max(len(name) for name, _ in rows)
        layers = sum(len(each.layers) for each in self.fused)
        head = f"{len(self.fused)} fused steps stand for {layers} layers; {len(self.left)} parts are left as they are"
        return "\n".join([head, *(f"{name:<{width}}  {text}" for name, text in rows)])


@checked
def fuse(module: nn.Module, *, inplace: bool = False) -> tuple[nn.Module, Report]:
    """Runs what fastunet has operators for in any module as those operators; outputs and gradients stay.

    Followed by ``torch.fx``, the module's forward pass is searched for 3×3 convolutions with the ReLU and 2×2 max-pool
    behind them and the concatenation of two maps before them, nearest ×2 upsampling with a 2×2 convolution, 2×2
    transposed convolutions and 1×1 heads. A part that cannot be followed stays a call of itself, and its children are
    searched. Layers, parameters, ``state_dict`` and methods are those of before; only forward passes are replaced.

    Modes, hooks on layers, swapped parameters and settings count in each call. A chain whose layers are touched runs
    through them; where more than a layer was changed, the module runs as it did before. Either is said once.

    Args:
        module: in any mode; it stays as it is unless ``inplace``.
        inplace: change ``module`` itself instead of a deep copy.

    Returns:
        The module with fused steps, and the :class:`Report`.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: it is scripted, compiled or quantised, lies on several devices, has a norm of other channels than
            the convolution before it, cannot be copied, or there is nothing to fuse. It is left untouched.
    """
    _check(module)
    try:
        fused = module if inplace else copy.deepcopy(module)
    except Exception as error:
        first, *_ = str(error).splitlines()
        raise ValueError(f"the module cannot be copied ({first}): pass inplace=True") from error
    search = _Search(fused)
    search.visit(fused, "")
    report = search.report()
    if not report.fused:
        reasons = "; ".join(f"{each.layer or 'the module'}: {each.reason}" for each in report.left[:3])
        raise ValueError("there is nothing to fuse" + (f" ({reasons})" if reasons else ": no 2-D convolutions"))
    for part, program in search.programs:
        part.__dict__[_PROGRAM] = program
        kind: Any = type(part)
        part.__class__ = _fused_class(kind)
    return fused, report


def _check(module: nn.Module) -> None:
    for name, part in module.named_modules():
        where = f"{name or 'the module'} is of class {type(part).__module__}.{type(part).__name__}"
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(f"{where}: fuse the module before it is scripted")
        if type(part).__name__ == "OptimizedModule":
            raise ValueError(f"{where}: fuse the module before it is compiled")
        if ".quantized" in type(part).__module__:
            raise ValueError(f"{where}: there are no operators for quantised layers")
    tensors = [*module.named_parameters(), *module.named_buffers()]
    devices = {str(tensor.device): name for name, tensor in reversed(tensors)}
    if len(devices) > 1:
        places = " and ".join(f"{name} on {device}" for device, name in sorted(devices.items()))
        raise ValueError(f"the module lies on several devices: {places}")


class _Search:
    """Goes through a module from the outside in, and notes programs for what can be followed as a whole."""

    def __init__(self, root: nn.Module):
        self.root = root
        self.programs: list[tuple[nn.Module, Program]] = []
        self.fused: list[Fused] = []
        self.left: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.unfollowed: dict[str, str] = {}
        self.seen: set[nn.Module] = set()

    def visit(self, module: nn.Module, path: str) -> None:
        if module in self.seen:
            return
        self.seen.add(module)
        if type(module).__module__ == "fastunet.reference":
            self.reasons[path] = "fastunet.UNet is this network on the operators"
        elif hasattr(type(module), "fused_from") or type(module).__module__.startswith("fastunet."):
            self.reasons[path] = "it runs on fastunet's operators already"
        elif is_layer(module) or isinstance(module, nn.ModuleList | nn.ModuleDict):
            self.children(module, path)
        else:
            try:
                program, found, kept = _follow(module)
            except Untraceable as error:
                self.unfollow(module, path, str(error))
                return
            if found.fused:
                self.programs.append((module, program))
            within = f"{path}." if path else ""
            self.fused += [Fused(words, tuple(within + name for name in layers)) for words, layers in found.fused]
            self.left |= {within + name: reason for name, reason in found.left.items()}
            names = {part: name for name, part in module.named_modules()}
            for part, reason in kept.items():
                self.unfollow(part, within + names[part], reason)

    def unfollow(self, module: nn.Module, path: str, reason: str) -> None:
        """``module`` stays as it is; what is inside of it is searched on its own."""
        self.unfollowed[path] = reason
        self.reasons[path] = f"{path or 'the module'} is left as it is"
        self.children(module, path)

    def children(self, module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            self.visit(child, f"{path}.{name}" if path else name)

    def report(self) -> Report:
        done = {name for each in self.fused for name in each.layers}
        modules = {self.root.get_submodule(name) for name in done}
        left = []
        for name, layer in self.root.named_modules():
            if name in self.unfollowed:
                left.append(Left(name, type(layer).__name__, self.unfollowed[name]))
            elif isinstance(layer, COUNTED) and layer not in modules:
                around = [path for path in self.reasons if not path or name == path or name.startswith(f"{path}.")]
                reason = self.left.get(name) or (self.reasons[max(around, key=len)] if around else self.uncalled(name))
                left.append(Left(name, type(layer).__name__, reason))
        return Report(tuple(self.fused), tuple(left))

    def uncalled(self, name: str) -> str:
        """Why a layer is in no graph: a module around it is called as it is, for what hangs on it, or none calls it."""
        parts = name.split(".")
        for path in (".".join(parts[:count]) for count in range(len(parts))):
            if reason := attached(self.root.get_submodule(path)):
                return f"{path or 'the module'} {reason}"
        return "it is not called"


def _follow(module: nn.Module) -> tuple[Program, Found, dict[nn.Module, str]]:
    graph, kept, reads, changed = trace(module)
    found = rewrite(module, graph)
    code = graph.python_code("self")
    names: dict[str, Any] = dict(code.globals)
    exec(code.src, names)
    return Program(names["forward"], required(module), states(module, set(kept), reads), changed), found, kept


_PROGRAM = "_fastunet_program"


@dataclass(frozen=True)
class Program:
    """The forward pass of one module with fused steps. Copies of the module share it; a pickle makes it again."""

    forward: Callable[..., Any]
    arguments: tuple[str, ...]
    states: tuple[State, ...]
    changed: Changed

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor] | None:
        """The tensors of a call with just the arguments that were followed, or None."""
        given = [*args, *(kwargs[name] for name in self.arguments[len(args) :] if name in kwargs)]
        fits = len(given) == len(args) + len(kwargs) == len(self.arguments)
        return given if fits and all(isinstance(value, torch.Tensor) for value in given) else None

    def why_not(self, module: nn.Module) -> str | None:
        """What has changed in ``module`` so that its own forward pass must run, or None."""
        if reason := why_not_anywhere():
            return reason
        if name := self.changed():
            return f"{name}, which its code reads, has changed since it was fused"
        for path, kind, children, settings in self.states:
            part: Any = module
            for name in path:
                part = part._modules[name]
            d, name = part.__dict__, ".".join(path)
            if name and (attached(part) or (type(part) is not kind and layer_kind(part) is not kind)):
                return f"{name} has hooks, or another class or forward"
            modules = d["_modules"]
            if len(modules) != len(children):
                return f"{name or 'the module'} has other children"
            for (child, was), (key, now) in zip(children, modules.items()):
                if child != key or (type(now) is not was and (now is None or layer_kind(now) is not was)):
                    return f"{name + '.' if name else ''}{key} is another module"
            for key, value in settings:
                if setting(d, kind, key) != value:
                    return f"{key} of {name or 'the module'} has changed since it was fused"
        return None


class _FusedForward:
    """Before a module's own class among the bases: its forward pass, by program while that holds."""

    fused_from: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self.__dict__[_PROGRAM]
        given = None if program is None else program.bind(args, kwargs)
        if given is not None:
            reason = program.why_not(self)
            if reason is None:
                return program.forward(self, *given)
            steps.say_plain(type(self).__name__, reason)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> None:
        """Called by ``torch.jit.script``."""
        raise ValueError(f"a fused {type(self).__name__} is not for TorchScript: script what it was fused from")

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, *rest = reduced
        arguments = tuple(self.fused_from if a is type(self) else a for a in arguments)
        return (_made_fused, (function, arguments), *rest)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        if self.__dict__.get(_PROGRAM) is None:
            kind = type(self)
            self.__class__ = self.fused_from  # type: ignore[assignment]
            try:
                self.__dict__[_PROGRAM] = _follow(self)[0]  # type: ignore[arg-type]
            except Untraceable:  # as it is now; its own forward pass will run
                pass
            finally:
                self.__class__ = kind


def _made_fused(function: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = function(*arguments)
    kind: Any = type(module)
    module.__class__ = _fused_class(kind)
    return module


@functools.cache
def _fused_class(kind: Any) -> type[nn.Module]:
    @functools.wraps(kind.forward)  # whose arguments exporters and trainers ask for
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _FusedForward.forward(self, *args, **kwargs)

    members = {"fused_from": kind, "forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (_FusedForward, kind), members)

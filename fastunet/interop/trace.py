"""The graph of a module's forward pass, by ``torch.fx``, and what must hold for it to stay the whole truth.

A graph keeps one path through the code. So a module whose path may be another one at the next call is not followed:
one that branches on its images, asks for their type, looks at ``training``, keeps something on itself, makes tensors,
or changes gradient mode or autocast. It stays a call of itself, and its parents are followed all the same.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastunet.touched import attached


class Untraceable(Exception):
    """Why the graph of a module would not be the whole truth."""


def layer_kind(module: nn.Module) -> type[nn.Module]:
    """The class that says what a layer computes: below a parametrisation, and above a subclass without a forward."""
    kind = getattr(type(module), "fused_from", type(module))
    if is_parametrized(module):
        kind = kind.__bases__[0]
    while kind.__module__.split(".")[0] != "torch" and isinstance(module, _LAYERS) and _inherits(kind):
        kind = kind.__bases__[0]
    return kind


_LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm, nn.ReLU, nn.LeakyReLU)


def _inherits(kind: type) -> bool:
    """Whether a class computes what its only base does."""
    own = {"forward", "_conv_forward", "__call__", "_call_impl", "__getattr__", "__getattribute__"}
    return len(kind.__bases__) == 1 and not own & vars(kind).keys()


def is_layer(module: nn.Module) -> bool:
    """Whether a module is called as it is: of PyTorch or of this package, fused already, or with hooks."""
    kind = layer_kind(module)
    package = kind.__module__.split(".")[0]
    if package == "torch":
        return not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict) or bool(attached(module))
    return package == "fastunet" or hasattr(type(module), "fused_from") or bool(attached(module))


def inlined(root: nn.Module, kept: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of all that is no layer of the graph of ``root``, itself first; ``kept`` stay calls."""
    yield "", root
    for name, child in root.named_children():
        if child not in kept and not is_layer(child):
            for path, module in inlined(child, kept):
                yield f"{name}.{path}" if path else name, module


class _Value(torch.fx.Proxy):
    """What stands for a tensor while a forward pass is followed."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asks = sys._getframe(1).f_globals.get("__name__", "")
        if not asks.startswith(("torch.fx.", "torch.nn.parameter")):
            raise Untraceable("it asks for the type of its input")
        return _Value

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        return super().__getattr__(name)

    def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__, __isub__, __imul__, __itruediv__ = map(
        _in_place, (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    )


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, kept: set[nn.Module]):
        super().__init__()
        self.root = root
        self.kept = kept
        self.inside: list[nn.Module] = []
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.kept or is_layer(m)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Value(node, self)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(m)  # stays there if it raises
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result

    def create_arg(self, a: Any) -> Any:
        if type(a) is not dict and issubclass(type(a), dict):
            if type(a) is not OrderedDict:
                raise Untraceable(f"it makes a {type(a).__name__}")
            a = self.create_proxy("call_function", OrderedDict, (dict(a),), {})
        return super().create_arg(a)

    def create_node(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: Any = None,
        type_expr: Any = None,
    ) -> torch.fx.Node:  # fmt: skip
        if kind == "get_attr" and str(target).startswith("_tensor_constant"):
            raise Untraceable("it makes tensors of its own")
        if _modes() != self.modes:
            raise Untraceable("it changes gradient mode or autocast")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        node.meta["inside"] = self.inside[-1] if self.inside else None
        return node


def _modes() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))  # fmt: skip


Reads = dict[nn.Module, set[str]]


def trace(root: nn.Module) -> tuple[torch.fx.Graph, dict[nn.Module, str], Reads]:
    """The graph of ``root``, the modules in it that could not be followed, each with its reason, and which attributes
    were read of those that could.

    It is the graph of a call with the :func:`required` arguments, in training and evaluation alike. Modules keep their
    attributes and modes.

    Raises:
        Untraceable: ``root`` itself cannot be followed; the text says why.
    """
    kept: dict[nn.Module, str] = {}
    kind, count = type(root), len(required(root))
    if not 0 < count < len(_CALLS):
        raise Untraceable("its forward takes other arguments than one to three")
    while True:
        try:
            root.__class__ = type(kind.__name__, (kind,), {"forward": _CALLS[count](kind.forward)})
            graph, reads = _trace_once(root, set(kept))
            return graph, kept, reads
        except _At as error:
            if error.module is root:
                raise Untraceable(error.reason) from error.__cause__
            kept[error.module] = error.reason
        finally:
            root.__class__ = kind


def required(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of its forward without defaults; none where it takes any number."""
    parameters = [*inspect.signature(module.forward).parameters.values()]
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.default is p.empty)


_CALLS: tuple[Callable[..., Any], ...] = (
    lambda forward: None,
    lambda forward: lambda self, a: forward(self, a),
    lambda forward: lambda self, a, b: forward(self, a, b),
    lambda forward: lambda self, a, b, c: forward(self, a, b, c),
)
"""Forward passes of one to three arguments and no more, for fx would let an optional one stand for a tensor."""


class _At(Exception):
    def __init__(self, module: nn.Module, reason: str):
        super().__init__(reason)
        self.module, self.reason = module, reason


def _trace_once(root: nn.Module, kept: set[nn.Module]) -> tuple[torch.fx.Graph, Reads]:
    modules = [module for _, module in inlined(root, kept)]
    modes = {module: module.training for module in root.modules()}
    values = {module: dict(module.__dict__) for module in modules}
    before = {module: _copied(module.__dict__) for module in modules}
    graphs, reads = [], {module: set[str]() for module in modules}
    try:
        for training in (True, False):
            for module in modes:
                module.training = training
            tracer = _Tracer(root, kept)
            try:
                with _noted(reads):
                    graphs.append(tracer.trace(root))
            except Exception as error:
                reason = str(error) if isinstance(error, Untraceable) else _said(error)
                raise _At(tracer.inside[-1] if tracer.inside else root, reason) from error
    finally:
        changed = [m for m in modules if not _same(m.__dict__, before[m])]
        for module in changed:
            _restore(module.__dict__, values[module], before[module])
        for module, training in modes.items():
            module.training = training
    if changed:
        raise _At(changed[-1], "it keeps something on itself while it runs")
    training_nodes, nodes = ([*graph.nodes] for graph in graphs)
    for a, b in zip(training_nodes, nodes):
        if a.format_node() != b.format_node() or repr(a.args) != repr(b.args):
            raise _At(a.meta["inside"] or root, "it does something else in training")
    if len(training_nodes) != len(nodes):
        raise _At(root, "it does something else in training")
    return graphs[0], reads


@contextlib.contextmanager
def _noted(reads: Reads) -> Iterator[None]:
    """Notes which attributes are read of the modules that ``reads`` has, as ``torch.fx`` itself watches their calls."""

    def read(self: nn.Module, name: str) -> Any:
        if (names := reads.get(self)) is not None:
            names.add(name)
        return object.__getattribute__(self, name)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


def _copied(d: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() if type(value) in (list, dict, set) else value for key, value in d.items()}


def _restore(d: dict[str, Any], values: dict[str, Any], before: dict[str, Any]) -> None:
    """Gives a module its attributes back: the same objects, which others may share, and in them what was ``before``."""
    d.clear()
    d.update(values)
    for key, value in values.items():
        if type(value) is list:
            value[:] = before[key]
        elif type(value) in (dict, set):
            value.clear()
            value.update(before[key])


def _same(d: dict[str, Any], before: dict[str, Any]) -> bool:
    if d.keys() != before.keys():
        return False
    for key, value in d.items():
        if key == "training":
            continue
        was = before[key]
        if type(value) is list and type(was) is list:
            if len(value) != len(was) or any(a is not b for a, b in zip(value, was)):
                return False
        elif type(value) in (dict, set) and type(was) is type(value):
            if len(value) != len(was):
                return False
        elif value is not was:
            return False
    return True


def _said(error: Exception) -> str:
    if isinstance(error, torch.fx.proxy.TraceError):
        return "it branches on its input, or loops over it"
    return f"torch.fx cannot follow it ({type(error).__name__})"

"""The graph of a module's forward pass, by ``torch.fx``, and what must hold for it to stay the whole truth.

A graph keeps one path through the code. So a module whose path may be another one at the next call is not followed:
one that branches on its images, asks for their type, looks at ``training`` or the gradient mode, changes this mode or
autocast, keeps something on itself or in a global object, makes tensors or draws random numbers. It stays a call of
itself, and its parents are followed all the same.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from fastunet.interop.followed import Untraceable, Value, undrawn
from fastunet.interop.reads import Around
from fastunet.interop.values import Kept
from fastunet.touched import attached


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


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module, kept: set[nn.Module]):
        super().__init__()
        self.root = root
        self.kept = kept
        self.inside: list[nn.Module] = []
        self.refused: _At | None = None
        self.modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.kept or is_layer(m)

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return Value(node, self)

    def refuse(self, reason: str) -> NoReturn:
        """Raises Untraceable, and keeps it for the case that the code has a way to go on."""
        self.note(reason)
        raise Untraceable(reason)

    def note(self, reason: str) -> None:
        """Keeps it."""
        self.refused = self.refused or _At(self.inside[-1] if self.inside else self.root, reason)

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        self.refuse(_BRANCHES)

    def iter(self, obj: torch.fx.Proxy) -> Any:
        try:
            return super().iter(obj)
        except torch.fx.proxy.TraceError:
            self.refuse(_BRANCHES)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_leaf_module(m, ""):
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(m)  # stays there if it raises
        with undrawn():
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


_BRANCHES = "it branches on its input, or loops over it"


def _modes() -> tuple[Any, ...]:
    kinds = ("cpu", "cuda")
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            *((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds))  # fmt: skip


Reads = dict[nn.Module, set[str]]
Changed = Callable[[], str | None]


def trace(root: nn.Module) -> tuple[torch.fx.Graph, dict[nn.Module, str], Reads, Changed]:
    """The graph of ``root``, the modules in it that could not be followed, each with its reason, which attributes were
    read of those that could, and what tells later which name that was read around them has changed.

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
            call = _CALLS[count](kind.forward)
            root.__class__ = type(kind.__name__, (kind,), {"forward": call})
            graph, reads, changed = _trace_once(root, set(kept))
            return graph, kept, reads, changed
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


def _trace_once(root: nn.Module, kept: set[nn.Module]) -> tuple[torch.fx.Graph, Reads, Changed]:
    modules = [module for _, module in inlined(root, kept)]
    modes = {module: module.training for module in root.modules()}
    before = {module: Kept([module.__dict__]) for module in modules}
    graphs, reads, tracer = [], {module: set[str]() for module in modules}, _Tracer(root, kept)
    around = Around([*map(type, modules)], lambda reason: tracer.note(reason))
    try:
        for training, gradients in itertools.product((True, False), repeat=2):
            for module in modes:
                module.training = training
            with torch.set_grad_enabled(gradients):
                tracer = _Tracer(root, kept)
                try:
                    with _noted(reads), around.noted(), undrawn():
                        graphs.append(tracer.trace(root))
                except Exception as error:
                    reason = str(error) if isinstance(error, Untraceable) else _said(error)
                    raise tracer.refused or _At(tracer.inside[-1] if tracer.inside else root, reason) from error
            if tracer.refused:
                raise tracer.refused
    finally:
        for module, training in modes.items():
            module.training = training
        changed = [root] if around.restore() else []
        changed += [module for module, kept_of in before.items() if kept_of.restore()]
    if changed:
        raise _At(changed[-1], "it keeps something on itself, or in what others see, while it runs")
    for graph, reason in zip(graphs[1:], ["without gradients", "in training", "in training"]):
        nodes = [[*each.nodes] for each in (graphs[0], graph)]
        for a, b in zip(*nodes):
            if a.format_node() != b.format_node() or repr(a.args) != repr(b.args):
                raise _At(a.meta["inside"] or root, f"it does something else {reason}")
        if len(nodes[0]) != len(nodes[1]):
            raise _At(root, f"it does something else {reason}")
    return graphs[0], reads, around.changed()


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


def _said(error: Exception) -> str:
    if isinstance(error, torch.fx.proxy.TraceError):
        return _BRANCHES
    return f"torch.fx cannot follow it ({type(error).__name__})"

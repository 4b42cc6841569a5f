"""What stands for tensors while ``torch.fx`` follows a forward pass, and what such a pass must not ask or do."""

from __future__ import annotations

import contextlib
import operator
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Untraceable(Exception):
    """Why the graph of a module would not be the whole truth."""


def _asked_by(*packages: str) -> bool:
    """Whether what is asked of a value is asked by code of one of ``packages``."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(packages)


TYPE = "it asks for the type of its input"


class _Kind(type):
    """The class of :class:`Value`, which does not tell code that compares it that it is another one."""

    def __eq__(cls, other: object) -> bool:
        if not _asked_by("torch"):
            raise Untraceable(TYPE)
        return cls is other

    def __hash__(cls) -> int:
        return type.__hash__(cls)


def _asked(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that tells what no value knows before the call: PyTorch's own for PyTorch, and not for other code."""

    def ask(self: Value, *args: Any) -> Any:
        if not _asked_by("torch"):
            self.tracer.refuse("it makes numbers, text or keys of its input")
        return method(self, *args)

    return ask


_HISTORY = {"grad_fn", "_grad_fn", "grad", "_grad", "_base", "_version", "_is_view", "_backward_hooks", "data_ptr"}
"""What a tensor has of its past, and an operator's result may have another one of."""


class Value(torch.fx.Proxy, metaclass=_Kind):
    """What stands for a tensor while a forward pass is followed."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not _asked_by("torch.fx.", "torch.nn.parameter"):
            self.tracer.refuse(TYPE)
        return Value

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        if name in _HISTORY:
            self.tracer.refuse("it asks how its input was computed")
        return _Attribute(self, name)

    __hash__, __repr__, __int__, __float__, __array__ = map(
        _asked, (object.__hash__, torch.fx.Proxy.__repr__, *[lambda self, *args: NotImplemented] * 3)
    )

    def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})

    __iadd__, __isub__, __imul__, __itruediv__ = map(
        _in_place, (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    )


class _Attribute(Value, torch.fx.proxy.Attribute):
    """What stands for an attribute of a tensor, such as its shape."""


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Raises Untraceable if random numbers are drawn, and puts the generators back."""
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), torch.get_rng_state(), numpy and numpy.random.get_state()
    try:
        yield
    finally:
        name, key, *rest = numpy.random.get_state() if numpy else ("", b"")
        drawn = numpy and (name != states[2][0] or (key != states[2][1]).any() or rest != [*states[2][2:]])
        if drawn or random.getstate() != states[0] or not torch.equal(torch.get_rng_state(), states[1]):
            drawn = True
            random.setstate(states[0])
            torch.set_rng_state(states[1])
            if numpy:
                numpy.random.set_state(states[2])
    if drawn:
        raise Untraceable("it draws random numbers")

"""Which implementation an operator runs on, and how operators are registered with ``torch.library``.

Every operator ``fastunet::<name>`` is defined once, with a last argument ``backend`` that is already resolved: "torch",
"triton", or "auto" for kernels that may be given up (:func:`select_backend`). It carries its own derivative;
``torch.compile`` sees opaque operators.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastunet import autograd
from fastunet.errors import is_out_of_memory

BACKENDS = ("auto", "triton", "torch")
_LIBRARY = torch.library.Library("fastunet", "DEF")
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
_warned: set[str] = set()
GIVEN_UP: dict[str, str] = {}
"""Operators whose kernel failed in this process, and how."""
_LONGEST_REASON = 400


@dataclass(frozen=True)
class Operator:
    """The forms of one operator, all of the same arguments; ``launcher()`` imports that of the Triton kernels."""

    torch_impl: Callable[..., Any]
    fake: Callable[..., Any]
    launcher: Callable[[], Callable[..., Any]]


OPERATORS: dict[str, Operator] = {}
"""Every operator that has been defined, by name; for checks and measurements that go through all of them."""


def define(
    schema: str,
    *,
    torch_impl: Callable[..., Any],
    triton_impl: str,
    fake: Callable[..., Any],
    setup: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers ``fastunet::<schema>``, whose schema ends in ``str backend``.

    ``torch_impl`` and ``fake`` take the arguments without ``backend``; ``triton_impl`` names a launcher of the same
    signature as "module:function" below ``fastunet.kernels``, imported at its first call. ``setup`` and ``backward``
    are the ``setup_context`` and ``backward`` of a ``torch.autograd.Function`` with all arguments; without them the
    derivative is that of ``torch_impl``.
    """
    name = schema.partition("(")[0]
    module, _, function = triton_impl.partition(":")

    @functools.cache
    def load() -> Any:
        launcher = getattr(importlib.import_module(f"fastunet.kernels.{module}"), function)
        searching = importlib.import_module("fastunet.inspection.tuning").tunable(launcher)
        if searching is not launcher:
            return searching
        return importlib.import_module("fastunet.kernels._plan").planned(launcher)

    def launched(*operands: Any) -> Any:
        device = next(a.device for a in operands if isinstance(a, torch.Tensor))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return load()(*operands)
        with torch.cuda.device(device):
            return load()(*operands)

    def implementation(*args: Any) -> Any:
        *operands, backend = args
        if backend == "torch" or (backend == "auto" and name in GIVEN_UP):
            return torch_impl(*operands)
        try:
            return launched(*operands)
        except Exception as error:  # whatever compilers and drivers raise
            # a call that is refused, or too large for the memory, says nothing about the next one
            if backend != "auto" or isinstance(error, ValueError) or is_out_of_memory(error):
                raise
            _give_up(name, error)
        return torch_impl(*operands)

    OPERATORS[name] = Operator(torch_impl, fake, load)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunet::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    if setup is None or backward is None:
        setup, backward = autograd.through(torch_impl)
    operator = getattr(torch.ops.fastunet, name).default
    _LIBRARY.impl(name, autograd.kernel(operator, setup, backward), "Autograd")


def _give_up(operator: str, error: Exception) -> None:
    """From now on ``operator`` runs the PyTorch way where the backend is "auto"; says so, and why, once."""
    reason = GIVEN_UP[operator] = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
    warnings.warn(f"fastunet uses PyTorch for {operator} from now on, whose kernel failed here: {reason}", stacklevel=2)


def select_backend(requested: str | None, operator: str, x: torch.Tensor, unsupported: str | None = None) -> str:
    """Resolves ``requested`` ("auto", "triton", "torch", or None for "auto") for tensor ``x``.

    "auto" takes ``FASTUNET_BACKEND`` if set. Else it stays "auto" on a CUDA device where Triton can run, and on the
    meta device, which tells what such a device would run: then kernels are used, and an operator whose kernel cannot be
    compiled or launched runs the PyTorch way from then on, with one warning. Elsewhere it is PyTorch, with one warning
    that gives the reason. An explicit choice is never overridden.
    ``unsupported`` is the operator's own reason why its kernels cannot take this call.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run; the message gives the reason.
    """
    choice = requested or "auto"
    if choice == "auto":
        choice = os.environ.get("FASTUNET_BACKEND", "auto")
    if choice not in BACKENDS:
        raise ValueError(f"backend is {choice!r}; expected one of {', '.join(BACKENDS)}")
    if choice == "torch" or (choice == "auto" and x.device.type not in ("cuda", "meta")):
        return "torch"
    reason = why_not_triton(x.device, x.dtype) or unsupported
    if reason is None:
        return choice
    if choice == "triton":
        raise ValueError(f"{operator}: backend 'triton' cannot run here: {reason}")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fastunet uses PyTorch instead of its Triton kernels: {reason}", stacklevel=4)
    return "torch"


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Triton kernels cannot serve ``dtype`` on ``device``, or None if they can."""
    if device.type == "meta":
        return None  # which has shapes alone: nothing is launched
    if not triton_installed():
        return "Triton is not installed"
    if dtype not in _TRITON_DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        if triton_interpreted():
            return None
        return "the tensor is on the CPU (TRITON_INTERPRET=1 runs the kernels there, slowly)"
    if device.type != "cuda":
        return f"device type {device.type!r} is not supported"
    if torch.version.hip is not None:
        return "AMD devices are not proven yet"
    return _why_not_cuda(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _why_not_cuda(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, below 8.0"
    return None


def triton_installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return _TRITON_INSTALLED


def triton_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` asks for the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def settings() -> tuple[Any, ...]:
    """What a captured pass cannot follow when it changes: the backend that "auto" means, and flags of PyTorch."""
    cudnn = torch.backends.cudnn
    precision = getattr(getattr(cudnn, "conv", cudnn), "fp32_precision", None)  # newer PyTorch; else allow_tf32
    tf32 = cudnn.allow_tf32 if precision is None else precision
    return os.environ.get("FASTUNET_BACKEND"), tf32, cudnn.enabled, cudnn.deterministic


def autocasts(kind: str) -> bool:
    """Whether autocast is on for devices of a kind; some, such as "meta", do not know it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def autocast_operands(x: torch.Tensor, *others: torch.Tensor | None) -> list[Any]:
    """The tensors in the autocast dtype if autocast is on for ``x``'s device, else as they are, like ``nn.Conv2d``."""
    operands: list[Any] = [x, *others]
    kind = x.device.type
    if not autocasts(kind):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    at = [i for i, t in enumerate(operands) if t is not None and t.dtype not in (dtype, torch.float64)]
    for i, cast in zip(at, autograd.casts([operands[i] for i in at], dtype)):
        operands[i] = cast
    return operands

"""What a node of a graph computes, as function or method, or as the layer that it calls (``layer``, else None)."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from fastunet.interop import steps
from fastunet.interop.trace import layer_kind

_RELUS: tuple[Any, ...] = F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"
_LEAKY: tuple[Any, ...] = F.leaky_relu, F.leaky_relu_
RESHAPES = {"view": "reshape", "view_as": "reshape_as", "reshape": "reshape", "reshape_as": "reshape_as",
             "flatten": "flatten"}  # fmt: skip
"""Methods that give a view where memory allows, by what gives a copy where it does not."""
VIEWS = {"getitem", "permute", "transpose", "movedim", "squeeze", "unsqueeze", "expand", "narrow", "select", "chunk",
          "split", "unbind", "unflatten", "detach", "T", "mT", "swapaxes"}  # fmt: skip


def name_of(node: Node) -> str:
    """The name of the method or function that a node calls, or what it reads."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def pads_after(node: Node, layer: nn.Module | None) -> bool:
    """Whether a node puts one row and one column of zeros behind the last, as a 2×2 "same" convolution needs."""
    if layer is not None:
        return steps.fits_padding(layer) is None
    values = node.kwargs.get("value"), node.kwargs.get("mode", "constant")
    return (node.target is F.pad and len(node.args) == 2 and node.args[1] in ([0, 1, 0, 1], (0, 1, 0, 1))
            and values in ((None, "constant"), (0, "constant")))  # fmt: skip


def doubles(node: Node, layer: nn.Module | None) -> bool:
    """Whether a node is a nearest ×2 upsampling."""
    if layer is not None:
        return steps.fits_doubling(layer) is None
    options = node.kwargs
    return (node.target is F.interpolate and len(node.args) == 1 and options.get("size") is None
            and options.get("scale_factor") in (2, (2, 2), [2, 2]) and options.get("mode", "nearest") == "nearest")


def writes(node: Node, layer: nn.Module | None) -> bool:
    """Whether a node may write in place."""
    if layer is not None:
        own = not layer_kind(layer).__module__.startswith("torch.nn.")
        return bool(own or getattr(layer, "inplace", False) or steps.touched(layer))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    in_place = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    return bool(node.kwargs.get("inplace") or node.target in in_place or name.endswith("_"))


def between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes after ``first`` and before ``last``."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def alone(node: Node) -> bool:
    """Whether a node reads one result only, as its first argument."""
    return len(node.all_input_nodes) == 1 and bool(node.args) and isinstance(node.args[0], Node)


def slope_of(node: Node) -> float | None:
    """The slope for negative values if a node is ReLU or LeakyReLU as a function, else None."""
    if node.target in _RELUS:
        return 0.0
    if node.target in _LEAKY:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return float(slope) if isinstance(slope, float | int) else None
    return None

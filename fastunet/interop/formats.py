"""The memory formats of a module, kept where its layers have become operators, which leave NHWC memory."""

from __future__ import annotations

import types

import torch
from torch import nn
from torch.fx import Graph, Node

from fastunet.interop import steps
from fastunet.interop.followed import Untraceable
from fastunet.interop.nodes import RESHAPES, VIEWS, name_of, writes
from fastunet.interop.trace import layer_kind

_ORDERED = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "rrelu",
          "bernoulli", "bernoulli_", "rand_like", "randn_like", "randint_like", "normal_", "uniform_", "log_normal_",
          "exponential_", "as_strided", "as_strided_", "stride", "is_contiguous", "storage_offset", "resize_",
          "untyped_storage", "numpy"}  # fmt: skip
"""What draws a random number for each element in the order of memory, or tells of this order."""


def keep_formats(root: nn.Module, graph: Graph, called: list[str]) -> None:
    """What comes from operators in NHWC memory reaches other code in the memory that layers would leave.

    Args:
        called: the paths of all layers that the module calls.

    Raises:
        Untraceable: something is written into a view that memory of another order does not have.
    """
    nodes = list(graph.nodes)
    layers = {path: root.get_submodule(path) for path in called}
    convs = {path: layer for path, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)}
    telling = [path for path, conv in convs.items() if conv.in_channels > conv.groups and "weight" in conv._parameters]
    first = next(node for node in nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        witness = graph.get_attr(next(iter(telling or convs)))
        plain = graph.call_function(steps.is_plain, (nodes[0], witness))
    for node in nodes:
        layer = layers.get(str(node.target)) if node.op == "call_module" else None
        if writes(node, layer) and node.args and _is_reshaped(node.args[0]):
            raise Untraceable("it writes into a view")
        if node.op == "call_method" and not any(isinstance(a, torch.dtype) for a in node.args):
            node.target = RESHAPES.get(str(node.target), node.target)
        if node.target is steps.convolution:
            node.kwargs = {**node.kwargs, "plain": plain}
        if node.op == "output" or _minds(node, layer):
            with graph.inserting_before(node):
                convert = lambda a: graph.call_function(steps.as_layers_leave_it, (a, plain))  # noqa: E731
                node.args = torch.fx.map_arg(node.args, convert)
                node.kwargs = torch.fx.map_arg(node.kwargs, convert)


def _is_reshaped(node: object) -> bool:
    """Whether a result is, or is a view of, another one in another shape."""
    while isinstance(node, Node) and node.args and name_of(node) in VIEWS:
        node = node.args[0]
    return isinstance(node, Node) and name_of(node) in RESHAPES


def _minds(node: Node, layer: nn.Module | None) -> bool:
    """Whether what a node gives may hang on the memory format of what it reads."""
    if layer is not None:
        module = layer_kind(layer).__module__
        return not module.startswith("torch.nn.") or module.endswith(".dropout") or isinstance(layer, nn.RReLU)
    own = isinstance(node.target, types.FunctionType | type)
    module = getattr(node.target, "__module__", None) or ""
    return name_of(node) in _ORDERED or (own and not module.startswith(("torch.", steps.__name__)))

"""Finds in the graph of a forward pass what operators compute in one go, and writes their calls in its place."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from fastunet.chains import NORMS, why_not_norm
from fastunet.interop import steps
from fastunet.interop.formats import keep_formats
from fastunet.interop.nodes import (
    RESHAPES,
    VIEWS,
    alone,
    between,
    doubles,
    name_of,
    pads_after,
    slope_of,
    writes,
)
from fastunet.interop.trace import layer_kind

_CATS = torch.cat, torch.concat, torch.concatenate
_NOTHING = *steps.DROPOUTS, nn.Identity
COUNTED = nn.Conv2d, nn.ConvTranspose2d, *NORMS, nn.MaxPool2d, nn.Upsample
"""The layers that a report names."""


@dataclass
class Found:
    """What became of the layers of one graph, by their paths: (pattern, layers) of each step, and reasons."""

    fused: list[tuple[str, list[str]]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


@dataclass
class _Chain:
    """A convolution and what follows it: the nodes, those that are layers, and an activation that is a function."""

    nodes: list[Node]
    layers: list[str]
    words: list[str]
    slope: float | None = None
    pool: Node | None = None


def rewrite(root: nn.Module, graph: Graph) -> Found:
    """Replaces in ``graph`` all that an operator takes over."""
    return _Rewriter(root, graph).run()


class _Rewriter:
    def __init__(self, root: nn.Module, graph: Graph):
        self.root, self.graph, self.found = root, graph, Found()
        self.called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        self.calls = Counter(map(root.get_submodule, self.called))

    def run(self) -> Found:
        for node in list(self.graph.nodes):
            layer = self.layer(node)
            kind = None if layer is None else layer_kind(layer)
            if kind is nn.Conv2d and isinstance(layer, nn.Conv2d):
                self.convolution(node, layer)
            elif kind is nn.ConvTranspose2d and isinstance(layer, nn.ConvTranspose2d):
                reason = steps.fits_transpose(layer)
                self.single(node, layer, "transposed conv 2×2", reason, steps.transposed_convolution)
        for node in list(self.graph.nodes):
            if node.op == "call_module" and isinstance(layer := self.layer(node), COUNTED):
                self.found.left.setdefault(str(node.target), _why_alone(layer))
        if self.found.fused:
            keep_formats(self.root, self.graph, self.called)
            self.graph.lint()
        return self.found

    def layer(self, node: Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def convolution(self, node: Node, conv: nn.Conv2d) -> None:
        if not alone(node):
            self.found.left[str(node.target)] = "it is called with other arguments than one map"
            return None
        if conv.kernel_size == (1, 1):
            return self.single(node, conv, "conv 1×1", steps.fits_head(conv), steps.head)
        up = self.upsampling(node, conv)
        if up is not None:
            return self.upsampled(node, conv, up)
        reason = steps.fits_conv3(conv) or steps.touched(conv)
        if reason is not None:
            self.found.left[str(node.target)] = reason
            return None
        chain = self.chain(node, conv)
        cat = None if steps.fits_conv3(conv, skip=True) else self.concatenation(node)
        if len(chain.nodes) == 1 and cat is None:
            self.found.left[str(node.target)] = "nothing follows it that an operator takes with it"
            return None
        skip, x = (None, node.args[0]) if cat is None else cat.args[0]  # type: ignore[misc]
        with self.graph.inserting_before(node):
            layers = [self.graph.get_attr(path) for path in chain.layers]
            options: dict[str, Any] = {} if chain.slope is None else {"slope": chain.slope}
            if chain.pool is not None and chain.pool.op != "call_module":
                options["pool"] = True
            fused = self.graph.call_function(steps.convolution, (x, skip, layers, str(node.target)), options)
            y = fused
            if chain.pool is not None:
                y, pooled = (self.graph.call_function(operator.getitem, (fused, index)) for index in (0, 1))
        if chain.pool is not None:
            chain.pool.replace_all_uses_with(pooled)
            self.graph.erase_node(chain.pool)
        self.replace(chain.nodes, y)
        if cat is not None:
            self.graph.erase_node(cat)
        self.found.fused.append((" + ".join((["cat"] if cat is not None else []) + chain.words), chain.layers))
        return None

    def chain(self, node: Node, conv: nn.Conv2d, norms: bool = True) -> _Chain:
        """What follows a convolution and can be computed with it."""
        chain = _Chain([node], [str(node.target)], ["conv 3×3"])
        nodes, layers, last, norm = [node], [str(node.target)], node, False
        while len(last.users) == 1:
            (last,) = last.users
            layer, slope = self.layer(last), slope_of(last)
            if not alone(last) or (layer is not None and steps.touched(layer)):
                break
            nodes.append(last)
            layers += [str(last.target)] if layer is not None else []
            if isinstance(layer, _NOTHING):
                continue
            kind = None if layer is None else layer_kind(layer)
            behind = norms and not norm and kind in NORMS
            if behind and isinstance(layer, NORMS) and self.takes(layer, conv, node, last):
                norm = True
                chain = _Chain([*nodes], [*layers], [*chain.words, _words(layer_kind(layer))])
                continue
            if kind in (nn.ReLU, nn.LeakyReLU) or slope is not None:
                if (kind is nn.LeakyReLU or slope) and self.written(last):
                    break  # the operator keeps its result, PyTorch the result of the convolution
                word = "ReLU" if kind is nn.ReLU or slope == 0 else "LeakyReLU"
                chain = _Chain(nodes, layers, [*chain.words, word], slope)
            break
        if len(chain.nodes) > 1 and not self.written(chain.nodes[-1]):
            self.pooling(chain)
        return chain

    def written(self, node: Node) -> bool:
        """Whether a function, or a layer of PyTorch, writes into a result or a view of it."""
        for user in node.users:
            layer = self.layer(user)
            known = layer is None or layer_kind(layer).__module__.startswith("torch.nn.")
            first = known and user.args and user.args[0] is node
            view = name_of(user) in VIEWS | RESHAPES.keys()
            if first and (writes(user, layer) or (view and self.written(user))):
                return True
        return False

    def takes(self, norm: nn.Module, conv: nn.Conv2d, before: Node, node: Node) -> bool:
        """Whether the operator takes a norm; raises ValueError for one that cannot stand there."""
        reason = why_not_norm(norm, conv.out_channels)
        if reason is not None and "channels" in reason and not isinstance(norm, nn.InstanceNorm2d):
            raise ValueError(f"{node.target} is in a wrong place behind {before.target}: {reason}")
        if self.calls[norm] > 1:
            reason = "it is called more than once"
        if reason is not None:
            self.found.left[str(node.target)] = reason
        return reason is None

    def pooling(self, chain: _Chain) -> None:
        for user in chain.nodes[-1].users:
            layer = self.layer(user)
            if isinstance(layer, nn.MaxPool2d) and layer_kind(layer) is nn.MaxPool2d:
                fits = not steps.fits_pool(layer) and not steps.touched(layer)
            else:
                args: Any = user.args[1:]
                options: Any = user.kwargs
                fits = user.target is F.max_pool2d and not steps.pool_arguments(*args, **options)
            if fits:
                chain.pool, chain.words = user, [*chain.words, "max-pool"]
                chain.layers = [*chain.layers, str(user.target)] if layer is not None else chain.layers
                return

    def concatenation(self, node: Node) -> Node | None:
        """The concatenation of two maps that is read by this convolution only, or None."""
        cat = node.args[0]
        if not isinstance(cat, Node) or cat.target not in _CATS or len(cat.users) != 1:
            return None
        parts = cat.args[0] if cat.args else None
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", cat.kwargs.get("axis", 0))
        if dim not in (1, -3) or not isinstance(parts, list | tuple) or len(parts) != 2:
            return None
        return None if self.written_between(cat, node) else cat

    def upsampling(self, node: Node, conv: nn.Conv2d) -> list[Node] | None:
        """A nearest ×2 upsampling, and its padding, that are read by this 2×2 convolution only, or None."""
        found = [node.args[0]]
        if steps.fits_up(conv) or conv.padding not in ("same", "valid", (0, 0)):
            return None
        if conv.padding != "same":
            pad = found[0]
            if not isinstance(pad, Node) or len(pad.users) != 1 or not pads_after(pad, self.layer(pad)):
                return None
            found.append(pad.args[0])
        up = found[-1]
        if not isinstance(up, Node) or len(up.users) != 1 or not doubles(up, self.layer(up)):
            return None
        return None if self.written_between(up, node) else found  # type: ignore[return-value]

    def upsampled(self, node: Node, conv: nn.Conv2d, before: list[Node]) -> None:
        chain = self.chain(node, conv, norms=False)
        if len(chain.nodes) == 1 or chain.pool is not None:
            self.found.left[str(node.target)] = "no activation follows it that the operator takes with it"
            return
        x = before[-1].args[0]
        with self.graph.inserting_before(node):
            layers = [self.graph.get_attr(path) for path in chain.layers]
            options: dict[str, Any] = {} if chain.slope is None else {"slope": chain.slope}
            called = [self.graph.get_attr(str(n.target)) if n.op == "call_module" else None for n in reversed(before)]
            y = self.graph.call_function(steps.upsampled_convolution, (x, called, layers, str(node.target)), options)
        self.replace(chain.nodes, y)
        for each in before:
            self.graph.erase_node(each)
        names = [str(each.target) for each in before if each.op == "call_module"]
        self.found.fused.append((f"upsampling ×2 + conv 2×2 + {chain.words[-1]}", names + chain.layers))

    def single(self, node: Node, conv: nn.Module, words: str, reason: str | None, step: Any) -> None:
        reason = reason or steps.touched(conv)
        if reason is not None or not alone(node):
            self.found.left[str(node.target)] = reason or "it is called with other arguments than one map"
            return
        with self.graph.inserting_before(node):
            layer = self.graph.get_attr(str(node.target))
            y = self.graph.call_function(step, (node.args[0], layer, str(node.target)))
        self.replace([node], y)
        self.found.fused.append((words, [str(node.target)]))

    def replace(self, nodes: list[Node], y: Node) -> None:
        nodes[-1].replace_all_uses_with(y)
        for node in reversed(nodes):
            self.graph.erase_node(node)

    def written_between(self, first: Node, last: Node) -> bool:
        """Whether something may write in place between two nodes, and so into what the first of them reads."""
        return any(writes(node, self.layer(node)) for node in between(first, last))


def _why_alone(layer: nn.Module) -> str:
    if isinstance(layer, NORMS):
        return "it does not follow a 3×3 convolution that an operator takes it with"
    if isinstance(layer, nn.MaxPool2d):
        return "it does not follow a fused convolution"
    return "no operator takes it with what follows"


def _words(kind: type[nn.Module]) -> str:
    return {nn.InstanceNorm2d: "instance norm", nn.GroupNorm: "group norm"}.get(kind, "batch norm")

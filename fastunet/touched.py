"""What tells that a module, or all of the process, does more when called than its parameters say.

A fused block reads the parameters of its layers and calls none of them. So it may run only while they are exactly what
its constructor made and nothing hangs on them: no hook, no other ``forward``, no other class, no tensor that computes
in its own way. Whatever this cannot see from outside (parametrisations, swapped or shared parameters) works through the
reading itself.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_SETTINGS = (
    ("kernel_size", "stride", "padding", "dilation", "output_padding", "groups", "padding_mode"),
    ("num_features", "num_channels", "num_groups", "eps", "momentum", "affine", "track_running_stats"),
)
"""Attributes of convolutions, and those that norms have some of: what they say besides their parameters."""


class Made(NamedTuple):
    """What :func:`made` noted of a layer when it was constructed: class, number of attributes, classes of the
    parameters, and ``values`` of the attributes ``names``, hooks (none) and settings, which ``read`` takes quickly."""

    kind: type
    attributes: int
    weight: type
    bias: type
    names: tuple[str, ...]
    read: Callable[[dict[str, Any]], tuple[Any, ...]]
    values: tuple[Any, ...]


def _shared_code() -> tuple[Any, ...]:
    """What PyTorch runs for every layer, and people replace to see or change all of them."""
    return (nn.Conv2d._conv_forward, nn.Conv2d.forward, nn.ConvTranspose2d.forward, nn.Dropout.forward,
            nn.BatchNorm2d.forward, nn.InstanceNorm2d.forward, nn.GroupNorm.forward, nn.ReLU.forward,
            nn.LeakyReLU.forward, nn.MaxPool2d.forward, nn.Upsample.forward, F.conv2d, F.conv_transpose2d, F.relu,
            F.leaky_relu, F.max_pool2d, F.interpolate, F.pad, F.batch_norm, F.instance_norm, F.group_norm, torch.relu,
            torch.cat, torch.batch_norm, torch.instance_norm, torch.group_norm)  # fmt: skip


_SHARED_CODE, _CALL = _shared_code(), nn.Module.__call__


def why_not_anywhere() -> str | None:
    """What hangs on every module of the process, or None."""
    if _has_any_global_hook():
        return "global module hooks are registered"
    if _shared_code() != _SHARED_CODE:
        return "code that torch.nn runs for every layer has been replaced"
    if torch.compiler.is_compiling():  # export replaces calls and has a mode, both of its own
        return None
    if nn.Module.__call__ is not _CALL:
        return "nn.Module.__call__ has been replaced"
    if not torch._C._len_torch_function_stack():
        return None
    others = any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    return "a TorchFunctionMode is active" if others else None


def attached(module: nn.Module, backward: bool = True) -> str | None:
    """Why a call of ``module`` is more than the forward of its class, or None; ``backward``: in its gradients, too."""
    d = module.__dict__
    if "forward" in d or "_conv_forward" in d or "_call_impl" in d:
        return "has a forward of its own"
    hooks = d["_forward_hooks"] or d["_forward_pre_hooks"]
    return "has hooks" if hooks or (backward and (d["_backward_hooks"] or d["_backward_pre_hooks"])) else None


def why_touched(module: nn.Module, kind: type) -> str | None:
    """Why calling ``module`` is more than running ``kind.forward``, or None; parametrised layers count as untouched."""
    if type(module) is not kind and not (type(module).__bases__ == (kind,) and is_parametrized(module)):
        return f"is of class {type(module).__name__}, not {kind.__name__}"
    if "upsampled" in module.__dict__ or "logits_of_padded" in module.__dict__:
        return "has a forward of its own"
    return attached(module)


def made(layer: nn.Module) -> Made:
    """What :func:`why_not_layer` compares a layer with."""
    d = layer.__dict__
    names = (*_HOOKS, *(name for name in _SETTINGS["kernel_size" not in d] if name in d))
    read = operator.itemgetter(*names)
    return Made(type(layer), len(d), type(layer.weight), type(layer.bias), names, read, copy.deepcopy(read(d)))


def as_made(layer: nn.Module | None, layer_made: Made) -> bool:
    """Whether ``layer`` is just what its constructor made. The quick answer, for each forward pass asks every layer."""
    kind, size, weight, bias, _, read, values = layer_made
    if type(layer) is not kind:
        return False
    d = layer.__dict__
    if len(d) != size:
        return False
    tensors = d["_parameters"]
    return type(tensors.get("weight")) is weight and type(tensors.get("bias")) is bias and read(d) == values


def why_not_layer(layer: nn.Module | None, layer_made: Made) -> str | None:
    """Why the parameters of ``layer`` do not say all that calling it would do, or None."""
    if not torch.compiler.is_compiling() and as_made(layer, layer_made):  # Dynamo knows no itemgetter
        return None
    if layer is None:
        return f"is None, not a {layer_made.kind.__name__}"
    reason = why_touched(layer, layer_made.kind)
    if reason is not None:
        return reason
    if tuple(layer.__dict__.get(name) for name in layer_made.names) != layer_made.values:
        return "has other settings than it was made with, such as kernel, stride, padding, groups or eps"
    for name in ("weight", "bias"):
        tensor = layer._parameters.get(name)
        if type(tensor) is nn.Parameter or is_parametrized(layer, name):
            continue
        if tensor is None:  # replicas of DataParallel hold their tensors as attributes
            tensor = getattr(layer, name, None)
        if tensor is None:
            if name == "bias" and layer_made.bias is type(None):
                continue
            return f"has no {name}"
        # the tensors by which torch.export traces are as good as plain ones
        if type(tensor) is not torch.Tensor and not type(tensor).__module__.startswith("torch._subclasses"):
            return f"has a {name} of class {type(tensor).__name__}"
    return None


_PARAMETERS = operator.attrgetter("_parameters")


class Snapshot:
    """A network as it was when all its parts were found to run fused: :meth:`holds` says whether it still is.

    To ask each part in each forward pass takes longer than some launches of kernels. This compares all of them in few
    passes that run in C, where nearly everything is the very same object. Kept in the network's ``__dict__``; copies
    and pickles have None instead, and replicas other ``_modules``.
    """

    def __init__(self, network: Any, blocks: list[Any]):
        """Raises TypeError if a tensor is an attribute, which would be compared by its values."""
        made_as = {block._modules[name]: layer_made for block in blocks for name, layer_made in block._made.items()}
        made_as[network.head] = network._head_made
        self.layers = [*made_as]
        parts = [*self.layers, network.dropout, *blocks]
        if any(issubclass(kind, torch.Tensor) for kind in {type(v) for part in parts for v in vars(part).values()}):
            raise TypeError("a tensor is an attribute")
        self.hooks = [vars(part)[name] for part in parts for name in _HOOKS]
        self.parameters = [layer._parameters for layer in self.layers]
        self.typed = [parts, *(parameters.values() for parameters in self.parameters)]
        self.types = [*map(type, chain.from_iterable(self.typed))]
        # of layers that have no other attributes than they were made with, those that matter; of other parts all
        alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        lists = network.encoders, network.decoders
        self.dicts = [*(module._modules for module in (network, *lists, *blocks)), *map(vars, lists)]
        for part in parts:
            as_many = part in made_as and len(vars(part)) == made_as[part].attributes
            (alike.setdefault(made_as[part].names, []) if as_many else self.dicts).append(vars(part))
        self.saved = [*map(dict, self.dicts)]
        reads = [(operator.itemgetter(*names), dicts) for names, dicts in alike.items()]
        self.alike = [(read, dicts, [*map(read, dicts)], [*map(len, dicts)]) for read, dicts in reads]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def holds(self, network: nn.Module) -> bool:
        """Whether nothing has changed; also False where that is unclear."""
        try:
            for read, dicts, values, sizes in self.alike:
                if [*map(read, dicts)] != values or [*map(len, dicts)] != sizes:
                    return False
            return (
                network._modules is self.dicts[0]
                and self.dicts == self.saved
                and [*map(_PARAMETERS, self.layers)] == self.parameters
                and [*map(type, chain.from_iterable(self.typed))] == self.types
                and not any(self.hooks)
            )
        except Exception:  # an attribute is gone, or does not compare, as arrays and tensors
            return False


def parameters(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias, each read once: a parametrisation runs when it is read."""
    return layer.weight, layer.bias

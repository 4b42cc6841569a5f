"""The U-Net's blocks as modules that run fused while their layers are untouched.

Otherwise a block runs through its layers, as the plain build does, and says so once.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fastunet import reference
from fastunet.architecture import Architecture
from fastunet.chains import layers_are_faster, with_norm
from fastunet.dispatch import autocast_operands, autocasts, select_backend
from fastunet.functional.blocks import conv_block, decoder_block, decoder_block_head, encoder_block
from fastunet.functional.conv_relu import conv_relu, conv_relu_pool
from fastunet.functional.conv_transpose import conv_transpose2d
from fastunet.functional.segmentation_head import finish, head_of_network, segmentation_head
from fastunet.functional.upsample_conv import upsample_conv_relu
from fastunet.touched import as_made, made, parameters, why_not_anywhere, why_not_layer

Pair = tuple[torch.Tensor, torch.Tensor | None]
"""Weight and bias of a convolution."""
Operands = dict[str, Pair]
"""Those of each convolution of a block, by its name, in the order of use."""


def cast_together(
    x: torch.Tensor, read: Callable[[], dict[str, Operands]]
) -> tuple[torch.Tensor, dict[str, Operands]]:
    """Under autocast an image and the operands of all parts, cast in one launch of a GPU, as are their gradients.

    No operands elsewhere, and among several processes, where each part is left to cast its own: its gradients can so
    be exchanged while others are computed.
    """
    if not autocasts(x.device.type) or (dist.is_available() and dist.is_initialized()):
        return x, {}
    parts = read()
    pairs = [pair for part in parts.values() for pair in part.values()]
    x, *cast = autocast_operands(x, *itertools.chain(*pairs))
    found = zip(cast[::2], cast[1::2])
    return x, {name: dict(zip(part, found)) for name, part in parts.items()}


def warn_plain(name: str, reason: str) -> None:
    """Says that the part ``name`` of a network runs through its modules."""
    if not torch.compiler.is_compiling():
        warnings.warn(f"{name} of fastunet.UNet runs through its modules, not fused: {reason}", stacklevel=2)


_UPSAMPLED = reference.DecoderBlock.upsampled


class _Block(nn.Module):
    """What both kinds of fused block share; comes before a block of the plain build among the bases.

    Attributes:
        name: what warnings call the block.
        backend: "auto", "triton" or "torch".
        sync_norms: batch norms take the statistics of all processes in training.
    """

    style: Architecture

    def __init__(self, in_channels: int, out_channels: int, padding: str, *others: Any, **keywords: Any):
        super().__init__(in_channels, out_channels, padding, *others, **keywords)
        self.padding, self.name, self.backend, self.sync_norms = padding, "a block", "auto", False
        self._made = {name: made(layer) for name, layer in self.named_children()}
        self._made_style = self.style, getattr(self, "up_kind", None)
        self._warned: str | None = None

    def why_not_fused(self) -> str | None:
        """Why the block runs through its layers, or None if it runs fused."""
        d = self.__dict__
        layers, (style, up) = d["_modules"], d["_made_style"]
        if len(layers) != len(d["_made"]):
            return "it has other layers than it was made with"
        if (d["style"] is not style and d["style"] != style) or d.get("up_kind") != up:
            return "it has another style than it was made with"
        traced = torch.compiler.is_compiling()
        for name, layer_made in d["_made"].items():
            if traced or not as_made(layers.get(name), layer_made):
                reason = why_not_layer(layers.get(name), layer_made)
                if reason is not None:
                    return f"{name} {reason}"
        return None

    def prefers_layers(self, x: torch.Tensor) -> bool:
        """Whether the block is faster through its layers, which do the same."""
        return self.style.norm is not None and not self.sync_norms and layers_are_faster(x, self.backend)

    def operands(self) -> Operands:
        """What its convolutions compute with now."""
        return {name: parameters(getattr(self, name)) for name in self._made if not name.startswith("norm")}

    def _convolution(
        self, index: int, given: Operands, x: torch.Tensor, skip: torch.Tensor | None = None, pool: bool = False
    ) -> Any:
        """The convolution of that number, of ``cat([skip, x])``, with what follows it; ``pool``: (y, max_pool(y))."""
        conv, norm, slope = getattr(self, f"conv{index}"), self._modules.get(f"norm{index}"), self.style.negative_slope
        operands = (x, *given[f"conv{index}"])
        options: dict[str, Any] = dict(slope=slope, padding=self.padding, backend=self.backend)
        try:
            if norm is None and pool:
                return conv_relu_pool(*operands, **options)
            options |= dict(skip=skip, stride=conv.stride[0])
            if norm is None:
                return conv_relu(*operands, **options)
            return with_norm(operands, norm, sync=self.sync_norms, pool=pool, **options)
        except ValueError as error:
            self._refused(error, x)
        x = x if skip is None else torch.cat([reference.centre_crop(skip, *x.shape[2:]), x], 1)
        y = reference.convolution(self, index, x)
        return (y, F.max_pool2d(y, 2)) if pool else y

    def _as_layers_leave_it(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        conv: Any = self._modules["conv1"]
        return nchw(y) if leaves_nchw(x, conv._parameters.get("weight")) else y

    def _warn(self, reason: str) -> None:
        if reason != self._warned:
            warn_plain(self.name, reason)
            self._warned = reason

    def _runs_plain(self, x: torch.Tensor) -> bool:
        if why_not_anywhere() or self.prefers_layers(x):
            return True
        reason = self.why_not_fused()
        if "upsampled" in self.__dict__ or getattr(type(self), "upsampled", _UPSAMPLED) is not _UPSAMPLED:
            reason = "it has a way of its own to upsample"
        if reason is not None:
            self._warn(reason)
        return reason is not None

    def _refused(self, error: ValueError, x: torch.Tensor) -> None:
        """After an operator refused its operands: the layers may take them, or say in their words why not."""
        select_backend(self.backend, self.name, x)  # a backend that was asked for and cannot run stays an error
        self._warn(str(error))


class ConvBlock(_Block, reference.ConvBlock):
    """:class:`fastunet.reference.ConvBlock` as one operator, or one for each convolution where there are norms.

    Called with an image alone it is that block, in results, gradients and memory format. The keywords are for
    ``fastunet.UNet``, which has looked at the block and its neighbours: ``checked`` says that the block may run fused,
    and ``operands`` with which of its :meth:`operands`, ``pool`` asks for ``(y, max_pool(y))``, and ``grad_masked``
    that the gradient of y comes masked by ``y > 0``.
    """

    def forward(  # type: ignore[override]  # a pair where the network asks for the pooled map
        self,
        x: torch.Tensor,
        *,
        checked: bool = False,
        operands: Operands | None = None,
        pool: bool = False,
        grad_masked: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(N, C_in, H, W) → (N, C_out, H', W'), with ``pool`` also its 2×2 maximum."""
        if not checked and self._runs_plain(x):
            return super().forward(x)
        operands = operands or self.operands()
        if not self.style.is_classic:
            y = self._convolution(2, operands, self._convolution(1, operands, x), pool=pool)
            return y if checked else self._as_layers_leave_it(x, y)
        tensors: Any = itertools.chain(*operands.values())
        common: dict[str, Any] = dict(padding=self.padding, backend=self.backend)
        try:
            if pool:
                return encoder_block(x, *tensors, **common)
            y = conv_block(x, *tensors, grad_masked=grad_masked, **common)
        except ValueError as error:
            self._refused(error, x)
            y = super().forward(x)
            return (y, F.max_pool2d(y, 2)) if pool else y
        return y if checked else self._as_layers_leave_it(x, y)


class DecoderBlock(_Block, reference.DecoderBlock):
    """:class:`fastunet.reference.DecoderBlock` as one operator, or some; called without keywords it is that block.

    ``checked``, ``operands`` and ``grad_masked`` are those of :class:`ConvBlock`. ``mask_input`` asks to mask the
    gradient of x, a ReLU's output, by ``x > 0``; ``head`` are weight and bias of the network's head to be applied at
    once, for ``output`` without gradients.
    """

    def forward(
        self,
        x: torch.Tensor,
        skip: torch.Tensor,
        *,
        checked: bool = False,
        operands: Operands | None = None,
        mask_input: bool = False,
        grad_masked: bool = False,
        head: Pair | None = None,
        output: str = "logits",
    ) -> torch.Tensor:
        """(N, C_in, H, W) and the encoder's (N, C_out, H_s, W_s) → (N, C_out, H', W'), or ``output`` of ``head``."""
        if not checked and self._runs_plain(x):
            return super().forward(x, skip)
        operands = operands or self.operands()
        if not self.style.is_classic:
            up = self._up(operands["up"], x)
            up = up if up.shape[2:] == skip.shape[2:] else reference.padded_to(up, skip, self.style.odd)
            y = self._convolution(2, operands, self._convolution(1, operands, up, skip))
            return y if checked else self._as_layers_leave_it(x, y)
        tensors: Any = itertools.chain(*operands.values())
        common: dict[str, Any] = dict(up=self.up_kind, padding=self.padding, backend=self.backend)
        try:
            if head is not None:
                tensors = itertools.chain(tensors, head)
                return decoder_block_head(x, skip, *tensors, output=output, **common)
            y = decoder_block(x, skip, *tensors, mask_input=mask_input, grad_masked=grad_masked, **common)
        except ValueError as error:
            self._refused(error, x)
            y = super().forward(F.relu(x) if mask_input else x, skip)
            return y if head is None else finish(F.conv2d(y, *head), output)
        return y if checked else self._as_layers_leave_it(x, y)

    def _up(self, given: Pair, x: torch.Tensor) -> torch.Tensor:
        try:
            if self.up_kind == "transpose":
                return conv_transpose2d(x, *given, backend=self.backend)
            return upsample_conv_relu(x, *given, slope=self.style.negative_slope, backend=self.backend)
        except ValueError as error:
            self._refused(error, x)
            return self.upsampled(x)


def fused_head(
    head: nn.Conv2d, operands: Pair, x: torch.Tensor, *, output: str, mask_input: bool, backend: str
) -> torch.Tensor:
    """``output`` of an untouched head with its ``operands``; ``mask_input`` as for :class:`DecoderBlock`."""
    operator = head_of_network if mask_input else segmentation_head
    try:
        return operator(x, *operands, output=output, backend=backend)
    except ValueError as error:
        select_backend(backend, "head", x)
        logits = head(F.relu(x) if mask_input else x)
        warn_plain("head", str(error))
        return finish(logits, output)


def runs_as(block: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``block`` runs the forward of ``kind``, whatever hangs on it."""
    return getattr(type(block), "forward", None) is kind.forward and "forward" not in block.__dict__


def leaves_nchw(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether a convolution of ``x`` would leave its result in NCHW memory, as both say; of one channel by strides."""
    return all(t is None or (t.is_contiguous() and t.stride()[1] == t.shape[2] * t.shape[3]) for t in (x, weight))


def nchw(y: torch.Tensor) -> torch.Tensor:
    """``y`` in NCHW memory, with just the strides of that where there is one channel or pixel."""
    return y.contiguous().view(y.shape)

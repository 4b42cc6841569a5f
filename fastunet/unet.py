"""The U-Net on fastunet's operators: the same parameters as :class:`fastunet.reference.UNet`, another forward pass."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastunet import reference
from fastunet.arguments import checked
from fastunet.blocks import ConvBlock, DecoderBlock, cast_together, fused_head, leaves_nchw, nchw, runs_as, warn_plain
from fastunet.chains import layers_are_faster
from fastunet.dispatch import BACKENDS
from fastunet.functional import _weight_products
from fastunet.functional._layout import nhwc
from fastunet.functional.segmentation_head import finish
from fastunet.inference.frozen import FrozenUNet
from fastunet.touched import Snapshot, made, parameters, why_not_anywhere, why_not_layer, why_touched

_NO_TORCHSCRIPT = (
    "fastunet.UNet is not for TorchScript, which PyTorch has given up: use torch.export, torch.compile or"
    " fastunet.to_onnx"
)

_THROUGH_BLOCKS = reference.UNet.logits_of_padded


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


@checked
class UNet(reference.UNet):
    """A U-Net whose blocks run fused; constructor, ``state_dict`` and results are those of the plain build.

    Args:
        in_channels: image channels.
        num_classes: classes, background included.
        width: channels of the first level; level ``i`` has ``width * 2**i``.
        depth: number of poolings.
        padding: "same" takes any H, W ≥ 1; "valid" takes the sizes that :meth:`output_size` accepts.
        up: "upsample" (nearest ×2, 2×2 convolution, activation) or "transpose" (2×2 transposed convolution, stride 2).
        dropout: probability of dropping an element after the bottleneck, in training.
        backend: "auto" (Triton kernels on a CUDA device that can run them, else PyTorch), "triton" or "torch".
        style: ``norm`` (None, "batch", "instance", "group"), ``activation`` ("relu", "leaky_relu") and the rest of
            :class:`fastunet.architecture.Architecture`.

    Raises:
        ValueError: an argument outside its range.

    Attributes:
        activation_checkpointing: if set, training keeps only each block's inputs and computes the block again in the
            backward pass: less memory for about a third more time. Not with batch norm in training, which would count
            each batch twice in its running statistics.
        sync_norms: if set, batch norms take the statistics of all processes of ``torch.distributed`` in training.

    What a change of the plain build's modules does, it does here, in outputs and gradients: hooks, pruning, adapters,
    parametrisations, other layers or blocks. A block runs fused while its layers are as the constructor made them, with
    nothing but parametrisations attached; else it runs through them, with one warning that gives the reason
    (:meth:`why_not_fused` lists all). Hooks on a block leave it fused, but separate it from its neighbours: pooling,
    ReLU masks and the head, which it would share with them, become steps of their own.

    Parameters are made in contiguous memory, as PyTorch's tools for pruning and sharding expect. As for any
    convolutional network, ``model.to(memory_format=torch.channels_last)`` saves reordering them in each step. Logits
    come in the memory format in which the plain build leaves them, probabilities in that of the logits. A network with
    norms runs through its layers on a CPU, where these are faster; ``fastest_format(device)`` says which format suits
    it best.
    """

    conv_block, decoder_block = ConvBlock, DecoderBlock

    def __init__(
        self,
        in_channels: int = 2,
        num_classes: int = 4,
        width: int = 32,
        depth: int = 4,
        padding: str = "same",
        up: str = "upsample",
        dropout: float = 0.2,
        backend: str = "auto",
        **style: Any,
    ):
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
        super().__init__(in_channels, num_classes, width, depth, padding, up, dropout, backend, **style)
        self.activation_checkpointing = self._sync_norms = False
        self._head_made = made(self.head)
        self._warned: dict[str, str] = {}
        for name, block, _ in self._blocks():
            block.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes, H', W') of images (N, in_channels, H, W); raises ValueError for a wrong shape."""
        return self._run(x, "logits")

    def __prepare_scriptable__(self) -> None:
        """Called by ``torch.jit.script``."""
        raise ValueError(_NO_TORCHSCRIPT)

    @property
    def backend(self) -> str:
        """ "auto", "triton" or "torch"; setting it sets that of every block."""
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self._backend = backend
        self._tell("backend", backend)

    @property
    def sync_norms(self) -> bool:
        """Whether batch norms take the statistics of all processes in training; setting it sets that of every block."""
        return self._sync_norms

    @sync_norms.setter
    def sync_norms(self, sync_norms: bool) -> None:
        self._sync_norms = sync_norms
        self._tell("sync_norms", sync_norms)

    def _tell(self, name: str, value: Any) -> None:
        for module in self.modules():
            if isinstance(module, ConvBlock | DecoderBlock):
                setattr(module, name, value)

    @torch.no_grad()
    def predict_proba(self, x: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, num_classes, H', W'), without gradients."""
        return self.infer(x, "probabilities")

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Labels (N, H', W') uint8, the first of equally likely classes, without gradients."""
        return self.infer(x, "labels")

    @checked
    @torch.no_grad()
    def predict_regions(self, x: torch.Tensor) -> torch.Tensor:
        """Of a network with a sigmoid output for each of its overlapping regions, without gradients: (N, H', W') uint8.

        0 where no region has a probability above one half, else one more than the index of the last region that has.
        """
        return self.infer(x, "regions")

    @checked
    def freeze(self, graphs: int = 8, engine: str = "fastunet") -> FrozenUNet:
        """Inference with prepared weights and, on a CUDA device, one CUDA graph for each of ``graphs`` input shapes.

        The model must be in evaluation mode when the frozen network is called; later changes of its parameters count.
        ``engine="openvino"`` runs it in OpenVINO, on a CPU; see :class:`fastunet.inference.frozen.FrozenUNet`.
        """
        return FrozenUNet(self, graphs, engine)

    @checked
    def infer(self, x: torch.Tensor, output: str) -> torch.Tensor:
        """ "logits", "probabilities", "labels" or "regions" of images; hooks on the model run as in a call of it."""
        if output == "logits" or self._why_wrapped():
            return finish(self(x), output)
        return self._run(x, output)

    @checked
    def fastest_format(self, device: torch.device) -> torch.memory_format:
        """The memory format of images and parameters in which the network is fastest on a device."""
        norm = None if self.sync_norms else self.architecture.norm
        slow = norm == "instance" or (norm is not None and _weight_products.nhwc_is_slow())
        return torch.contiguous_format if device.type == "cpu" and slow else torch.channels_last

    def runs_apart(self) -> bool:
        """Whether something about the model or a part of it keeps it from running as one fused network now."""
        return self._is_rewritten() or bool(self._why_wrapped() or self.why_not_fused())

    def _is_rewritten(self) -> bool:
        """Whether a subclass, or this object, has its own way through the blocks."""
        return type(self).logits_of_padded is not _THROUGH_BLOCKS or "logits_of_padded" in self.__dict__

    def why_not_fused(self) -> dict[str, str]:
        """The parts that would not run now as parts of one fused network, by name, and why; empty if all would."""
        everywhere = why_not_anywhere()
        if everywhere or torch.compiler.is_compiling():
            return self._why_not_fused(everywhere)
        d = self.__dict__
        if (snapshot := d.get("_snapshot")) is not None:
            if snapshot.holds(self):
                return {}
            d["_snapshot"] = None
        reasons = self._why_not_fused(None)
        if not reasons:
            with contextlib.suppress(TypeError):
                snapshot = Snapshot(self, [block for _, block, _ in self._blocks()])
                if not self._why_not_fused(None):  # nor has another thread changed anything meanwhile
                    d["_snapshot"] = snapshot
        return reasons

    def _why_not_fused(self, everywhere: str | None) -> dict[str, str]:
        """What :meth:`why_not_fused` says, asking each part."""
        reasons = {}
        parts: Any = self._modules  # where looking an attribute up comes last
        for name, block, kind in self._blocks():
            if reason := everywhere or why_touched(block, kind) or block.why_not_fused():
                reasons[name] = reason
        if reason := everywhere or why_touched(parts["dropout"], nn.Dropout):
            reasons["dropout"] = reason
        if reason := everywhere or why_not_layer(parts["head"], self._head_made):
            reasons["head"] = reason
        return reasons

    def _blocks(self) -> Iterator[tuple[str, Any, type[nn.Module]]]:
        """Name, block and the class it was made of, in order of use."""
        parts: Any = self._modules
        yield from ((f"encoders.{i}", block, ConvBlock) for i, block in parts["encoders"]._modules.items())
        yield "bottleneck", parts["bottleneck"], ConvBlock
        yield from ((f"decoders.{i}", block, DecoderBlock) for i, block in parts["decoders"]._modules.items())

    def _why_wrapped(self) -> str | None:
        """Why calling the model is more than :meth:`forward`, or None."""
        if type(self).forward is not UNet.forward:
            return "has a forward of its own"
        return why_not_anywhere() or why_touched(self, type(self))

    def _check(self, x: torch.Tensor) -> tuple[int, int]:
        if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
            raise ValueError(_NO_TORCHSCRIPT)
        return super()._check(x)

    def _run(self, x: torch.Tensor, output: str) -> torch.Tensor:
        height, width = self._check(x)

        def through_blocks() -> torch.Tensor:
            return finish(reference.top_left(self.logits_of_padded(self._pad(x)), height, width), output)

        if self._is_rewritten():
            return through_blocks()
        apart, style = self.why_not_fused(), self.architecture
        if apart:
            self._warn(apart)
        name, first, _ = next(self._blocks())
        weight = None if name in apart else first.conv1._parameters.get("weight")
        if weight is not None:
            reference.check_images(x, weight)
        by_operators = style.norm is None or self.sync_norms or self.activation_checkpointing
        if not by_operators and layers_are_faster(x, self.backend):
            return through_blocks()
        if self.activation_checkpointing and style.norm == "batch" and self.training and torch.is_grad_enabled():
            raise ValueError("activation_checkpointing would count each batch twice in the running statistics of norms")
        drops = "dropout" not in apart and self.dropout.training and self.dropout.p
        plain = leaves_nchw(x, self._first_weight() if weight is None else weight)
        as_layers_leave_it: Callable[[torch.Tensor], torch.Tensor] = nchw if plain else _unchanged
        def read() -> dict[str, Any]:
            return {name: block.operands() for name, block, _ in self._blocks()} | {"head": {"": parameters(self.head)}}

        def head() -> Any:
            return operands["head"][""] if operands else parameters(self.head)

        x = self._pad(x)
        x, operands = (x, {}) if apart else cast_together(x, read)  # where no hook can change parameters on the way
        x = nhwc(x)  # once, not in each operator that reads it

        def run(name: str, block: nn.Module, *inputs: torch.Tensor, **links: Any) -> Any:
            if name in apart:  # called as the plain build would, with inputs in the memory format it would give
                inputs, links = tuple(map(as_layers_leave_it, inputs)), {}
            else:
                links |= {"checked": True, "operands": operands.get(name)}
            if self.activation_checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, use_reentrant=False, **links)
            return block(*inputs, **links)

        skips = []
        for level, encoder in enumerate(self.encoders):
            y = run(f"encoders.{level}", encoder, x, pool=style.down == "pool")
            if style.down == "stride":
                skip = x = y
            else:
                skip, x = (y, F.max_pool2d(y, 2)) if f"encoders.{level}" in apart else y
            skips.append(skip)
        # Nothing sees what goes from a part to the next if they are joined: the second masks the gradient for both.
        chain = ["bottleneck", *(f"decoders.{level}" for level in range(len(self.decoders))), "head"]
        joined = [style.is_classic and a not in apart and b not in apart for a, b in itertools.pairwise(chain)]
        joined[0] = joined[0] and "dropout" not in apart
        x = run("bottleneck", self.bottleneck, x, grad_masked=joined[0])
        x = self.dropout(as_layers_leave_it(x) if apart or drops else x)  # which draws in the order of memory
        for level, decoder in enumerate(self.decoders):
            links = {"mask_input": joined[level], "grad_masked": joined[level + 1]}
            if joined[-1] and level + 3 == len(chain) and not torch.is_grad_enabled():
                x = run(chain[level + 1], decoder, x, skips.pop(), head=head(), output=output)
                break
            x = run(chain[level + 1], decoder, x, skips.pop(), **links)
        else:
            if "head" in apart:
                x = finish(self.head(as_layers_leave_it(x)), output)
            else:
                x = fused_head(self.head, head(), x, output=output, mask_input=joined[-1], backend=self.backend)
        x = reference.top_left(x, height, width)
        return as_layers_leave_it(x) if x.dim() == 4 else x

    def _first_weight(self) -> torch.Tensor | None:
        """The first kernel larger than a pixel, whose strides tell its memory format."""
        return next((p for p in self.parameters() if p.dim() == 4 and p.shape[2] > 1), None)

    def _warn(self, apart: dict[str, str]) -> None:
        """Once for each part that runs through its modules and does not say so itself, as blocks of our own do."""
        silent = {name: reason for name, reason in apart.items() if name == "head"}
        for name, block, kind in self._blocks():
            if name in apart and not runs_as(block, kind):
                silent[name] = apart[name]
        everywhere = why_not_anywhere()
        for name, reason in ({"every block": everywhere} if everywhere else silent).items():
            if self._warned.get(name) != reason:
                warn_plain(name, reason)
                self._warned[name] = reason

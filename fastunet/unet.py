"""The U-Net on fastunet's operators: the same parameters as :class:`fastunet.reference.UNet`, another forward pass."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from fastunet import reference
from fastunet.dispatch import BACKENDS
from fastunet.functional._layout import nhwc
from fastunet.functional.blocks import conv_block, decoder_block, decoder_block_head, encoder_block
from fastunet.functional.segmentation_head import head_of_network
from fastunet.inference.frozen import FrozenUNet


class UNet(reference.UNet):
    """A U-Net whose blocks run fused; constructor, ``state_dict`` and results are those of the plain build.

    Args:
        in_channels: image channels.
        num_classes: classes, background included.
        width: channels of the first level; level ``i`` has ``width * 2**i``.
        depth: number of poolings.
        padding: "same" takes any H, W ≥ 1; "valid" takes the sizes that :meth:`output_size` accepts.
        up: "upsample" (nearest ×2, 2×2 convolution, ReLU) or "transpose" (2×2 transposed convolution, stride 2).
        dropout: probability of dropping an element after the bottleneck, in training.
        backend: "auto" (Triton kernels on a CUDA device that can run them, else PyTorch), "triton" or "torch".

    Raises:
        ValueError: an argument outside its range.

    Attributes:
        activation_checkpointing: if set, training keeps only each block's inputs and computes the block again in the
            backward pass: less memory for about a third more time.

    The blocks read the parameters of their layers directly, so forward hooks on single layers inside do not run.
    """

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
    ):
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}")
        super().__init__(in_channels, num_classes, width, depth, padding, up, dropout, backend)
        self.activation_checkpointing = False
        self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes, H', W') of images (N, in_channels, H, W); raises ValueError for a wrong shape."""
        return self._run(x, "logits")

    @torch.no_grad()
    def predict_proba(self, x: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, num_classes, H', W'), without gradients."""
        return self._run(x, "probabilities")

    @torch.no_grad()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Labels (N, H', W') uint8, the first of equally likely classes, without gradients."""
        return self._run(x, "labels")

    def freeze(self, graphs: int = 8) -> FrozenUNet:
        """Inference with prepared weights and, on a CUDA device, one CUDA graph for each of ``graphs`` input shapes.

        The model must be in evaluation mode when the frozen network is called; later changes of its parameters count.
        """
        return FrozenUNet(self, graphs)

    def _run(self, x: torch.Tensor, output: str) -> torch.Tensor:
        height, width = self._check(x)
        x = nhwc(self._pad(x))  # once, not in each operator that reads it
        padding, up, backend = self.architecture.padding, self.architecture.up, self.backend
        skips = []
        for encoder in self.encoders:
            parameters = _parameters(encoder.conv1, encoder.conv2)
            skip, x = self._unit(encoder_block, x, *parameters, padding=padding, backend=backend)
            skips.append(skip)
        # Each of these outputs has one consumer, a decoder's up or the head, and both mask its gradient.
        parameters = _parameters(self.bottleneck.conv1, self.bottleneck.conv2)
        x = self.dropout(self._unit(conv_block, x, *parameters, padding=padding, grad_masked=True, backend=backend))
        last = len(self.decoders) - 1
        for level, decoder in enumerate(self.decoders):
            parameters = _parameters(decoder.up, decoder.conv1, decoder.conv2)
            if level == last and not torch.is_grad_enabled():
                parameters += [self.head.weight, self.head.bias]
                y = decoder_block_head(
                    x, skips.pop(), *parameters, up=up, output=output, padding=padding, backend=backend
                )
                return y[..., :height, :width]
            options = dict(up=up, padding=padding, mask_input=True, grad_masked=True, backend=backend)
            x = self._unit(decoder_block, x, skips.pop(), *parameters, **options)
        y = head_of_network(x, self.head.weight, self.head.bias, output=output, backend=backend)
        return y[..., :height, :width]

    def _unit(self, block, *operands, **options):
        """Runs a block, checkpointed if asked and if there is a backward pass to come."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *operands, use_reentrant=False, **options)
        return block(*operands, **options)


def _parameters(*layers: torch.nn.Module) -> list[torch.Tensor]:
    """Weight and bias of each layer in turn."""
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]

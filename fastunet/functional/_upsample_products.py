"""Nearest ×2 upsampling and a 2×2 convolution as four products a low-resolution pixel, in float32 on a CPU.

Where u is x upsampled, the four results of a pixel are sums of its own x and of its neighbours, nine products in all::

    y[2h, 2w] = (w00 + w01 + w10 + w11) x[h, w]
    y[2h, 2w + 1] = (w00 + w10) x[h, w] + (w01 + w11) x[h, w + 1]
    y[2h + 1, 2w] = (w00 + w01) x[h, w] + (w10 + w11) x[h + 1, w]
    y[2h + 1, 2w + 1] = w00 x[h, w] + w01 x[h, w + 1] + w10 x[h + 1, w] + w11 x[h + 1, w + 1]

Each but the first is a sum of others and of one product with a difference of pixels; these are the four.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.functional import _onednn

LEAST_CHANNELS_IN, LEAST_CHANNELS_OUT = 256, 128
"""With fewer, differences and sums of maps take as long as the products that they save."""


def suits(channels_in: int, channels_out: int) -> bool:
    """Whether this is the faster way."""
    return (
        channels_in >= LEAST_CHANNELS_IN
        and channels_out >= LEAST_CHANNELS_OUT
        and torch.backends.mkl.is_available()
        and not _onednn.may_round_operands()
    )


def summed(weight: Tensor) -> Tensor:
    """What the pixel and its differences along w, along h and along both are multiplied by, (4, C_in, C_out), of
    ``weight`` (C_out, C_in, 2, 2)."""
    taps = weight.permute(2, 3, 1, 0)
    return torch.stack([taps.sum((0, 1)), taps[:, 1].sum(0), taps[1].sum(0), taps[1, 1]])


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """The convolution of ``x`` (N, C_in, H, W), fastest in NHWC memory, in NHWC memory, and its ReLU if asked, with
    ``weight`` from :func:`summed`."""
    n, _, h, w = x.shape
    image = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, 1, 0, 1))
    own, right, below, across = image[:, :-1, :-1], image[:, :-1, 1:], image[:, 1:, :-1], image[:, 1:, 1:]
    operands = x.new_empty(4, *own.shape)
    operands[0] = own
    torch.sub(right, own, out=operands[1])
    torch.sub(below, own, out=operands[2])
    torch.sub(across, below, out=operands[3]).sub_(operands[1])
    phases = torch.bmm(operands.flatten(1, 3), weight).view(2, 2, n, h, w, -1)
    phases[0, 0] += bias
    phases[1, 1] += phases[1, 0]
    phases[0, 1] += phases[0, 0]
    phases[1, 0] += phases[0, 0]
    phases[1, 1] += phases[0, 1]
    y = x.new_empty(n, h, 2, w, 2, weight.shape[2])
    interleaved = y.permute(2, 4, 0, 1, 3, 5)
    if relu:
        torch.clamp_min(phases, 0, out=interleaved)
    else:
        interleaved.copy_(phases)
    return y.view(n, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)

"""3×3 convolutions of many channels by Winograd's F(4×2, 3×3), in float32 on a CPU: a third of the multiply-adds.

Each tile of 4 × 2 results is ``Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A`` of its 6 × 4 pixels x and the 3 × 3 weight w (S. Winograd,
Arithmetic Complexity of Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks,
CVPR 2016): all tiles together are 24 matrix products over the channels. G, A and the inverse of B hold powers of
points: 0, ±2/3, ±4/3 and ∞ down a column, 0, ±1 and ∞ along a row. With them, and since each sum is a ninth as long,
the error against float64 is about half that of oneDNN's convolution; with the usual 0, ±1, ±2 down a column it is up to
twice that error, and tiles of 4 × 4 results, hardly faster, come near it too.

A NaN, an infinity or an overflow spoils its whole tile, not the kernel's reach alone: callers know that there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.functional import _onednn

HIGH, WIDE = 4, 2
"""Results of a tile."""
LEAST_CHANNELS_IN, LEAST_CHANNELS_OUT = 128, 256
"""With fewer, transforming maps takes as long as the products that it saves."""
LEAST_PIXELS = 256
"""Of all images; with fewer, reading 24 numbers in place of 9 weights does."""
PART = 1 << 20
"""Transformed elements a thread at a time: maps transformed as a whole would leave the cache in between."""


def suits(channels_in: int, channels_out: int, pixels: int) -> bool:
    """Whether this is the faster way to a convolution with ``pixels`` results a channel, all images together."""
    return (
        channels_in >= LEAST_CHANNELS_IN
        and channels_out >= LEAST_CHANNELS_OUT
        and pixels >= LEAST_PIXELS
        and torch.backends.mkl.is_available()
        and not _onednn.may_round_operands()
    )


def transformed(weight: Tensor) -> Tensor:
    """G w Gᵀ (24, C_in, C_out) of ``weight`` (C_out, C_in, 3, 3)."""
    return (weight.flatten(2) @ _matrices()[0].T).permute(2, 1, 0).contiguous()


def convolution(sources: Sequence[Tensor], weight: Tensor, bias: Tensor, pad: int, relu: bool) -> Tensor:
    """``conv2d(cat(sources, 1), w, bias)`` in NHWC memory, and its ReLU if asked, with the ``weight`` from
    :func:`transformed`; the sources (N, C, H, W) have one size and are fastest in NHWC memory."""
    n, _, height, width = sources[0].shape
    height, width = height + 2 * pad - 2, width + 2 * pad - 2
    down, across = -(-height // HIGH), -(-width // WIDE)
    edges = 0, 0, pad, WIDE * across - width + pad, pad, HIGH * down - height + pad
    images = [source.permute(0, 2, 3, 1) for source in sources]
    images = [F.pad(image, edges) for image in images] if any(edges) else images
    y = weight.new_empty(n, height, width, weight.shape[2])
    rows = max(1, PART * torch.get_num_threads() // (len(weight) * across * max(weight.shape[1:])))  # of tiles
    together = max(1, rows // down)
    for first in range(0, n, together):
        for top in range(0, down, rows):
            bottom = HIGH * min(top + rows, down)
            part = [image[first : first + together, HIGH * top : bottom + 2] for image in images]
            _tiles(part, weight, bias, relu, y[first : first + together, HIGH * top : bottom])
    return y.permute(0, 3, 1, 2)


def _tiles(images: list[Tensor], weight: Tensor, bias: Tensor, relu: bool, y: Tensor) -> None:
    """Writes ``y`` (N, H, W, C_out), the results of whole tiles or what is wanted of the last ones."""
    n, height, width, _ = images[0].shape
    down, across = (height - 2) // HIGH, (width - 2) // WIDE
    x = y.new_empty(HIGH + 2, WIDE + 2, n, down, across, weight.shape[1])
    for image, to in zip(images, x.split([image.shape[3] for image in images], dim=5)):
        _transform(image, to)
    products = torch.bmm(x.flatten(2, 4).flatten(0, 1), weight)
    tiles = torch.mm(_matrices()[2], products.flatten(1)).view(HIGH, WIDE, n, down, across, -1)
    whole = y.new_empty(n, down, HIGH, across, WIDE, y.shape[3])
    torch.add(tiles, bias, out=whole.permute(2, 4, 0, 1, 3, 5))
    wanted = whole.view(n, HIGH * down, WIDE * across, -1)[:, : y.shape[1], : y.shape[2]]
    if relu:
        torch.clamp_min(wanted, 0, out=y)
    else:
        y.copy_(wanted)


def _transform(image: Tensor, to: Tensor) -> None:
    """Writes Bᵀ x B of all tiles of ``image`` (N, H, W, C) to ``to`` (6, 4, N, down, across, C)."""
    strips = image.unfold(1, HIGH + 2, HIGH).permute(4, 0, 1, 2, 3)  # (6, N, down, W, C)
    x = torch.mm(_matrices()[1], strips.reshape(HIGH + 2, -1)).view(strips.shape)
    x0, x1, x2, x3 = x[..., :-2:WIDE, :], x[..., 1:-1:WIDE, :], x[..., 2::WIDE, :], x[..., 3::WIDE, :]
    torch.sub(x0, x2, out=to[:, 0])
    torch.add(x1, x2, out=to[:, 1])
    torch.sub(x2, x1, out=to[:, 2])
    torch.sub(x3, x1, out=to[:, 3])


@functools.cache
def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """G ⊗ G (24, 9), Bᵀ of columns (6, 6) and (A ⊗ A)ᵀ (8, 24)."""
    points = np.array([[0], [2], [-2], [4], [-4]]) / 3

    def powers(count: int) -> np.ndarray:
        return np.concatenate([points ** np.arange(count), np.eye(count)[-1:]])

    g = np.kron(powers(3), np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]))
    a = np.kron(powers(HIGH), np.array([[1, 0], [1, 1], [1, -1], [0, 1]]))
    b = np.linalg.inv(powers(HIGH + 2))
    return _tensor(g), _tensor(b.T), _tensor(a.T)


def _tensor(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(matrix.astype(np.float32, order="C"))

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
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.functional import _onednn

HIGH, WIDE = 4, 2
"""Results of a tile."""
LEAST_CHANNELS_IN, LEAST_CHANNELS_OUT = 128, 256
"""With fewer, transforming maps takes as long as the products that it saves."""
LEAST_PIXELS = 200
"""Of all images; with fewer, reading 24 numbers in place of 9 weights does."""
GRADIENT_CHANNELS, GRADIENT_PIXELS = 64, 512
"""The same of a weight gradient, whose 24 numbers are written and read."""
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


def suits_gradient(channels_in: int, channels_out: int, pixels: int) -> bool:
    """The same of the weight gradient, against other matrix products."""
    return min(channels_in, channels_out) >= GRADIENT_CHANNELS and pixels >= GRADIENT_PIXELS


def transformed(weight: Tensor) -> Tensor:
    """G w Gᵀ (24, C_in, C_out) of ``weight`` (C_out, C_in, 3, 3)."""
    return (weight.flatten(2) @ _matrices()[0].T).permute(2, 1, 0).contiguous()


def convolution(sources: Sequence[Tensor], weight: Tensor, bias: Tensor, pad: int, relu: bool) -> Tensor:
    """``conv2d(cat(sources, 1), w, bias)`` in NHWC memory, and its ReLU if asked, with the ``weight`` from
    :func:`transformed`; the sources (N, C, H, W) have one size and are fastest in NHWC memory."""
    n, _, height, width = sources[0].shape
    y = weight.new_empty(n, height + 2 * pad - 2, width + 2 * pad - 2, weight.shape[2])
    images = _padded(sources, pad, y)
    for batch, rows, ends in _parts(y, max(weight.shape[1:])):
        _convolve([image[batch, rows.start : ends] for image in images], weight, bias, relu, y[batch, rows])
    return y.permute(0, 3, 1, 2)


def weight_gradient(dz: Tensor, sources: Sequence[Tensor], pad: int) -> Tensor:
    """dw (C_out, 3, 3, C_in) of :func:`convolution`, ``Gᵀ [Σ (A dz Aᵀ) ⊙ (Bᵀ x B)] G`` over all tiles, from dz
    (N, H, W, C_out); what is not finite reaches the weights that it would reach else."""
    g, _, a = _matrices()
    c_in = sum(source.shape[1] for source in sources)
    images, summed = _padded(sources, pad, dz), None
    down, across = _tiles(dz)
    beyond = 0, 0, 0, WIDE * across - dz.shape[2], 0, HIGH * down - dz.shape[1]
    padded = F.pad(dz, beyond) if any(beyond) else dz
    for batch, rows, ends in _parts(dz, max(c_in, dz.shape[3])):
        x = _transformed([image[batch, rows.start : ends] for image in images])
        part = padded[batch, rows]
        tiles = part.reshape(len(part), -1, HIGH, across, WIDE, dz.shape[3]).permute(2, 4, 0, 1, 3, 5)
        z = torch.mm(a.T, tiles.reshape(HIGH * WIDE, -1)).view(len(x), -1, dz.shape[3]).transpose(1, 2)
        summed = torch.bmm(z, x) if summed is None else summed.baddbmm_(z, x)
    if summed is None:
        return dz.new_zeros(dz.shape[3], 3, 3, c_in)
    return torch.matmul(g.T, summed.transpose(0, 1)).view(-1, 3, 3, c_in)


def _tiles(y: Tensor) -> tuple[int, int]:
    """How many tiles there are down and across an image of results (N, H, W, C)."""
    return -(-y.shape[1] // HIGH), -(-y.shape[2] // WIDE)


def _padded(sources: Sequence[Tensor], pad: int, y: Tensor) -> list[Tensor]:
    """The sources as (N, H, W, C) with their zeros around them, and as many more as whole tiles of ``y`` need."""
    down, across = _tiles(y)
    edges = 0, 0, pad, WIDE * across - y.shape[2] + pad, pad, HIGH * down - y.shape[1] + pad
    images = [source.permute(0, 2, 3, 1) for source in sources]
    return [F.pad(image, edges) for image in images] if any(edges) else images


def _parts(y: Tensor, channels: int) -> Iterator[tuple[slice, slice, int]]:
    """Parts of ``y`` (N, H, W, C): some images, or some rows of one, and the end of the rows that these see."""
    down, across = _tiles(y)
    rows = max(1, PART * torch.get_num_threads() // (24 * across * channels))  # of tiles
    together = max(1, rows // down)
    for first in range(0, len(y), together):
        for top in range(0, down, rows):
            bottom = HIGH * min(top + rows, down)
            yield slice(first, first + together), slice(HIGH * top, bottom), bottom + 2


def _convolve(images: list[Tensor], weight: Tensor, bias: Tensor, relu: bool, y: Tensor) -> None:
    """Writes ``y`` (N, H, W, C_out), the results of whole tiles or what is wanted of the last ones."""
    n, c_out = len(y), y.shape[3]
    down, across = _tiles(y)
    products = torch.bmm(_transformed(images), weight)
    tiles = torch.mm(_matrices()[2], products.flatten(1)).view(HIGH, WIDE, n, down, across, c_out)
    whole = y.new_empty(n, down, HIGH, across, WIDE, c_out)
    torch.add(tiles, bias, out=whole.permute(2, 4, 0, 1, 3, 5))
    wanted = whole.view(n, HIGH * down, WIDE * across, c_out)[:, : y.shape[1], : y.shape[2]]
    if relu:
        torch.clamp_min(wanted, 0, out=y)
    else:
        y.copy_(wanted)


def _transformed(images: list[Tensor]) -> Tensor:
    """Bᵀ x B (24, tiles, C_in) of all tiles of ``images`` (N, H, W, C) side by side."""
    n, height, width, _ = images[0].shape
    channels = [image.shape[3] for image in images]
    x = images[0].new_empty(HIGH + 2, WIDE + 2, n, (height - 2) // HIGH, (width - 2) // WIDE, sum(channels))
    for image, to in zip(images, x.split(channels, dim=5)):
        _transform(image, to)
    return x.view(24, -1, sum(channels))


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

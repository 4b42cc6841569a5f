"""The weight gradient of a 3×3 convolution as matrix products, for NHWC memory on processors with AVX2 alone.

There oneDNN's own slows down where rows are long and have many channels, presumably since the lines of a row share few
sets of the first cache: with 64 channels of 282² pixels it took 4.6 times as long as the products here (two cores of an
AMD EPYC, PyTorch 2.13). On processors with AVX-512 oneDNN has other code, and is left alone.

With ``band`` holding for each pixel the C channels of the three pixels around it, ``dw[:, ky] += dzᵀ · band``, where
dz are the rows that meet those of the band at the height ky of the kernel. Where there are channels and pixels enough,
:func:`_winograd.weight_gradient` needs a third of these products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastunet.autograd import tracked, vmapped
from fastunet.functional import _winograd

BAND = 4 << 20
"""Bytes of a band: smaller ones make products too short, larger ones leave the last cache."""
LEAST_CHANNELS = 16
LEAST_PRODUCTS = 1 << 25
"""Of an image; below, about a dozen calls for each image take longer than what they save."""


def nhwc_is_slow() -> bool:
    """Whether the weight gradients of oneDNN in NHWC memory are slow on this processor."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def suits(dz: Tensor, sources: Sequence[Tensor]) -> bool:
    """Whether the products are the faster way to the weight gradient of ``sources``, and round as it does."""
    channels = [source.shape[1] for source in sources]
    return (
        dz.device.type == "cpu"
        and dz.dtype == torch.float32
        and min(dz.shape[1], *channels) >= LEAST_CHANNELS
        and 9 * sum(channels) * dz.shape[1:].numel() >= LEAST_PRODUCTS
        and nhwc_is_slow()
        and torch.backends.mkl.is_available()
        and getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none") != "bf16"
        and not vmapped()
        and not tracked(dz, *sources)
    )


def weight_gradient(dz: Tensor, sources: Sequence[Tensor], pad: int, has_bias: bool) -> tuple[Tensor, Tensor]:
    """dw (C_out, C_in, 3, 3) of the concatenated ``sources``, in NHWC memory, and db, without elements where there is
    no bias; from dz in NHWC memory."""
    flat = dz.permute(0, 2, 3, 1).flatten(1, 2)
    if _winograd.suits_gradient(sum(source.shape[1] for source in sources), dz.shape[1], flat[..., 0].numel()):
        dw = _winograd.weight_gradient(dz.permute(0, 2, 3, 1), sources, pad)
    else:
        found = [_one_source(flat, dz.shape, source, pad) for source in sources]
        dw = found[0] if len(found) == 1 else torch.cat(found, dim=3)
    return dw.permute(0, 3, 1, 2), flat.flatten(0, 1).sum(0) if has_bias else dw.new_empty(0)


def _one_source(dz: Tensor, shape: Sequence[int], x: Tensor, pad: int) -> Tensor:
    """(C_out, 3, 3, C) from dz (N, H_out · W_out, C_out)."""
    _, c_out, h_out, w_out = shape
    _, c, height, width = x.shape
    tall = min(height, max(1, BAND // (3 * c * w_out * x.element_size())))
    band = x.new_zeros(tall, w_out, 3, c)  # where the kernel reaches over the edge it stays zero
    pixels = band.view(-1, 3 * c)
    dw = x.new_zeros(c_out, 3, 3 * c)
    for image, dz_image in zip(x.permute(0, 2, 3, 1), dz):
        for top in range(0, height, tall):
            rows = image[top : top + tall]
            for kx in range(3):
                left, right = max(0, pad - kx), min(w_out, width + pad - kx)
                band[: len(rows), left:right, kx] = rows[:, left + kx - pad : right + kx - pad]
            for ky in range(3):
                first = top + pad - ky  # the row of dz that meets the first one of the band
                start, stop = max(0, first), min(h_out, first + len(rows))
                if start < stop:
                    met = pixels[(start - first) * w_out : (stop - first) * w_out]
                    dw[:, ky].addmm_(dz_image[start * w_out : stop * w_out].t(), met)
    return dw.view(c_out, 3, 3, c)

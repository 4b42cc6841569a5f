"""The first numbers of a new GPU: one box and one rows convolution against float64, ``python -m bench.gpu.first``.

Both rest on what no other machine can show: that the driver encodes their tensor maps, and that the flattened loop over
taps and channels is compiled rightly. If these two are wrong, nothing after them is worth its minutes.
"""

from __future__ import annotations

import sys

import torch

from fastunet.inspection.tuning import error_within_budget
from fastunet.kernels.conv import forward
from fastunet.kernels.conv.convolution import ConvConfig

CASES = {ConvConfig("box", 128, 16, 8): (128, 128), ConvConfig("rows", 32, 128, 6, block_c=32, num_stages=2): (32, 32)}
"""Tilings as large layers of both networks use them, and channels in and out."""


def operands(channels: tuple[int, int], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (2, C_in, 32, 48) in NHWC memory, weights and bias in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    c_in, c_out = channels
    x, weight, bias = (torch.randn(shape, generator=generator)
                       for shape in ((2, c_in, 32, 48), (c_out, c_in, 3, 3), (c_out,)))  # fmt: skip
    weight = weight / (9 * c_in) ** 0.5
    x, weight, bias = (t.to(device, torch.bfloat16) for t in (x, weight, bias))
    return x.contiguous(memory_format=torch.channels_last), weight, bias


def check(config: ConvConfig, device: str = "cuda") -> bool:
    """Prints one line about a tiling, and says whether it is within the error budget."""
    x, weight, bias = operands(CASES[config], device)
    got = forward.forward(x, None, weight, bias, 1, 0.0, config=config)
    same = torch.nn.functional.conv2d(x, weight, bias, padding=1).relu()
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    error, other = ((t.double() - exact).abs().max().item() for t in (got, same))
    right = error_within_budget(got, same, exact)
    verdict = "right" if right else "WRONG"
    print(f"{config.variant}: {verdict}, largest error {error:.3g}, PyTorch's {other:.3g}", flush=True)
    return right


if __name__ == "__main__":
    sys.exit(not all([check(config) for config in CASES]))

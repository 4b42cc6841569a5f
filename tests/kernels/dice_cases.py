"""Logits and labels for the tests of the Dice kernels."""

from __future__ import annotations

import torch

LAYOUTS = ["NCHW", "NHWC"]
LABEL_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


def ordered(x, layout):
    return x.contiguous() if layout == "NCHW" else x.transpose(1, 2).contiguous().transpose(1, 2)


def inputs(n, c, s, dtype, device, layout="NCHW", label_dtype=torch.uint8):
    """Logits with ignored labels 200; of 16 pixels or more, one label of sample 0 is out of range."""
    generator = torch.Generator().manual_seed(c * s + n)
    logits = ordered(torch.randn(n, c, s, generator=generator).mul(3).to(device, dtype), layout)
    labels = torch.randint(0, max(c, 2), (n, s), generator=generator)
    labels[:, ::5] = 200
    if n and s > 15:
        labels[0, 1] = 180
    return logits, labels.to(device, label_dtype)

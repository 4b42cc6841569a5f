"""What a norm, its activation and its pool compute, in PyTorch: statistics, forward and backward of the second pass.

Statistics are (S, G): S = 1 row of the whole batch, or one of each sample; G groups of channels, one each but for
"group". On a CPU they come from sums over NHWC memory, in parts that stay in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastunet.autograd import tracked
from fastunet.functional._checks import processes_of
from fastunet.functional._layout import nhwc
from fastunet.functional.max_pool import unpooled
from fastunet.functional.relu import activation_, activation_gradient

_aten = torch.ops.aten
_PART = 1 << 20
"""Elements of a part of a sum on a CPU: what is computed of more would be new memory, which costs as much as sums."""
_PROCESS_GROUPS: dict[str, dist.ProcessGroup] = {}
"""By the names that operators know them by, whose arguments are numbers, strings and tensors."""


def name_of(process_group: dist.ProcessGroup | None) -> str:
    """What :func:`merged` finds ``process_group`` by; "" for None."""
    if process_group is None:
        return ""
    processes_of(process_group, "process_group")
    _PROCESS_GROUPS[process_group.group_name] = process_group
    return process_group.group_name


def check_values(norm: str, size: Sequence[int], groups: int, process_group: Any) -> None:
    """As PyTorch: the one value of a mean would become 0 whatever it is."""
    n, channels, height, width = size
    if norm == "instance":
        if height * width == 1:
            raise ValueError(f"Expected more than 1 spatial element when training, got input size {list(size)}")
        return
    if n * (channels // groups) * height * width == 1 and process_group is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(size)}")


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the dtype of all sums: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()


def _parts(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, ...]:
    """NHWC ``x`` as (rows, P, C) each, in the dtype of sums; ``rows`` is 1 or the number of images."""
    pixels = x.permute(0, 2, 3, 1).reshape(rows, -1, x.shape[1])
    return pixels.split(max(_PART // (rows * x.shape[1]), 1), 1)


def statistics(z: torch.Tensor, groups: int, per_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (S, groups) of NHWC ``z``; zeros where there are no values."""
    channels, z = z.shape[1], wide(z)
    if z.numel() == 0:
        mean = z.new_zeros(0 if per_sample else 1, groups)
        return mean, mean.clone()
    if z.device.type != "cpu":
        var, mean = torch.var_mean(z.unsqueeze(1 if per_sample else 0), (1, 3, 4), correction=0)
    else:
        parts = _parts(z, len(z) if per_sample else 1)
        means = [part.mean(1) for part in parts]
        variances = [(part - mean[:, None]).square_().mean(1) for part, mean in zip(parts, means)]
        mean, var = means[0], variances[0]
        if len(parts) > 1:
            counts = mean.new_tensor([part.shape[1] for part in parts])
            mean, var = _joined(counts, torch.stack(means, 1), torch.stack(variances, 1))
    if groups == channels:
        return mean, var
    between, mean = torch.var_mean(mean.unflatten(1, (groups, -1)), 2, correction=0)
    return mean, var.unflatten(1, (groups, -1)).mean(2) + between


def _joined(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (S, G) of parts (S, P, G) of ``counts`` (P,) values each."""
    shares = (counts / counts.sum())[:, None]
    mean = (shares * means).sum(1)
    return mean, (shares * (variances + (means - mean[:, None]).square())).sum(1)


def merged(mean: torch.Tensor, var: torch.Tensor, count: int, group: str) -> tuple[torch.Tensor, ...]:
    """The statistics of all processes of ``group`` and the number of values behind them, in the order of ranks."""
    own = torch.cat([mean.new_full((1,), count), mean.flatten(), var.flatten()])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(_PROCESS_GROUPS[group]))]
    dist.all_gather(every, own, group=_PROCESS_GROUPS[group])
    counts, means, variances = torch.stack(every).split([1, mean.numel(), var.numel()], 1)
    return *_joined(counts[:, 0], means[None], variances[None]), counts.sum(0)


def _per_channel(value: torch.Tensor, channels: int) -> torch.Tensor:
    """(S, G) as (S, channels)."""
    return value if value.shape[1] == channels else value.repeat_interleave(channels // value.shape[1], 1)


def _scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """(S, C, 1, 1) each: the norm as ``z * scale + shift``."""
    scale = rstd if weight is None else rstd * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale[..., None, None], shift[..., None, None]


def apply(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float, slope: float,
    out: Tensor | None = None,
) -> Tensor:
    """``activation((z - mean) / sqrt(var + eps) * weight + bias)`` in the dtype of ``z``, which ``out`` may be."""
    mean, rstd = (_per_channel(each, z.shape[1]) for each in (mean, (var + eps).rsqrt()))
    scale, shift = _scale_and_shift(weight, bias, mean, rstd)
    return nhwc(activation_(torch.addcmul(shift, wide(z), scale, out=out), slope).to(z.dtype))


def _sums(g: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> list[Tensor]:
    """Sums (S, C) of g and of g (z - mean) rstd."""
    if z.device.type != "cpu" or z.numel() == 0 or tracked(g, z, mean, rstd):
        normal = (z - mean[..., None, None]) * rstd[..., None, None]
        pairs = g.sum((2, 3)), (g * normal).sum((2, 3))
        return [each if len(mean) == len(z) else each.sum(0, keepdim=True) for each in pairs]
    sums, products = torch.zeros_like(mean), torch.zeros_like(mean)
    for g_part, z_part in zip(_parts(g, len(mean)), _parts(z, len(mean))):
        sums += g_part.sum(1)
        products += (z_part - mean[:, None]).mul_(g_part).sum(1)
    return [sums, products * rstd]


def backward(
    dy: Tensor, d_pooled: Tensor | None, z: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor,
    var: Tensor, count: Tensor, eps: float, slope: float, group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dweight, dbias) of :func:`apply` and its statistics; the gradients that are None are zero, not both.

    With ``g`` the gradient before the activation, h = (z - mean) rstd and averages over what shares its statistics:
    ``dz = rstd (weight g - average(weight g) - h average(weight g h))``.
    """
    n, channels, height, width = z.shape
    again = tracked(dy, d_pooled, z, weight, bias, mean, var)
    if again and group:
        raise NotImplementedError("fastunet: no second derivatives of a norm over several processes")
    rows, groups = mean.shape
    mean, rstd = (_per_channel(each, channels) for each in (mean, (var + eps).rsqrt()))
    scale, shift = _scale_and_shift(weight, bias, mean, rstd)
    g, wide_z = dy, wide(z)
    if slope != 1 or d_pooled is not None:
        y = nhwc(activation_(torch.addcmul(shift, wide_z, scale), slope).to(z.dtype))
        if d_pooled is not None:
            g = unpooled(d_pooled, dy, y, slope)
        elif again or slope != 0:
            g = activation_gradient(dy, y, slope)
        else:
            g = _aten.threshold_backward.grad_input(nhwc(dy), y, 0, grad_input=y)
    g = wide(nhwc(g))
    sum_g, sum_gh = _sums(g, wide_z, mean, rstd)
    dweight, dbias = sum_gh.sum(0), sum_g.sum(0)
    total = torch.stack([sum_g, sum_gh])
    own_count = max(n * height * width // rows, 1) * (channels // groups) if n else 1
    if group:
        dist.all_reduce(total, group=_PROCESS_GROUPS[group])
    if weight is not None:
        total = total * weight
    total = total.unflatten(2, (groups, -1)).sum(3) / (count if group else own_count)
    average_g, average_gh = (_per_channel(each, channels)[..., None, None] for each in total)
    rstd, mean = rstd[..., None, None], mean[..., None, None]
    factor = -rstd.square() * average_gh
    constant = -rstd * average_g - factor * mean
    if again:
        dz = torch.addcmul(torch.addcmul(constant, g, scale), wide_z, factor)
    else:
        own = None if g is dy or slope == 1 else g  # new memory costs as much as the sums
        dz = torch.addcmul(constant, g, scale, out=own).addcmul_(wide_z, factor)
    dweight, dbias = (d if p is not None else d.new_empty(0) for p, d in ((weight, dweight), (bias, dbias)))
    return nhwc(dz.to(z.dtype)), dweight, dbias


def reached(y: Tensor) -> Tensor:
    """``y``. Checkpointing ends its second forward pass where the last tensor is kept for backward: here one more, so
    that what stands before, the update of running statistics, is done as often as by the layer."""
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return y
    return y * y.new_ones(())

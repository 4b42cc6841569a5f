"""3×3 convolution → norm → activation → [2×2 max-pool]: batch, instance and group norm, over processes too.

Kept for backward are what the convolution read, its result z and the statistics, (S, G) float32 each. The activation's
output, which the next layer keeps, does not do instead of z: ReLU has no inverse, and that of a norm divides by its
weight, which training may bring near zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet.arguments import checked
from fastunet.autograd import Context, Gradients, Inputs
from fastunet.dispatch import autocast_operands, define, select_backend
from fastunet.functional import _gradients, _norm, conv_strided
from fastunet.functional._layout import empty_nhwc, nhwc
from fastunet.functional.conv_relu import (
    check_conv,
    check_conv_dtypes,
    check_stride,
    conv_relu,
    conv_relu_pool,
    gradients,
)
from fastunet.functional.conv_relu import torch_forward as convolution
from fastunet.functional.max_pool import max_pool2d, pooled_shape
from fastunet.functional.relu import check_slope

_OPS = torch.ops.fastunet
NORMS = ("batch", "instance", "group")


def _forward(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, pad: int, stride: int, groups: int, per_sample: bool, eps: float, slope: float,
    pool: bool, group: str,
) -> tuple[Tensor, ...]:
    if stride == 1:
        z = convolution(x, skip, weight, bias, pad, 1.0)
    else:
        z = conv_strided.torch_forward(x, weight, bias, pad, 1.0)
    mean, var = _norm.statistics(z, groups, per_sample)
    count = mean.new_empty(0)
    if group:
        mean, var, count = _norm.merged(mean, var, z.shape[0] * z.shape[2] * z.shape[3], group)
    y = _norm.apply(z, norm_weight, norm_bias, mean, var, eps, slope)
    return y, nhwc(F.max_pool2d(y, 2)) if pool else z.new_empty(0), z, mean, var, count


def _fake_forward(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, pad: int, stride: int, groups: int, per_sample: bool, eps: float, slope: float,
    pool: bool, group: str,
) -> tuple[Tensor, ...]:
    z = empty_nhwc(x, weight.shape[0], *conv_strided.output_size(x, pad, stride))
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = z.new_empty((z.shape[0] if per_sample else 1, groups), dtype=dtype)
    pooled = empty_nhwc(z, z.shape[1], *pooled_shape(*z.shape[2:])) if pool else z.new_empty(0)
    count = mean.new_empty(1 if group else 0)
    return torch.empty_like(z), pooled, z, mean, torch.empty_like(mean), count


def _fake_backward(
    dy: Tensor | None, d_pooled: Tensor | None, z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
    mean: Tensor, *_: object,
) -> tuple[Tensor, ...]:
    dz = empty_nhwc(z, *z.shape[1:])
    return dz, *(mean.new_empty(0 if each is None else z.shape[1]) for each in (norm_weight, norm_bias))


def _setup(ctx: Context, inputs: Inputs, outputs: tuple[Tensor, ...]) -> None:
    x, skip, weight, bias, norm_weight, norm_bias, pad, stride, _, _, eps, slope, _, group, backend = inputs
    *_, z, mean, var, count = outputs
    ctx.save_for_backward(x, skip, weight, norm_weight, norm_bias, z, mean, var, count)
    ctx.options = pad, bias is not None, backend
    ctx.norm, ctx.stride = (eps, slope, group), stride
    ctx.mark_non_differentiable(count)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Context, dy: Tensor | None, d_pooled: Tensor | None, dz_more: Tensor | None, d_mean: Tensor | None,
    d_var: Tensor | None, _: None,
) -> Gradients:
    x, skip, weight, norm_weight, norm_bias, z, mean, var, count = ctx.saved_tensors
    dz = d_norm_weight = d_norm_bias = None
    if dy is not None or d_pooled is not None:
        arguments = dy, d_pooled, z, norm_weight, norm_bias, mean, var, count, *ctx.norm, ctx.options[2]
        dz, d_norm_weight, d_norm_bias = _OPS.norm_backward(*arguments)
    for more in (dz_more, _statistics_backward(d_mean, d_var, z, mean)):  # of second derivatives alone
        dz = more if dz is None else dz if more is None else dz + more
    if dz is None:
        return (None,) * 15
    needed = ctx.needs_input_grad
    pad, _, backend = ctx.options
    one_source, dskip = (needed[0], needed[2], needed[3]), None
    if backend == "torch" and skip is None:
        dx, dw, db = _gradients.gradients(dz, x, weight, ctx.stride, pad, one_source)
    elif ctx.stride == 2:
        dx, dw, db = conv_strided.gradients(dz, x, weight, pad, one_source, backend)
    else:
        dx, dskip, dw, db = gradients(ctx, dz, x, skip, weight, *needed[:4])
    pairs = ((norm_weight, d_norm_weight), (norm_bias, d_norm_bias))
    d_affine = [None if p is None or d is None else d.to(p.dtype) for p, d in pairs]
    return dx, dskip, dw, db, *d_affine, *[None] * 9


def _statistics_backward(d_mean: Tensor | None, d_var: Tensor | None, z: Tensor, mean: Tensor) -> Tensor | None:
    """The gradient of z from those of its mean and variance (S, G), or None."""
    if d_mean is None and d_var is None:
        return None
    rows, groups = mean.shape
    parts = z.unflatten(1, (groups, -1))
    count = max(z.numel() // max(rows * groups, 1), 1)
    total = torch.zeros_like(parts, dtype=mean.dtype)
    if d_mean is not None:
        total = total + (d_mean / count)[..., None, None, None]
    if d_var is not None:
        total = total + (parts - mean[..., None, None, None]) * (2 * d_var / count)[..., None, None, None]
    return nhwc(total.flatten(1, 2).to(z.dtype))


define(
    "conv_norm(Tensor x, Tensor? skip, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, int pad, "
    "int stride, int groups, bool per_sample, float eps, float slope, bool pool, str process_group, str backend) "
    "-> (Tensor y, Tensor pooled, Tensor z, Tensor mean, Tensor var, Tensor count)",
    torch_impl=_forward,
    triton_impl="norm.forward:forward",
    fake=_fake_forward,
    setup=_setup,
    backward=_differentiate,
)
define(
    "norm_backward(Tensor? dy, Tensor? d_pooled, Tensor z, Tensor? norm_weight, Tensor? norm_bias, Tensor mean, "
    "Tensor var, Tensor count, float eps, float slope, str process_group, str backend) -> (Tensor, Tensor, Tensor)",
    torch_impl=_norm.backward,
    triton_impl="norm.backward:backward",
    fake=_fake_backward,
)


@checked
def conv_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: str = "batch",
    groups: int | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    slope: float = 0.0,
    skip: torch.Tensor | None = None,
    padding: str = "same",
    stride: int = 1,
    pool: bool = False,
    process_group: Any = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Activation of the norm of the 3×3 convolution of ``concat([centre_crop(skip), x], 1)``, and its max-pool.

    With z the convolution: ``u = (z - mean) / sqrt(var + eps) * norm_weight + norm_bias``, ``y = u if u > 0 else
    slope * u``. Mean and biased variance are those of ``nn.BatchNorm2d``, ``nn.InstanceNorm2d`` or ``nn.GroupNorm``,
    summed in float32.

    Args:
        x: (N, C_x, H, W); floating point, fastest in ``channels_last``.
        weight: (C_out, C_skip + C_x, 3, 3), the skip's channels first.
        bias: (C_out,) or None.
        norm: "batch", "instance" or "group".
        groups: of "group", a divisor of C_out.
        norm_weight: (C_out,) of any floating dtype, or None for 1.
        norm_bias: the same, None for 0.
        running_mean: (C_out,), of "batch" only; in training updated in place as ``nn.BatchNorm2d`` does.
        running_var: the same, of the unbiased variance. Both or neither.
        training: False takes "batch" by its running statistics, folded into weight and bias, which need not be given
            otherwise. "instance" and "group" are the same in both.
        momentum: of the running statistics, 0.1 of the new ones in PyTorch's default.
        eps: added to the variance.
        slope: 0 is ReLU, 1 no activation, between them LeakyReLU.
        skip: (N, C_skip, H_s, W_s) with H_s ≥ H and W_s ≥ W, or None.
        padding: "same" (zeros around the image) or "valid".
        stride: 1, or 2 of one source; "valid" convolutions of stride 2 are PyTorch's on every backend.
        pool: also return the 2×2 max-pool (stride 2, odd sides floor).
        process_group: of ``torch.distributed``; "batch" in training then takes the statistics of all its processes, as
            ``nn.SyncBatchNorm`` does. None: of this process alone.
        backend: "auto", "triton" or "torch".

    Returns:
        y (N, C_out, H', W'), or ``(y, pooled)`` with ``pool``; in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, or one value per channel in training.
    """
    pad = check_conv("conv_norm", x, skip, weight, bias, padding)
    check_stride("conv_norm", stride, skip)
    size = x.shape[0], weight.shape[0], *conv_strided.output_size(x, pad, stride)
    parameters = dict(norm_weight=norm_weight, norm_bias=norm_bias, running_mean=running_mean, running_var=running_var)
    running = _check_norm(norm, groups, parameters, x, weight.shape[0], training, process_group)
    slope = check_slope("conv_norm", slope)
    _check_numbers(momentum, eps)
    if pool and min(size[2:]) < 2:
        raise ValueError(f"conv_norm: x has shape {tuple(x.shape)}; its convolution is too small to pool")
    if running and not training:
        weight, bias = folded(weight, bias, norm_weight, norm_bias, *running, eps)
        if pool and skip is None and stride == 1:
            return conv_relu_pool(x, weight, bias, padding=padding, slope=slope, backend=backend)
        y = conv_relu(x, weight, bias, skip=skip, padding=padding, stride=stride, slope=slope, backend=backend)
        return (y, max_pool2d(y, backend=backend)) if pool else y
    groups = groups or weight.shape[0]
    _norm.check_values(norm, size, groups, process_group)
    x, skip, weight, bias = autocast_operands(x, skip, weight, bias)
    check_conv_dtypes("conv_norm", x, skip, weight, bias)
    several = None if process_group is None else "norm statistics over several processes have no kernel"
    backend = select_backend(backend, "conv_norm", x, several or conv_strided.unsupported(stride, pad))
    y, pooled, _, mean, var, total = _OPS.conv_norm(
        x, skip, weight, bias, norm_weight, norm_bias, pad, stride, groups, norm != "batch", float(eps), slope, pool,
        _norm.name_of(process_group), backend,
    )  # fmt: skip
    if running and y.numel() > 0:
        _update(*running, mean, var, total if process_group else size[0] * size[2] * size[3], momentum)
        y = _norm.reached(y)
    return (y, pooled) if pool else y


def folded(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, running_mean: Tensor,
    running_var: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that is a convolution and its batch norm by running statistics."""
    scale = torch.rsqrt(_norm.wide(running_var) + eps)
    if norm_weight is not None:
        scale = scale * norm_weight
    shift = -running_mean * scale if bias is None else (bias - running_mean) * scale
    if norm_bias is not None:
        shift = shift + norm_bias
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


@torch.no_grad()
def _update(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: Tensor | int, momentum: float
) -> None:
    unbiased = var * (count / (count - 1))
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        running.mul_(1 - momentum).add_(new[0].to(running.dtype), alpha=momentum)


def _check_norm(
    norm: str, groups: int | None, parameters: dict[str, Tensor | None], x: Tensor, channels: int, training: bool,
    process_group: Any,
) -> tuple[Tensor, Tensor] | None:
    """The running statistics, both or neither; raises unless the norm's parameters and options belong to it and to
    C_out ``channels``."""
    if norm not in NORMS:
        raise ValueError(f"conv_norm: norm is {norm!r}; expected 'batch', 'instance' or 'group'")
    for name, tensor in parameters.items():
        if tensor is not None and (tuple(tensor.shape) != (channels,) or not tensor.is_floating_point()):
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"conv_norm: {name} must be ({channels},) floating-point numbers, got {got}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"conv_norm: {name} is on {tensor.device}, but x is on {x.device}")
    mean, var = parameters["running_mean"], parameters["running_var"]
    if norm == "group":
        if groups is None or groups < 1 or channels % groups:
            raise ValueError(f"conv_norm: groups is {groups!r}; expected a divisor of the {channels} channels")
    elif groups is not None:
        raise ValueError(f"conv_norm: groups is {groups!r}, which norm='group' alone has, not {norm!r}")
    if norm != "batch" and (mean is not None or var is not None):
        raise ValueError(f"conv_norm: running statistics belong to norm='batch', not to {norm!r}")
    if norm == "batch" and (mean is None or var is None) and not (training and mean is None and var is None):
        raise ValueError("conv_norm: running_mean and running_var are needed, both of them, in evaluation")
    if process_group is not None and norm != "batch":
        raise ValueError(f"conv_norm: a process group sums the statistics of norm='batch', not of {norm!r}")
    return None if mean is None or var is None else (mean, var)


def _check_numbers(momentum: float, eps: float) -> None:
    for name, value, most in (("momentum", momentum, 1.0), ("eps", eps, math.inf)):
        if not (0 <= value <= most and math.isfinite(value)):
            raise ValueError(f"conv_norm: {name} is {value}; expected {'0 to 1' if most == 1 else 'at least 0'}")

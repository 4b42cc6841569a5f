"""A 3×3 convolution and the norm layer behind it as one operator: the layer says which norm, and keeps its state."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastunet.dispatch import select_backend
from fastunet.functional.conv_norm import conv_norm

NORMS = nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm


def layers_are_faster(x: torch.Tensor, backend: str | None = None) -> bool:
    """Norms on a CPU, unless a ``backend`` is asked for: by the operator a training step of the presets with norms took
    1.1 to 1.4 times as long, evaluation 0.9 to 1.2 times (one and two cores, 2×96×96 to 2×128×128). Not of no images,
    which some layers refuse."""
    asked = backend not in (None, "auto")
    return x.device.type == "cpu" and not asked and x.numel() > 0 and select_backend(None, "conv_norm", x) == "torch"


def why_not_norm(norm: Any, channels: int) -> str | None:
    """Why the operator does not take a norm behind a convolution to so many channels, or None."""
    made_for = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features
    if made_for != channels:
        return f"it is made for {made_for} channels, and the convolution gives {channels}"
    if isinstance(norm, nn.InstanceNorm2d) and norm.running_mean is not None:
        return "it keeps running statistics"
    if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm) and norm.momentum is None and norm.running_mean is not None:
        return "its statistics are averages over all steps (momentum=None)"
    return None


def with_norm(operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], norm: Any, *, sync: bool = False,
              **options: Any) -> Any:  # fmt: skip
    """:func:`fastunet.functional.conv_norm` of ``operands`` (x, weight, bias) as a layer of :data:`NORMS` would act.

    Args:
        sync: a batch norm takes the statistics of all processes in training; ``nn.SyncBatchNorm`` does anyway.
        options: ``slope``, ``skip``, ``padding``, ``stride``, ``pool`` and ``backend`` of the operator.

    Raises:
        ValueError: what the operator does not take; running statistics are as before.
    """
    x, weight, bias = operands
    options |= dict(norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.eps)
    if isinstance(norm, nn.GroupNorm):
        return conv_norm(x, weight, bias, norm="group", groups=norm.num_groups, **options)
    if isinstance(norm, nn.InstanceNorm2d):
        return conv_norm(x, weight, bias, norm="instance", **options)
    own = norm.running_mean is None  # no statistics but those of the images
    running = not own and (norm.track_running_stats or not norm.training)
    count = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
    if count is not None:  # first, as the layer does: checkpointing may end its second forward pass in the operator
        count.add_(1)
    try:
        return conv_norm(
            x, weight, bias, norm="batch", **options, training=norm.training or own, momentum=norm.momentum or 0.0,
            running_mean=norm.running_mean if running else None, running_var=norm.running_var if running else None,
            process_group=_processes(norm, sync),
        )  # fmt: skip
    except ValueError:
        if count is not None:
            count.sub_(1)
        raise


def _processes(norm: nn.Module, sync: bool) -> Any:
    """The group of several processes whose statistics a batch norm takes now, or None."""
    if not norm.training or not dist.is_available() or not dist.is_initialized():
        return None
    if not sync and not isinstance(norm, nn.SyncBatchNorm):
        return None
    group = getattr(norm, "process_group", None) or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None

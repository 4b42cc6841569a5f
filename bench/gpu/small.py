"""Every operator once on small ragged and aligned shapes: the program that compute-sanitizer watches."""

from __future__ import annotations

import torch

from fastunet.architecture import Architecture
from fastunet.inspection.layers import Call, Tensor, network_calls, standalone_calls

NETWORKS = (
    (Architecture(width=16, depth=1), (12, 20)),
    (Architecture(width=24, depth=1, in_channels=3, num_classes=5), (10, 14)),
    (Architecture.from_preset("isbi", width=64, depth=1), (28, 36)),
    (Architecture.from_preset("isbi", width=33, depth=1), (28, 28)),
)
DTYPES = (torch.bfloat16, torch.float32)


def small_calls() -> list[Call]:
    """One call of each operator and argument shape of the small networks."""
    found = []
    for network, (height, width) in NETWORKS:
        found += network_calls(network, 2, height, width)
        found += network_calls(network, 2, height, width, training=False, output="labels")
        found += standalone_calls(network, 2, height, width)
    for channels in (16, 33):
        found += norm_calls(channels)
        found += region_calls(channels)
        found += [call for align in (False, True) for call in resampling_calls(channels, align)]
    return list({f"{call.operator} {call.arguments}": call for call in found}.values())


def resampling_calls(channels: int, align_corners: bool) -> list[Call]:
    """The convolution of stride 2, on an image with one odd side, and bilinear upsampling, with their gradients."""
    x, z, large = (Tensor((2, channels, *size)) for size in ((9, 14), (5, 7), (18, 28)))
    weight, bias = Tensor((channels, channels, 3, 3)), Tensor((channels,))
    return [
        Call("down", "conv_strided", dict(x=x, weight=weight, bias=bias, pad=1, slope=0.1), 0),
        Call("down", "conv_strided_data_grad", dict(dz=z, weight=weight, x=x, pad=1), 0),
        Call("down", "conv_strided_weight_grad", dict(dz=z, x=x, pad=1, has_bias=True), 0),
        Call("up", "upsample_bilinear2d", dict(x=x, align_corners=align_corners), 0),
        Call("up", "upsample_bilinear2d_backward", dict(dy=large, align_corners=align_corners), 0),
    ]


def norm_calls(channels: int) -> list[Call]:
    """A convolution with its norm, a group for each channel, and the norm's gradient."""
    x, z, pooled = (Tensor((2, channels, *size)) for size in ((10, 14), (10, 14), (5, 7)))
    weight, vector = Tensor((channels, channels, 3, 3)), Tensor((channels,))
    statistics = Tensor((2, channels), torch.float32)
    affine = dict(norm_weight=vector, norm_bias=vector)
    options = dict(eps=1e-5, slope=0.1)
    forward = dict(x=x, skip=None, weight=weight, bias=vector, **affine, pad=1, stride=1, groups=channels,
                   per_sample=True, **options, pool=True, process_group="")  # fmt: skip
    backward = dict(dy=z, d_pooled=pooled, z=z, **affine, mean=statistics, var=statistics,
                    count=Tensor((0,), torch.float32), **options, process_group="")  # fmt: skip
    return [Call("norm", "conv_norm", forward, 0), Call("norm", "norm_backward", backward, 0)]


def region_calls(regions: int) -> list[Call]:
    """The sums of the loss of overlapping regions of four classes, and their gradient."""
    regions = min(regions, 32)
    read = dict(logits=Tensor((2, regions, 140), pixel_major=True), labels=Tensor((2, 140), torch.uint8, classes=4),
                region_weights=None, members=Tensor((4,), torch.int32, classes=8), ignore_index=None,
                cross_entropy=True)  # fmt: skip
    sums = dict(grad=Tensor((), torch.float32), slopes=Tensor((1, 3 * regions + 3), torch.float32))
    return [Call("loss", "dice_region_sums", read | dict(per_sample=False), 0),
            Call("loss", "dice_region_sums_grad", sums | read, 0)]  # fmt: skip


def main(device: str = "cuda") -> None:
    """Runs them all once."""
    for dtype in DTYPES:
        for call in small_calls():
            call.launcher()(*call.random(dtype, device))
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

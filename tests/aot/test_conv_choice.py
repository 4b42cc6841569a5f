"""Which tile each 3×3 convolution of both networks gets, by predicted time, and what that is by count.

A tile reads "variant channels × images × rows × columns by channels a step", "/" splits.
"""

from __future__ import annotations

import collections
from unittest import mock

import pytest
import torch

from fastunet.inspection.kernel_table import launches
from fastunet.inspection.layers import CASES, network_calls
from fastunet.kernels import _launch
from fastunet.kernels.conv import config as conv_config
from fastunet.kernels.conv import data_grad, forward
from fastunet.kernels.conv.cost import cost, device

pytestmark = [
    pytest.mark.skipif(_launch.INTERPRETED, reason="launches are recorded as they would be compiled"),
    pytest.mark.usefixtures("newest_unless_full"),  # nothing is compiled
]

SECOND_PASSES = "sum_splits_kernel", "fold_taps_kernel", "block_sums_kernel"


def choices(name, batch, architecture, eight_warps=False, gradients=False):
    """(convolution, configuration, seconds without the launch) of each layer, for inference in bfloat16, or of the data
    ``gradients`` of those with a skip."""
    network, (height, width) = CASES[name]
    calls = network_calls(network, batch, height, width, training=gradients, output="labels")
    if gradients:
        calls = [call for call in calls if call.operator == "conv_relu_data_grad" and call.arguments["skip"]]
    choose, found = conv_config.choose_config, []

    def spy(conv, **options):
        config = choose(conv, **options)
        counted = cost(conv, config, **options)
        found.append((conv, config, counted.seconds(device()) - counted.launches * 3e-6))
        return config

    with (_launch.recording(architecture), mock.patch.object(forward, "choose_config", spy),
          mock.patch.object(conv_config, "EIGHT_WARPS", eight_warps)):  # fmt: skip
        for call in calls:
            call.launcher()(*call.allocate(torch.bfloat16))
    return found


def text(config):
    splits = f" /{config.splits}" if config.splits > 1 else ""
    tile = f"{config.block_k}x{config.block_n}x{config.block_h}x{config.block_w}"
    return f"{config.variant} {tile} by {config.block_c}{splits}"


CHOSEN = {
    ("brats 240", 16, 90): [
        "first 32x1x1x128 by 64", "rows 32x1x6x128 by 32", "rows 64x1x6x64 by 32", "rows 64x1x6x64 by 64",
        "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64", "box 128x1x8x16 by 64", "box 128x1x8x16 by 64",
        "box 128x1x8x16 by 64", "box 128x1x8x16 by 64", "box 128x1x8x16 by 64", "box 128x1x8x16 by 64",
        "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64",
        "rows 32x1x6x128 by 32", "rows 32x1x6x128 by 32",
    ],
    ("brats 240", 16, 80): [
        "first 32x1x1x128 by 64", "pointer 32x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
        "pointer 32x1x1x128 by 32", "pointer 32x1x1x128 by 32",
    ],
    ("brats 128", 16, 90): [
        "first 32x1x1x128 by 64", "rows 32x1x6x128 by 32", "rows 64x1x4x64 by 32", "rows 64x1x4x64 by 64",
        "box 128x1x8x16 by 64", "box 128x1x8x16 by 64", "box 128x1x8x16 by 64", "box 128x1x8x16 by 64",
        "box 128x2x8x8 by 64 /3", "box 128x2x8x8 by 64 /7", "box 128x1x8x16 by 64 /7", "box 128x1x8x16 by 64",
        "box 128x1x8x16 by 64", "box 128x1x8x16 by 64", "rows 64x1x4x64 by 64", "rows 64x1x4x64 by 64",
        "rows 32x1x6x128 by 32", "rows 32x1x6x128 by 32",
    ],
    ("brats 128", 16, 80): [
        "first 32x1x1x128 by 64", "pointer 32x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x64 by 32", "pointer 64x1x1x64 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x64 by 32", "pointer 64x1x1x64 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 32x1x1x128 by 32", "pointer 32x1x1x128 by 32",
    ],
    ("isbi 572", 1, 90): [
        "first 64x1x1x128 by 64", "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64",
        "rows 64x1x4x64 by 64", "rows 64x1x4x64 by 64", "box 128x1x8x16 by 64", "rows 64x1x4x64 by 64",
        "box 128x1x8x16 by 64 /7", "box 128x1x4x32 by 64 /7", "rows 64x1x4x64 by 64", "rows 64x1x4x64 by 64",
        "rows 64x1x4x64 by 64", "rows 64x1x4x64 by 64", "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64",
        "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64",
    ],
    ("isbi 572", 1, 80): [
        "first 64x1x1x128 by 64", "pointer 64x1x1x128 by 32", "pointer 128x1x1x128 by 32",
        "pointer 128x1x1x128 by 32", "pointer 128x1x1x128 by 32", "pointer 128x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32", "pointer 64x1x1x64 by 32", "pointer 64x1x1x64 by 32",
        "pointer 128x1x1x128 by 32", "pointer 128x1x1x128 by 32", "pointer 128x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 128x1x1x128 by 32", "pointer 128x1x1x128 by 32",
        "pointer 64x1x1x128 by 32", "pointer 64x1x1x128 by 32",
    ],
}


@pytest.mark.parametrize("name, batch, architecture", CHOSEN, ids=str)
def test_every_layer_keeps_its_tile(name, batch, architecture):
    """With four warps, as Triton before 3.8 needs; a change of the model must show here."""
    assert [text(config) for _, config, _ in choices(name, batch, architecture)] == CHOSEN[name, batch, architecture]


@pytest.mark.parametrize("name, batch, channels, most", [
    ("brats 240", 16, 256, (330, 270)), ("isbi 572", 1, 256, (540, 540)), ("brats 128", 16, 128, (165, 165)),
], ids=str)  # fmt: skip
def test_counted_time_of_the_wide_layers(name, batch, channels, most):
    """Microseconds of the layers of ``channels`` and more on an H100, with tiles of four warps and of up to eight."""
    for eight_warps, limit in zip((False, True), most, strict=True):
        found = choices(name, batch, 90, eight_warps)
        assert sum(seconds for conv, _, seconds in found if conv.c_out >= channels) <= limit * 1e-6


def test_counted_time_of_the_narrow_layers():
    """Microseconds, launches included, of the four layers of 32 channels at 16 × 240² on an H100."""
    found = [seconds + 3e-6 for conv, _, seconds in choices("brats 240", 16, 90) if conv.c_out == 32]
    assert len(found) == 4
    assert sum(found) <= 207e-6


def test_launches_of_a_training_step():
    """One for each convolution and its data gradient, two or three for the weight gradients of a block; joins of small
    maps come in. Second passes over sums of weight gradients read 361 MB."""
    network, size = CASES["brats 240"]
    calls = network_calls(network, 16, *size)
    found = [(call.operator, launch) for call in calls for launch in launches(call, torch.bfloat16, 90)]
    assert len(found) <= 87, collections.Counter(operator for operator, _ in found)
    second = [launch.args for _, launch in found if launch.kernel.__name__ in SECOND_PASSES]
    sums = [arguments.get(name) for arguments in second for name in ("partial_ptr", "partial1_ptr", "up_ptr")]
    assert round(sum(tensor.nbytes for tensor in sums if tensor is not None) / 1e6) == 361


@pytest.mark.parametrize("eight_warps, last, two, one", [
    (False, "box 128x1x8x16 by 64", 371, 331), (True, "box 128x1x16x16 by 64", 343, 303),
])  # fmt: skip
def test_gradients_of_both_sources(eight_warps, last, two, one, monkeypatch):
    """One launch of a decoder whose skip is not cropped; microseconds of all four on an H100, and those of two each."""

    def found():
        calls = choices("brats 240", 16, 90, eight_warps, gradients=True)
        return [text(config) for _, config, _ in calls], 1e6 * sum(seconds + 3e-6 for *_, seconds in calls)

    tiles, microseconds = found()
    assert tiles == ["rows 64x1x6x64 by 32", "rows 64x1x6x64 by 64", "rows 64x1x6x64 by 64", last]
    assert round(microseconds) == one
    monkeypatch.setattr(data_grad, "convolve_two", lambda *args, **options: None)
    tiles, microseconds = found()
    assert (len(tiles), round(microseconds)) == (8, two)

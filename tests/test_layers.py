"""The list of operator calls against one made by hand; ``tests/kernels/test_layers.py`` holds it to launches."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastunet
from fastunet.architecture import Architecture
from fastunet.functional.dice import dice_cross_entropy
from fastunet.functional.dice_confusion import confusion_counts
from fastunet.inspection.layers import CASES, NORM_CASES, Call, Tensor, network_calls, standalone_calls


class Recorder(TorchDispatchMode):
    """Keeps the name and argument shapes of every ``fastunet::`` operator that runs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastunet":
            self.calls.append((function._schema.name.removeprefix("fastunet::"), shapes(args[:-1])))
        return function(*args, **(kwargs or {}))


def shapes(arguments):
    return [tuple(a.shape) if isinstance(a, torch.Tensor | Tensor) else a for a in arguments]


CONV, GRADIENT = "conv_relu", "conv_relu_data_grad"


def test_calls_of_a_small_network_in_order():
    """Depth 1 by hand: the first layer's input needs no gradient, and the weights' gradients of a block come last."""
    calls = network_calls(Architecture(width=8, depth=1), 2, 12, 20, loss=False)
    layers = ["encoders.0.conv1", "encoders.0.conv2", "bottleneck.conv1", "bottleneck.conv2", "decoders.0.up",
              "decoders.0.conv1", "decoders.0.conv2", "head"]  # fmt: skip
    forward = [CONV, "conv_relu_pool", CONV, CONV, "upsample_conv_relu_packing", CONV, CONV,
               "segmentation_head"]  # fmt: skip
    assert [(c.layer, c.operator) for c in calls[:8]] == list(zip(layers, forward))
    expected = {("head", "segmentation_head_backward"), ("encoders.0.conv2", "max_pool2d_backward")}
    expected |= {(layer, GRADIENT) for layer in layers[1:] if "conv" in layer}
    expected |= {("decoders.0.up", f"upsample_{GRADIENT}")}
    expected |= {(block, "block_weight_grads") for block in ("encoders.0", "bottleneck", "decoders.0")}
    assert {(c.layer, c.operator) for c in calls[8:]} == expected
    assert len(calls) == 8 + len(expected)
    first, last = calls[8].arguments, calls[-1].arguments
    assert (shapes(first.values())[:2], shapes(last.values())[:2]) == (
        [(2, 4, 12, 20), (2, 8, 12, 20)], [(2, 8, 12, 20), (2, 2, 12, 20)])  # fmt: skip


@pytest.mark.parametrize("output", ["labels", "probabilities", "regions", "logits"])
@pytest.mark.parametrize("width, classes, depth, fused", [(8, 4, 2, True), (256, 4, 1, False), (8, 33, 1, False),
                                                          (8, 4, 0, False)])  # fmt: skip
def test_inference_ends_in_the_fused_head_where_it_fits(output, width, classes, depth, fused):
    calls = network_calls(Architecture(width=width, num_classes=classes, depth=depth), 1, 16, 16, training=False,
                          output=output)  # fmt: skip
    assert calls[-1].operator == ("conv_relu_head" if fused else "segmentation_head")
    assert calls[-1].arguments["output"] == output
    assert len(calls) == 3 + 5 * depth - fused


@pytest.mark.parametrize("name", [*CASES, *NORM_CASES])
@pytest.mark.parametrize("training", [True, False])
def test_layers_are_named_after_the_parameters(name, training):
    """Of which folded norms make others for inference."""
    architecture, (height, width) = (CASES | NORM_CASES)[name]
    with torch.device("meta"):
        model = fastunet.UNet(**architecture.as_dict())
    names = {name.rpartition(".")[0] for name, weight in model.named_parameters() if weight.dim() == 4}
    calls = network_calls(architecture, 1, height, width, training=training, loss=False)
    fused = calls[-1].operator == "conv_relu_head"
    gradients = {c.layer for c in calls if c.operator == "block_weight_grads"}
    assert gradients == ({name.rpartition(".")[0] for name in names} - {""} if training and name in CASES else set())
    assert {c.layer for c in calls} - gradients == names - ({"head"} if fused else set())


def test_norms_have_their_own_dtype():
    calls = network_calls(Architecture.from_preset("nnunet2d", width=8, depth=1), 2, 16, 16, loss=False)
    normal, backward = calls[0].arguments, next(c for c in calls if c.operator == "norm_backward").arguments
    assert [normal[name].dtype for name in ("x", "weight", "norm_weight")] == [None, None, torch.float32]
    assert [backward[name].dtype for name in ("z", "mean", "var")] == [None, torch.float32, torch.float32]
    assert {c.operator for c in calls} >= {"conv_norm", "conv_strided_data_grad", "conv_strided_weight_grad"}


def test_arithmetic_of_the_isbi_network():
    """The 3×3 convolutions of 572² by hand: Σ 9 · C_in · C_out · H_out · W_out, from the sizes in the paper."""
    down = [(1, 64, 570), (64, 64, 568), (64, 128, 282), (128, 128, 280), (128, 256, 138), (256, 256, 136),
            (256, 512, 66), (512, 512, 64), (512, 1024, 30), (1024, 1024, 28)]  # fmt: skip
    rise = [(1024, 512, 54), (512, 512, 52), (512, 256, 102), (256, 256, 100), (256, 128, 198), (128, 128, 196),
            (128, 64, 390), (64, 64, 388)]  # fmt: skip
    calls = network_calls(CASES["isbi 572"][0], 1, 572, 572)
    assert sum(c.macs for c in calls if c.operator in ("conv_relu", "conv_relu_pool")) == sum(
        9 * c_in * c_out * size**2 for c_in, c_out, size in down + rise
    )


def test_floor_counts_every_tensor_once():
    x, weight = Tensor((2, 8, 5, 4)), Tensor((16, 8, 3, 3))
    call = Call("a", "conv_relu", dict(x=x, skip=None, weight=weight, bias=Tensor((16,)), pad=0, slope=0.0), 0)
    assert call.floor_bytes(torch.float16) == 2 * (2 * 8 * 5 * 4 + 16 * 8 * 9 + 16 + 2 * 16 * 3 * 2)
    unread = dict(dz=Tensor((2, 16, 3, 2)), weight=weight, x=Tensor(x.shape, is_read=False), skip=None, pad=0,
                  mask_x=False, mask_skip=False)
    gradient = Call("a", "conv_relu_data_grad", unread, 0)
    assert gradient.floor_bytes(torch.float32) == 4 * (2 * 16 * 3 * 2 + 16 * 8 * 9 + 2 * 8 * 5 * 4)


def test_loss_calls_are_those_of_the_loss():
    x = torch.zeros(2, 4, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    with Recorder() as recorder:
        dice_cross_entropy(x, torch.zeros(2, 6, 5, dtype=torch.uint8), backend="torch").backward()
    calls = [c for c in network_calls(Architecture(width=8, depth=0), 2, 6, 5) if c.layer == "loss"]
    assert recorder.calls == [(c.operator, shapes(c.arguments.values())) for c in calls]


def test_loss_reads_labels_as_bytes():
    sums, rule, _ = [c for c in network_calls(Architecture(width=8, depth=1), 3, 4, 4) if c.layer == "loss"]
    assert sums.floor_bytes(torch.bfloat16) == 3 * 16 * (4 * 2 + 1) + (3 * 4 + 3) * 4
    assert rule.floor_bytes(torch.bfloat16) == 2 * (3 * 4 + 3) * 4 + 2 * 4


def test_standalone_calls_turn_every_mask_around():
    masks = {(c.operator, c.arguments["mask_x"]) for c in network_calls(Architecture(), 1, 32, 32)
             if "mask_x" in c.arguments}  # fmt: skip
    alone = {(c.operator, c.arguments["mask_x"]) for c in standalone_calls(Architecture(), 1, 32, 32)
             if "mask_x" in c.arguments}  # fmt: skip
    assert {(operator, not mask) for operator, mask in masks} == alone


def test_random_operands_feed_the_reference():
    for call in network_calls(Architecture(width=8, depth=1), 2, 8, 8):
        operands = call.random(torch.float32, "cpu")
        same, exact = call.reference(operands), call.reference(operands, torch.float64)
        assert all(a.dtype == torch.float32 and b.dtype == torch.float64 for a, b in zip(same, exact)), call.operator
        for a, b in zip(same, exact):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


def test_metrics_calls_are_those_of_the_confusion_matrix():
    logits, labels = torch.zeros(2, 4, 6, 5), torch.zeros(2, 6, 5, dtype=torch.uint8)
    with Recorder() as recorder:
        confusion_counts(logits, labels, 4, backend="torch")
        confusion_counts(labels, labels, 4, backend="torch")
    calls = [c for c in standalone_calls(Architecture(width=8, depth=0), 2, 6, 5) if c.layer == "metrics"]
    assert recorder.calls == [(c.operator, shapes(c.arguments.values())) for c in calls]

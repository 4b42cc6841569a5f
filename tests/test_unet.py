"""fastunet.UNet against the plain build: values, every gradient, sizes, dropout, memory, compilation."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import fastunet
from fastunet import UNet, reference
from fastunet.functional.blocks import conv_block, decoder_block, encoder_block
from tests.tolerance import assert_within_budget

NETWORKS = {
    "brats": (dict(width=6), (32, 48)),
    "odd sides": (dict(width=5), (17, 31)),
    "one pixel": (dict(width=5), (1, 1)),
    "isbi": (dict(in_channels=1, num_classes=2, width=6, depth=2, padding="valid", up="transpose"), (60, 76)),
    "same, transpose": (dict(width=4, depth=3, up="transpose"), (24, 16)),
    "valid, upsample": (dict(width=4, depth=1, padding="valid"), (20, 24)),
    "no pooling": (dict(width=4, depth=0), (5, 7)),
}


def pair(dtype=torch.float64, **arguments):
    """The plain and the fast build with the same weights and with biases that are not zero."""
    torch.manual_seed(1)
    plain = reference.UNet(**arguments).to(dtype)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    fast = UNet(**arguments).to(dtype)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_every_gradient_match_the_plain_build(name):
    arguments, size = NETWORKS[name]
    plain, fast = pair(dropout=0.0, **arguments)
    x = torch.randn(2, plain.architecture.in_channels, *size, dtype=torch.float64)
    images = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [model(image) for model, image in zip((plain, fast), images)]
    assert outputs[0].shape[2:] == fast.output_size(*size)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-11, atol=1e-12)
    cotangent = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(cotangent)
    torch.testing.assert_close(images[1].grad, images[0].grad, rtol=1e-10, atol=1e-11)
    for (key, a), b in zip(plain.named_parameters(), fast.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10 * a.grad.abs().max().item(), msg=key)


def test_240_in_float32():
    plain, fast = pair(torch.float32, width=8)
    x = torch.randn(1, 2, 240, 240)
    plain.eval(), fast.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast.predict_proba(x), plain.predict_proba(x), rtol=0, atol=1e-5)
        exact = copy.deepcopy(plain).double()(x.double()).sort(dim=1).values
        decided = (exact[:, -1] - exact[:, -2]) > 1e-4
        assert decided.double().mean() > 0.99
        assert torch.equal(fast.predict(x)[decided], plain.predict(x)[decided])


@pytest.mark.parametrize("build", [reference.UNet, UNet])
def test_a_size_that_does_not_fit_names_the_nearest_that_do(build):
    model = build.from_preset("isbi", width=2)
    with pytest.raises(ValueError, match=r"570×572.*height 570: 556 or 572"):
        model(torch.zeros(1, 1, 570, 572))
    with pytest.raises(ValueError, match=r"height 3: 188 and width 571: 556 or 572"):
        model.output_size(3, 571)
    assert model.output_size(572, 188) == (388, 4)


def test_valid_sizes_are_what_the_layers_give():
    model = reference.UNet(1, 2, 1, 2, "valid", "transpose", 0.0).to("meta")
    fitting = []
    for side in range(1, 100):
        try:
            want = model.output_size(side, side)
        except ValueError:
            continue
        fitting.append(side)
        assert model(torch.empty(1, 1, side, side, device="meta")).shape[2:] == want
    assert fitting == list(range(44, 100, 4))


@pytest.mark.parametrize("build", [reference.UNet, UNet])
def test_dropout_only_in_training_and_only_at_the_bottleneck(build):
    torch.manual_seed(0)
    model = build(width=4, dropout=0.5)
    calls = []
    model.dropout.register_forward_hook(lambda _, x, y: calls.append((x[0], y)))
    x = torch.randn(1, 2, 64, 64)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    for given, dropped in calls:
        assert given.shape == (1, 64, 4, 4)
        kept = dropped != 0
        assert 0.3 < kept[given != 0].double().mean() < 0.7
        torch.testing.assert_close(dropped[kept], 2 * given[kept])
    assert sum(isinstance(m, torch.nn.Dropout) for m in model.modules()) == 1
    model.eval()
    assert torch.equal(model(x), model(x))


def saved_bytes(run) -> int:
    """Bytes of distinct storages that autograd keeps between ``run``'s forward and its backward."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    assert kept.requires_grad
    return sum(storages.values())


def test_saves_at_most_three_quarters_of_the_plain_build():
    x = torch.randn(4, 2, 128, 128)
    plain, fast = reference.UNet(), UNet()
    assert saved_bytes(lambda: fast(x)) <= 0.75 * saved_bytes(lambda: plain(x))


def test_blocks_keep_exactly_what_they_state():
    """In units of one full-resolution image of ``width`` channels; the parameters aside."""
    width, side = 8, 16
    image = 4 * 2 * width * side * side
    x, skip = torch.randn(2, width, side, side, requires_grad=True), torch.randn(2, width, side, side)
    low = torch.randn(2, 2 * width, side // 2, side // 2, requires_grad=True)
    conv, merge = torch.randn(width, width, 3, 3), torch.randn(width, 2 * width, 3, 3)
    up, bias = torch.randn(width, 2 * width, 2, 2), torch.randn(width)
    convs = 4 * (conv.numel() + conv.numel() + bias.numel())
    kept = saved_bytes(lambda: encoder_block(x, conv, bias, conv.clone(), bias)[1])
    assert kept == 3 * image + convs
    assert saved_bytes(lambda: conv_block(x, conv, bias, conv.clone(), bias)) == 3 * image + convs
    assert saved_bytes(lambda: conv_block(x, conv, bias, conv.clone(), bias, grad_masked=True)) == 2 * image + convs
    decoder = [low, skip, up, bias, merge, bias, conv, bias]
    weights = 4 * (up.numel() + merge.numel() + conv.numel() + bias.numel())
    assert saved_bytes(lambda: decoder_block(*decoder, up="upsample")) == image // 2 + 4 * image + weights
    kept = saved_bytes(lambda: decoder_block(*decoder, up="upsample", grad_masked=True))
    assert kept == image // 2 + 3 * image + weights


def test_activation_checkpointing_gives_the_same_gradients_for_less_memory():
    torch.manual_seed(0)
    model = UNet(width=8, depth=2, dropout=0.5)
    x = torch.randn(2, 2, 32, 32)
    gradients, kept = [], []
    for setting in (False, True):
        model.activation_checkpointing = setting
        kept.append(saved_bytes(lambda: model(x)))
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.65 * kept[0]


def test_compiles_whole():
    """For training; tests/test_exports.py compiles the other style."""
    model = UNet(width=4, depth=1, padding="valid", up="transpose", dropout=0.0)
    x = torch.randn(1, 2, 20, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for a, b in zip(grads, model.parameters()):
        torch.testing.assert_close(a, b.grad)


def test_autocast_matches_the_plain_build_in_bfloat16():
    plain, fast = pair(torch.float32, width=4, depth=2, dropout=0.0)
    x = torch.randn(1, 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(x), fast(x)
    assert a.dtype == b.dtype == torch.bfloat16
    exact = copy.deepcopy(plain).double()(x.double())
    assert_within_budget(b, a, exact, "logits")
    b.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in fast.parameters())


def test_strided_and_empty_batches():
    _, fast = pair(torch.float32, width=4, depth=2)
    fast.eval()
    x = torch.randn(3, 2, 20, 24)
    with torch.no_grad():
        want = fast(x)
        torch.testing.assert_close(fast(x.contiguous(memory_format=torch.channels_last)), want)
        torch.testing.assert_close(fast(torch.stack([x, x], -1)[..., 0]), want)
        assert fast(x[:0]).shape == (0, 4, 20, 24)
        assert fast.predict(x[:0]).shape == (0, 20, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(width=0), "width is 0"),
        (dict(padding="reflect"), "padding is 'reflect'"),
        (dict(up="bilinear"), "up is 'bilinear'"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(backend="cudnn"), "backend is 'cudnn'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


def test_wrong_images_are_named():
    model = UNet(width=4, depth=1)
    with pytest.raises(ValueError, match=r"\(N, 2, H, W\), got \(1, 3, 8, 8\)"):
        model(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="float64"):
        model(torch.zeros(1, 2, 8, 8, dtype=torch.float64))


def test_public_names():
    assert set(fastunet.__all__) >= {"UNet", "functional", "reference", "losses", "metrics", "data"}
    for name in fastunet.__all__:
        assert getattr(fastunet, name) is not None


def test_import_and_help_need_no_triton_no_device_and_nothing_heavy():
    """In a fresh process where importing Triton fails and any CUDA initialisation would raise."""
    script = """
import sys
import torch
sys.modules["triton"] = None
def touched(*_): raise AssertionError("import touched a device")
torch.cuda._lazy_init = torch.cuda.is_available = touched
import fastunet
slow = {"nibabel", "matplotlib", "PIL", "msgspec", "safetensors.torch", "fastunet.data"} & set(sys.modules)
assert not slow, slow
import fastunet.cli
try: fastunet.cli.main(["--help"])
except SystemExit: pass
slow = {"nibabel", "matplotlib", "PIL", "safetensors"} & set(sys.modules)
assert not slow, slow
model = fastunet.UNet(width=2, depth=1)
model(torch.zeros(1, 2, 4, 4))
assert not any(name.startswith("fastunet.kernels") for name in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_operators_are_exactly_the_documented_ones():
    assert sorted(fastunet.functional.__all__) == [
        "confusion_matrix",
        "conv_norm",
        "conv_relu",
        "conv_relu_pool",
        "conv_transpose2d",
        "dice_coefficient",
        "dice_cross_entropy",
        "dice_loss",
        "max_pool2d",
        "region_dice_cross_entropy",
        "segmentation_head",
        "upsample_bilinear2d",
        "upsample_conv_relu",
    ]

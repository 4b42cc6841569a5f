"""The frozen network: the model's results, and no stale weights whatever changes."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastunet import UNet
from fastunet.functional import _upsample_products, _winograd
from tests.fuse_results import randomised

NETWORKS = {
    "brats": (dict(width=6, depth=2), (17, 30)),
    "isbi": (dict(in_channels=1, num_classes=3, width=6, depth=2, padding="valid", up="transpose"), (60, 76)),
    "no pooling": (dict(width=4, depth=0), (5, 7)),
    "batch norm": (dict(width=6, depth=2, norm="batch", bias=False, activation="leaky_relu", odd="zeros"), (17, 30)),
    "instance norm": (dict(width=6, depth=2, norm="instance", activation="leaky_relu", down="stride"), (17, 30)),
    "group norm": (dict(width=6, depth=2, norm="group", groups=3, bias=False, up="transpose"), (17, 30)),
}


def build(name: str = "brats"):
    arguments, size = NETWORKS[name]
    torch.manual_seed(0)
    model = randomised(UNet(**arguments).eval())
    return model, model.freeze(), torch.randn(2, model.architecture.in_channels, *size)


@pytest.fixture(params=["oneDNN", "fewer products"])
def algorithm(request, monkeypatch):
    """Of all convolutions, which are too small here to leave them to the second otherwise."""
    if request.param != "oneDNN":
        for module in (_winograd, _upsample_products):
            monkeypatch.setattr(module, "LEAST_CHANNELS_IN", 1)
            monkeypatch.setattr(module, "LEAST_CHANNELS_OUT", 1)
        monkeypatch.setattr(_winograd, "LEAST_PIXELS", 1)


def assert_same(model, frozen, x):
    with torch.no_grad():
        expected = model(x)
        rounding = 64 * torch.finfo(x.dtype).eps * expected.abs().max().item()  # of few layers of few channels
        torch.testing.assert_close(frozen(x), expected, rtol=0, atol=rounding)
        torch.testing.assert_close(frozen.predict_proba(x), model.predict_proba(x), rtol=0, atol=1e-5)
        assert (frozen.predict(x) == model.predict(x)).double().mean() > 0.999


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", NETWORKS)
def test_gives_the_model_s_results_for_every_shape(name):
    model, frozen, x = build(name)
    assert_same(model, frozen, x)
    assert frozen._graphs
    assert_same(model, frozen, x[:1])
    assert_same(model, frozen, torch.cat([x, x], 3) if name != "isbi" else torch.randn(1, 1, 44, 64))
    assert frozen(x[:0]).shape == model(x[:0]).shape


def test_shapes_and_threads_have_their_own_packed_weights():
    """oneDNN chooses layouts for each; a conversion in each call may take longer than the convolution."""
    _, frozen, x = build()
    threads = torch.get_num_threads()
    first = frozen(x)
    (packed,) = frozen._graphs.values()
    frozen(x[:1])
    assert next(iter(frozen._graphs.values())) is packed
    assert torch.equal(frozen(x), first)
    try:
        torch.set_num_threads(threads + 1)
        frozen(x)
    finally:
        torch.set_num_threads(threads)
    assert len(frozen._graphs) == 2
    assert torch.equal(frozen(x), first)


def test_notices_changed_parameters():
    model, frozen, x = build()
    before = frozen(x)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimiser.step()
    assert_same(model, frozen, x)
    assert not torch.allclose(frozen(x), before)
    model.load_state_dict(UNet(**NETWORKS["brats"][0]).state_dict())
    assert_same(model, frozen, x)
    model.head.weight.data = torch.randn_like(model.head.weight)
    assert_same(model, frozen, x)
    model.head.weight.data.mul_(3)
    frozen.refresh()
    assert_same(model, frozen, x)


OPTIMISERS = {
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "foreach Adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
}


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_follows_every_optimiser(name, made):
    """Fused steps write parameters without telling autograd."""
    model, _, x = build()
    optimiser = OPTIMISERS[name](model.parameters()) if made == "before" else None
    frozen = model.freeze()
    optimiser = optimiser or OPTIMISERS[name](model.parameters())
    before = frozen(x)
    scaler = torch.amp.GradScaler("cpu", enabled=name == "fused Adam")
    for _ in range(2):

        def closure():
            optimiser.zero_grad()
            loss = model(x).square().mean()
            scaler.scale(loss).backward()
            return loss

        closure()
        if name == "LBFGS":
            optimiser.step(closure)
        else:
            scaler.step(optimiser)
            scaler.update()
        assert_same(model, frozen, x)
    assert not torch.allclose(frozen(x), before)


def test_follows_replaced_and_parametrised_weights():
    model, frozen, x = build()
    frozen(x)
    for _ in range(6):  # an allocator hands out the same few addresses
        model.head.weight.data = torch.randn_like(model.head.weight)
        assert_same(model, frozen, x)
    torch.utils.swap_tensors(model.head.weight, torch.nn.Parameter(torch.randn_like(model.head.weight)))
    assert_same(model, frozen, x)
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}, assign=True)
    assert_same(model, frozen, x)
    torch.nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())) / 9, model.parameters())
    assert_same(model, frozen, x)
    torch.nn.utils.parametrizations.weight_norm(model.bottleneck.conv1)
    assert_same(model, frozen, x)
    with torch.no_grad():
        model.bottleneck.conv1.parametrizations.weight.original0.mul_(2)
    assert_same(model, frozen, x)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first", ["inference", "plain"])
def test_inference_mode_and_plain_calls_mix(first, dtype):
    model, frozen, x = build()
    modes = [torch.inference_mode, torch.no_grad]
    for mode in modes if first == "inference" else modes[::-1]:
        for images in (x, x.clone()):
            with mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
                got, want = frozen(images), model(images)
            torch.testing.assert_close(got.float(), want.float(), rtol=1e-4, atol=1e-4 if dtype is None else 0.05)
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert_same(model, frozen, x)


def test_a_model_made_in_inference_mode_works():
    with torch.inference_mode():
        model = UNet(width=4, depth=1).eval()
        x = torch.randn(1, 2, 8, 8)
        assert_same(model, model.freeze(), x)


def test_threads_get_their_own_results():
    model, frozen, _ = build()
    images = [torch.randn(1, 2, 16 + 2 * (i % 3), 20) for i in range(24)]
    with torch.no_grad():
        expected = [model(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(frozen, images), expected):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_prepare_their_own():
    model, frozen, x = build()
    frozen(x)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert twin.model is not model
        with torch.no_grad():
            model.head.weight.mul_(1.5)
            assert not torch.allclose(twin(x), frozen(x))
        assert_same(twin.model, twin, x)


def test_other_dtypes_and_autocast_run_the_model():
    model, frozen, x = build()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for _ in range(2):
            assert torch.equal(frozen(x), model(x))
            assert torch.equal(frozen.predict(x), model.predict(x))
            model.head.weight.mul_(2)  # the copy that was cast must not outlive it
    model.double()
    with torch.no_grad():
        assert torch.equal(frozen(x.double()), model(x.double()))


@pytest.mark.usefixtures("algorithm")
def test_keeps_nan():
    _, frozen, x = build()
    x[0, 0, 3, 4] = float("nan")
    assert frozen(x)[0].isnan().any()
    assert not frozen(x)[1].isnan().any()


@pytest.mark.usefixtures("algorithm")
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("harm", ["image inf", "image 1e38", "weights 1e30", "weight inf", "weight NaN", "bias NaN"])
def test_what_is_not_finite_stays_so(name, harm):
    """A fused ReLU would turn the NaN of an overflow into 0, and so a ruined network into a confident one."""
    model, frozen, x = build(name)
    where, _, value = harm.partition(" ")
    with torch.no_grad():
        if where == "image":
            x[0, 0, 3, 4], x[0, 0, 4, 6] = float(value), -float(value)
            x *= 4
        elif where == "weights":
            for layer in [model.bottleneck.conv1, model.bottleneck.conv2]:
                layer.weight.mul_(float(value))
        else:
            layer = model.bottleneck.conv1
            bias = model.bottleneck.norm1.bias if layer.bias is None else layer.bias
            (bias[:1] if where == "bias" else layer.weight[0, 0, 0, :1]).fill_(float(value))
        expected, got = model(x), frozen(x)
    assert frozen._graphs
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    if (name, where) != ("instance norm", "weights"):  # whose layers leave the bias where the variance is infinite
        assert not expected.isfinite().all(), "the case must harm something"
    ordinary = expected.abs() < 1e6
    torch.testing.assert_close(got[ordinary], expected[ordinary], rtol=1e-4, atol=1e-4)


def test_refuses_training_mode_and_wrong_images():
    model, frozen, x = build()
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 2, H, W\)"):
        frozen(x[:, :1])
    model.train()
    with pytest.raises(RuntimeError, match="evaluation mode"):
        frozen(x)
    with pytest.raises(ValueError, match="graphs is 0"):
        model.freeze(graphs=0)

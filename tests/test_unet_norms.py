"""``fastunet.UNet`` with norms, LeakyReLU and strides against the plain build."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastunet import UNet, reference
from fastunet.errors import UserError
from fastunet.interop import save_keras_weights
from fastunet.interop.onnx import _Spelled
from fastunet.pictures.summary import layers
from fastunet.training.config import TrainConfig
from fastunet.training.plan import architecture_of
from tests.fuse_results import randomised, same
from tests.test_layers import Recorder
from tests.tolerance import assert_within_budget

SMALL = dict(in_channels=1, num_classes=3, width=4, depth=2, dropout=0.0)
STYLES = {
    "batch": dict(norm="batch"),
    "batch, LeakyReLU": dict(norm="batch", activation="leaky_relu", slope=0.2),
    "instance": dict(norm="instance", activation="leaky_relu"),
    "group": dict(norm="group", groups=2),
    "LeakyReLU": dict(activation="leaky_relu", slope=0.3),
    "without bias": dict(bias=False),
    "batch without bias": dict(norm="batch", bias=False),
    "stride": dict(down="stride"),
    "instance, stride": dict(norm="instance", down="stride", up="transpose"),
    "features": dict(features=(4, 4, 6)),
    "zeros": dict(odd="zeros", norm="batch", up="transpose"),
    "replicate": dict(odd="replicate", features=(4, 6, 6)),
    "valid": dict(norm="group", groups=4, padding="valid", up="transpose"),
    "valid, LeakyReLU": dict(activation="leaky_relu", padding="valid"),
}


def builds(style, training=True, dtype=torch.float64, backend="torch"):
    torch.manual_seed(0)
    plain = randomised(reference.UNet(**SMALL | style).to(dtype)).train(training)
    model = UNet(**SMALL | style, backend=backend).to(dtype).train(training)
    model.load_state_dict(plain.state_dict())
    sides = (44, 60) if style.get("padding") == "valid" else (13, 18)
    return model, plain, torch.randn(2, 1, *sides, dtype=dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("style", STYLES)
def test_results_are_those_of_the_plain_build(style, training):
    model, plain, x = builds(STYLES[style], training)
    assert list(model.state_dict()) == list(plain.state_dict())
    same(model, plain, x)
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(model.predict_proba(x), plain.predict_proba(x))
            assert torch.equal(model.predict(x), plain.predict(x))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("style", ["batch", "instance, stride", "zeros"])
def test_norms_run_through_their_layers_on_a_cpu(style, training):
    """As fast as the plain build, of which nothing is to be told; operators run where they are asked for."""
    model, plain, x = builds(STYLES[style], training, backend="auto")
    same(model, plain, x)
    assert not model.why_not_fused()
    for backend in ("auto", "torch"):
        model.backend = backend
        with Recorder() as operators:
            model(x)
        assert bool(operators.calls) == (backend == "torch")


@pytest.mark.parametrize("processor", ["AVX2", "AVX512"])
def test_instance_norm_is_fastest_in_contiguous_memory_on_a_cpu(monkeypatch, processor):
    """With AVX2 alone all norms are, whose layers have oneDNN's weight gradients."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    model = UNet(**SMALL, norm="instance")
    assert (model.fastest_format(cpu), model.fastest_format(cuda)) == (torch.contiguous_format, torch.channels_last)
    model.sync_norms = True  # which takes operators
    assert model.fastest_format(cpu) == UNet(**SMALL).fastest_format(cpu) == torch.channels_last
    batch = UNet(**SMALL, norm="batch").fastest_format(cpu)
    assert batch == (torch.contiguous_format if processor == "AVX2" else torch.channels_last)


@pytest.mark.parametrize("style", ["batch", "instance, stride", "zeros", "LeakyReLU"])
def test_a_touched_block_runs_through_its_layers(style):
    model, plain, x = builds(STYLES[style])
    for each in (model, plain):
        each.encoders[1].conv2.register_forward_hook(lambda m, i, y: 2 * y)
        if hasattr(each.bottleneck, "norm1"):
            each.bottleneck.norm1.eps = 0.5
    with pytest.warns(UserWarning, match=r"encoders\.1 of fastunet\.UNet runs through its modules"):
        same(model, plain, x)
    names = ["encoders.1", "bottleneck"] if hasattr(plain.bottleneck, "norm1") else ["encoders.1"]
    assert [*model.why_not_fused()] == names


@pytest.mark.parametrize("style", ["batch", "instance, stride", "replicate", "LeakyReLU", "valid"])
def test_a_frozen_network_is_right_and_follows_its_statistics(style):
    model, plain, x = builds(STYLES[style], False, torch.float32)
    frozen = model.freeze()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-5)
            assert (frozen.predict(x) == plain.predict(x)).float().mean() > 0.999
            exact = copy.deepcopy(plain).double()(x.double())
            with torch.autocast("cpu", torch.bfloat16):
                assert_within_budget(frozen(x), plain(x), exact, style)
        for each in (model, plain):
            each.train()(3 * x)
            each.eval()


def test_networks_copy_and_configs_rebuild_them():
    model, plain, x = builds(STYLES["replicate"])
    same(copy.deepcopy(model), plain, x)
    same(pickle.loads(pickle.dumps(model)), plain, x)
    again = UNet(**model.config)
    assert again.architecture == model.architecture
    assert model.config["features"] == (4, 6, 6)


def test_configs_of_networks_without_norms_are_what_they_were():
    assert list(UNet(width=2, depth=1).config) == [
        "in_channels", "num_classes", "width", "depth", "padding", "up", "dropout",
    ]  # fmt: skip


def test_checkpointing_refuses_to_count_batches_twice():
    model, plain, x = builds(STYLES["batch"])
    model.activation_checkpointing = True
    with pytest.raises(ValueError, match="count each batch twice"):
        model(x)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    model, plain, x = builds(STYLES["group"])
    model.activation_checkpointing = True
    same(model, plain, x)


def test_it_compiles_as_a_whole():
    model, plain, x = builds(STYLES["zeros"] | dict(depth=1), False, torch.float32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("wrong", "said"), [
    (dict(norm="layer"), "norm is 'layer'"),
    (dict(activation="gelu"), "activation is 'gelu'"),
    (dict(slope=0.0), r"slope is 0\.0"),
    (dict(norm="group", groups=3), "groups is 3"),
    (dict(features=(32, 64)), r"features is \(32, 64\); expected 5 numbers"),
    (dict(features=(16, 32, 64, 128, 256)), "features begins with 16; expected width"),
    (dict(down="stride", padding="valid"), "down is 'stride'"),
    (dict(odd="zeros", padding="valid"), "odd is 'zeros'"),
    (dict(nonsense=1), "nonsense"),
])  # fmt: skip
def test_wrong_styles_are_named(wrong, said):
    with pytest.raises((ValueError, TypeError), match=said):
        UNet(**wrong)


def test_images_too_small_for_odd_sizes_are_named():
    with pytest.raises(ValueError, match=r"both sides must be at least 4 for 2 poolings"):
        UNet(**SMALL, odd="zeros")(torch.zeros(1, 1, 3, 9))


def test_training_options_reach_the_network():
    def asked(**options):
        return architecture_of(TrainConfig(data="x", **options))

    assert asked(norm="batch", activation="leaky_relu").norm == "batch"
    assert asked(preset="milesial").norm == "batch"
    assert asked(preset="milesial", norm="none").norm is None
    with pytest.raises(UserError, match="groups is 8"):
        asked(norm="group", width=4)


@pytest.mark.parametrize(("preset", "size"), [("milesial", 50), ("monai_basic", 37), ("nnunet2d", 50)])
def test_summaries_count_every_parameter_and_show_the_sizes(preset, size):
    with torch.device("meta"):
        model = reference.UNet.from_preset(preset, width=4, depth=3)
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, i, y, name=name: seen.update({name: tuple(y.shape[1:])}))
    model(torch.empty(1, model.architecture.in_channels, size, size, device="meta"))
    rows = layers(model, size, size)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert {row.name: row.shape for row in rows if row.name in seen} == seen


@pytest.mark.parametrize("suffix", [".keras", ".weights.h5"])
def test_keras_files_are_refused_for_norms(suffix, tmp_path):
    pytest.importorskip("h5py", reason="h5py is not installed")
    with pytest.raises(ValueError, match=r"norms|pooling alone"):
        save_keras_weights(UNet(**SMALL, norm="batch"), tmp_path / f"m{suffix}")
    assert not list(tmp_path.iterdir())


class Checkpointed(nn.Module):
    def __init__(self, module, reentrant):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("part", [lambda m: m.encoders[0], lambda m: m], ids=["block", "network"])
def test_checkpointing_counts_batches_as_the_plain_build_does(part, reentrant):
    model, plain, x = builds(STYLES["batch"])
    same(*(Checkpointed(part(each), reentrant) for each in (model, plain)), x)


@pytest.mark.parametrize("norm", [
    nn.GroupNorm(2, 6, eps=0.1), nn.GroupNorm(3, 6, affine=False), nn.InstanceNorm2d(6),
    nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(),
])  # fmt: skip
def test_norms_are_spelled_for_onnx_as_they_are(norm):
    norm = randomised(norm.double())
    x = 3 + torch.randn(2, 6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(_Spelled(norm)(x), norm(x))

"""ONNX files of both networks against the model, in ONNX Runtime, at sizes that were not exported."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import fastunet
from fastunet import UNet
from tests.fuse_nets import Plain

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'fastunet[rivals]')")
onnx = pytest.importorskip("onnx", reason="onnx is not installed (pip install 'fastunet[onnx]')")

ISBI = dict(in_channels=1, num_classes=2, width=4, depth=1, padding="valid", up="transpose")


def exported(model, path):
    fastunet.to_onnx(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"images": x.numpy()})[0]


def agree(model, run, shape):
    x = torch.randn(shape)
    with torch.no_grad():
        want = model.eval()(x).numpy()
    got = run(x)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 1e-5 * max(1, np.abs(want).max())


def test_same_takes_every_size(tmp_path):
    torch.manual_seed(0)
    model = UNet(width=4, depth=1, norm="batch")
    model(torch.randn(4, 2, 16, 16))  # for running statistics
    run = exported(model, tmp_path / "m.onnx")
    for shape in ((2, 2, 28, 36), (1, 2, 17, 30), (3, 2, 1, 5), (1, 2, 40, 40)):
        agree(model, run, shape)
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}


def test_the_model_is_left_alone_and_what_hangs_on_it_goes_along(tmp_path):
    """With "valid", which takes the sizes that fit."""
    torch.manual_seed(0)
    model = UNet(**ISBI).train()
    model.dropout = torch.nn.BatchNorm2d(8)
    model.bottleneck.conv1 = torch.nn.Sequential(model.bottleneck.conv1, torch.nn.Tanh())
    with pytest.warns(UserWarning, match="bottleneck"):
        model(torch.randn(2, 1, 28, 36))
    run = exported(model, tmp_path / "m.onnx")
    assert model.training
    assert model.why_not_fused().keys() == {"bottleneck", "dropout"}
    for side in (44, 60, 76):
        agree(model, run, (2, 1, side, 92))


@pytest.mark.parametrize("wrong", [torch.nn.Conv2d(1, 1, 1), None, "model.pt"])
def test_what_is_no_u_net_is_refused(wrong, tmp_path):
    with pytest.raises(TypeError, match=r"to_onnx: model is .*; expected reference\.UNet"):
        fastunet.to_onnx(wrong, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("change", [
    lambda m: m.register_forward_hook(lambda module, x, y: 2 * y),
    lambda m: m.register_forward_pre_hook(lambda module, x: (x[0] + 1,)),
    lambda m: setattr(m, "forward", lambda x: x),
    lambda m: setattr(m, "__class__", type("Mine", (UNet,), {"forward": lambda self, x: x})),
], ids=["hook", "pre-hook", "patched", "subclass"])  # fmt: skip
def test_what_hangs_on_the_whole_model_is_refused_not_lost(change, tmp_path):
    model = UNet(width=4, depth=1)
    change(model)
    with pytest.raises(ValueError, match="take off its own hooks"):
        fastunet.to_onnx(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_what_fuse_returns_is_exported_by_pytorch_as_the_original_is(tmp_path):
    net = Plain().eval()
    fused, path, x = fastunet.fuse(net)[0], tmp_path / "fused.onnx", torch.randn(2, 1, 12, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fused, (x,), path, dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(x).detach(), rtol=1e-4, atol=1e-5)

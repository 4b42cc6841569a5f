"""The frozen network in OpenVINO: the model's results, what it is not for, and what the user is told then.

Each network and each shape takes OpenVINO a second to compile, so they are few.
"""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch

from fastunet import UNet
from tests.tolerance import assert_within_budget

NETWORKS = {
    "brats": (dict(width=4, depth=2), (17, 30)),
    "batch norm": (dict(width=4, depth=1, norm="batch", bias=False, padding="valid", up="transpose"), (20, 24)),
    "instance norm": (dict(width=4, depth=1, norm="instance", activation="leaky_relu", down="stride"), (8, 12)),
    "group norm": (dict(width=4, depth=1, norm="group", groups=2, odd="zeros"), (7, 11)),
}


def build(name: str):
    pytest.importorskip("openvino", reason="openvino is not installed (pip install 'fastunet[openvino]')")
    arguments, size = NETWORKS[name]
    torch.manual_seed(0)
    model = UNet(**arguments).eval()
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5)
    return model, model.freeze(graphs=1, engine="openvino"), torch.randn(2, 2, *size)


@torch.no_grad()
def assert_same(model, frozen, x):
    assert_within_budget(frozen(x), model(x), copy.deepcopy(model).double()(x.double()))


@pytest.fixture(scope="module")
def brats():
    """A network, its frozen form that is called by these tests with one shape only, and images."""
    return build("brats")


@pytest.mark.parametrize("name", NETWORKS)
def test_gives_the_model_s_results(name, brats):
    model, frozen, x = brats if name == "brats" else build(name)
    state = torch.get_rng_state()
    assert_same(model, frozen, x)
    (network,) = frozen._graphs.values()
    assert network.within(x)
    if name == "instance norm":  # an operation each, and no dozen of sums and products
        operations = network.request.get_compiled_model().get_runtime_model().get_ops()
        kinds = [operation.get_rt_info()["layerType"].astype(str) for operation in operations]
        assert "Reduce" not in kinds
        for refusing in (model, frozen):
            with pytest.raises(ValueError, match="more than 1 spatial element"):
                refusing(x[..., :2, :2])
    torch.testing.assert_close(frozen.predict_proba(x), model.predict_proba(x), rtol=0, atol=1e-5)
    assert (frozen.predict(x) == model.predict(x)).double().mean() > 0.99
    assert frozen(x[:0]).shape == model(x[:0]).shape
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_what_is_not_finite_stays_so(value, brats):
    """OpenVINO's ReLU turns NaN into 0."""
    model, frozen, x = brats
    x = x.clone()
    x[0, 0, 3, 4], x[0, 0, 4, 6] = value, -value
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(frozen(x).isfinite(), expected.isfinite())
    assert not expected.isfinite().all(), "the case must harm something"


def test_what_hangs_on_a_layer_runs(brats):
    model, frozen, x = brats
    hook = model.bottleneck.conv1.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.warns(UserWarning, match="bottleneck of fastunet.UNet runs through its modules"):
        assert_same(model, frozen, x)
    hook.remove()


def test_refuses_what_it_is_not_for(brats):
    _, frozen, x = brats
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="outside of autocast"):
        frozen(x)
    for wrong, said in ((dict(dtype=torch.float64), r"torch\.float64 on cpu"), (dict(device="meta"), "32 on meta")):
        with pytest.raises(ValueError, match=f"float32 on a CPU; the images are .*{said}"):
            copy.deepcopy(frozen).to(**wrong)(x.to(**wrong))


def test_a_pickle_keeps_the_engine(brats):
    twin = pickle.loads(pickle.dumps(brats[1]))
    assert (twin.engine, len(twin._graphs)) == ("openvino", 0)


def test_another_engine_is_refused_by_name():
    with pytest.raises(ValueError, match="engine is 'tensorrt'; expected one of fastunet, openvino"):
        UNet(width=2, depth=1).freeze(engine="tensorrt")


def test_without_openvino_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"^engine='openvino' needs openvino: pip install 'fastunet\[openvino\]'$"):
        UNet(width=2, depth=1).freeze(engine="openvino")


def test_follows_weights_and_shapes(brats, monkeypatch):
    """The last test, for it leaves another shape compiled and a weight that is not finite."""
    model, frozen, x = brats
    monkeypatch.setattr("openvino_telemetry.Telemetry", None)  # nobody is told of a conversion
    monkeypatch.setattr("openvino.Core", None)  # one is enough, and of two, signals may find the memory of one gone
    with torch.inference_mode():
        assert_same(model, frozen, x.clone())
    assert_same(model, frozen, x[:1].clone().requires_grad_().to(memory_format=torch.channels_last))
    assert len(frozen._graphs) == 1
    with torch.no_grad():
        model.bottleneck.conv1.weight[0, 0, 0, 0] = float("nan")
        assert frozen(x[:1]).isnan().all()

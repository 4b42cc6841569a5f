"""Weights of Keras and of PyTorch checkpoints, in and out, against the real thing."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import fastunet
from fastunet import UNet, reference
from fastunet.errors import UserError
from fastunet.interop import (
    from_pretrained,
    load_keras_weights,
    load_torch_weights,
    save_keras_weights,
    save_pretrained,
)
from tests.test_reference import keras_build

SMALL = dict(width=4, depth=2)


def randomised(build=UNet, seed=0, **arguments):
    """A network whose biases are not zero, so that a lost bias shows."""
    torch.manual_seed(seed)
    model = build(**arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.1)
    return model


def small_keras(name=lambda count: None):
    """A Keras network of width 4, depth 2, its convolutions called ``name(0)``, ``name(1)``, …"""
    os.environ["KERAS_BACKEND"] = "torch"
    keras = pytest.importorskip("keras", reason="Keras is not installed (pip install 'fastunet[rivals]')")
    layers, counter = keras.layers, iter(range(100))

    def conv(x, filters, side=3, activation="relu"):
        return layers.Conv2D(filters, side, activation=activation, padding="same", name=name(next(counter)))(x)

    x = inputs = keras.Input((None, None, 2))
    skips = []
    for filters in (4, 8):
        skips.append(conv(conv(x, filters), filters))
        x = layers.MaxPooling2D()(skips[-1])
    x = conv(conv(x, 16), 16)
    for filters in (8, 4):
        x = layers.concatenate([skips.pop(), conv(layers.UpSampling2D()(x), filters, 2)])
        x = conv(conv(x, filters), filters)
    model = keras.Model(inputs, conv(x, 4, 1, "softmax"))
    rng = np.random.default_rng(1)
    values = [rng.normal(size=w.shape) / np.sqrt(w[..., 0].size) for w in model.get_weights()]
    model.set_weights([value.astype(np.float32) for value in values])
    return model


def agree(model, keras_model, size=(24, 16)):
    images = np.random.default_rng(0).normal(size=(2, *size, 2)).astype(np.float32)
    ours = model.predict_proba(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - keras_model.predict(images, verbose=0)).max() <= 1e-5


NAMES = {
    "as Keras numbers them": lambda i: None,
    "backwards": lambda i: f"z{99 - i}",
    "words": lambda i: f"block_{'abcdefghijklmnopqrstuvwxyz'[25 - i]}_conv" if i % 2 else f"c{i * 7 % 13}_{i}",
}


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("file", ["w.weights.h5", "m.h5", "m.keras"])
def test_keras_files_load_under_any_layer_names(tmp_path, file, names):
    source = small_keras(NAMES[names])
    (source.save_weights if "weights" in file else source.save)(tmp_path / file)
    model = UNet(**SMALL).eval()
    load_keras_weights(model, tmp_path / file)
    agree(model, source)


def test_the_source_model_loads(tmp_path):
    source = keras_build((32, 32))
    source.save(tmp_path / "brats.keras")
    model = UNet().eval()
    load_keras_weights(model, tmp_path / "brats.keras")
    agree(model, source, (32, 32))


@pytest.mark.parametrize("file", ["w.weights.h5", "w.h5"])
def test_keras_reads_what_we_write(tmp_path, file):
    model, target = randomised(**SMALL), small_keras()
    save_keras_weights(model, tmp_path / file)
    target.load_weights(tmp_path / file)
    agree(model, target)
    again = UNet(**SMALL)
    load_keras_weights(again, tmp_path / file)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_keras_opens_a_whole_model_that_we_write(tmp_path):
    small_keras()  # skips without Keras
    import keras

    model = randomised(**SMALL)
    save_keras_weights(model, tmp_path / "model.keras")
    agree(model, keras.saving.load_model(tmp_path / "model.keras"))


def test_transposed_convolutions_go_through_keras_layouts(tmp_path):
    model = randomised(in_channels=1, padding="valid", up="transpose", **SMALL)
    for file in ("w.weights.h5", "w.h5"):
        save_keras_weights(model, tmp_path / file)
        again = reference.UNet(in_channels=1, padding="valid", up="transpose", **SMALL)
        load_keras_weights(again, tmp_path / file)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(ValueError, match=r"valid.*transpose.*weights\.h5"):
        save_keras_weights(model, tmp_path / "w.keras")
    assert not (tmp_path / "w.keras").exists()


def test_a_keras_file_that_does_not_fit_changes_nothing(tmp_path):
    save_keras_weights(randomised(width=8, depth=2), tmp_path / "wide.h5")
    save_keras_weights(randomised(width=4, depth=3), tmp_path / "deep.weights.h5")
    (tmp_path / "no.keras").write_bytes(b"PK nothing")
    model = randomised(**SMALL)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for file, said in (("wide.h5", r"encoders.0.conv1 is \(4, 2, 3, 3\), the file's is \(8, 2, 3, 3\).*head"),
                       ("deep.weights.h5", "it has 18 convolutions, the model 13"), ("no.keras", "no.keras is not"),
                       ("absent.h5", "absent.h5 is not a Keras file")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            load_keras_weights(model, tmp_path / file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"weights\.h5"):
        save_keras_weights(model, tmp_path / "weights.pt")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_checkpoints_of_wrapped_models_load(tmp_path, prefix, wrap):
    source = randomised(reference.UNet, **SMALL)
    torch.save(wrap({prefix + key: value for key, value in source.state_dict().items()}), tmp_path / "c.pt")
    model = UNet(**SMALL)
    load_torch_weights(model, tmp_path / "c.pt")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_real_wrapper_and_safetensors(tmp_path):
    from safetensors.torch import save_file

    source = randomised(reference.UNet, **SMALL)
    model = UNet(**SMALL)
    load_torch_weights(model, torch.compile(source).state_dict())
    save_file(source.state_dict(), tmp_path / "c.safetensors")
    load_torch_weights(model, tmp_path / "c.safetensors")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_misfit_lists_every_key_and_changes_nothing():
    model = randomised(**SMALL)
    state = {k: v.clone() for k, v in randomised(seed=1, **SMALL).state_dict().items()}
    del state["head.bias"]
    state["extra"] = torch.zeros(1)
    state["encoders.0.conv1.weight"] = torch.zeros(4, 3, 3, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    said = (r"missing: head.bias; unexpected: extra; misshapen: encoders.0.conv1.weight \(4, 3, 3, 3\) "
            r"instead of \(4, 2, 3, 3\)")  # fmt: skip
    with pytest.raises(ValueError, match=said):
        load_torch_weights(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_code_in_a_pickle_is_not_run(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt"):
        load_torch_weights(UNet(**SMALL), tmp_path / "evil.pt")
    assert not ran.exists()
    for bad in (b"", b"text"):
        (tmp_path / "bad.pt").write_bytes(bad)
        with pytest.raises(ValueError, match=r"cannot read weights from .*bad\.pt"):
            load_torch_weights(UNet(**SMALL), tmp_path / "bad.pt")
    for bad in ({}, {"a": 1}, {"state_dict": {}}):
        with pytest.raises(ValueError, match="holds no state_dict"):
            load_torch_weights(UNet(**SMALL), bad)


def test_importing_needs_no_other_library():
    assert fastunet.interop.load_torch_weights is load_torch_weights


def test_pretrained_folders_hold_network_and_weights(tmp_path):
    model = randomised(in_channels=1, num_classes=3, width=4, depth=1, up="transpose", dropout=0.1)
    save_pretrained(model, tmp_path / "folder")
    loaded = from_pretrained(tmp_path / "folder", backend="torch")
    assert (loaded.config, loaded.backend, loaded.training) == (model.config, "torch", False)
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(UserError, match="no-such"):
        from_pretrained(tmp_path / "no-such")
    (tmp_path / "folder" / "config.json").write_text('{"levels": 3}')
    with pytest.raises(UserError, match=r"config.json does not describe a fastunet.UNet: .*'levels'"):
        from_pretrained(tmp_path / "folder")


def test_pretrained_folders_are_those_of_hugging_face(tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    class HubUNet(UNet, hub.PyTorchModelHubMixin):
        pass

    theirs = HubUNet(in_channels=1, num_classes=3, width=4, depth=1).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    again = HubUNet.from_pretrained(tmp_path / "ours")
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(again(x), theirs(x))

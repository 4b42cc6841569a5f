"""torch.export, AOTInductor and torch.compile give the model's results; TorchScript is refused."""

from __future__ import annotations

import zipfile

import pytest
import torch

from fastunet import UNet, reference
from fastunet.losses import DiceCrossEntropyLoss

FREE = torch.export.Dim.DYNAMIC
ANY_SIZE = {0: FREE, 2: FREE, 3: FREE}
NETWORKS = {
    "brats": (dict(width=4, depth=2), [(16, 24), (17, 21)]),
    "isbi": (dict(in_channels=1, width=4, depth=1, padding="valid", up="transpose"), [(28, 36), (30, 22)]),
}
QUICK = {  # of Inductor's C++: no trial of vector instructions, no line tables, no headers precompiled for few files
    "cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False, "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.enable_line_tables": False,
}  # fmt: skip


class Labels(torch.nn.Module):
    """What an application exports: labels, not logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network.predict(x)


FORMS = {"model": lambda model: model, "frozen": UNet.freeze, "labels": lambda model: Labels(model.freeze())}


def build(name: str = "brats"):
    torch.manual_seed(0)
    arguments, sizes = NETWORKS[name]
    model = UNet(**arguments).eval()
    return model, [torch.randn(n, model.architecture.in_channels, *size) for n, size in zip((2, 3), sizes)]


@pytest.mark.parametrize("name, form", [("brats", "model"), ("brats", "labels"), ("isbi", "frozen")])
def test_one_exported_program_serves_every_size(name, form):
    model, (x, other) = build(name)
    module = FORMS[form](model)
    with torch.no_grad():
        program = torch.export.export(module, (x,), dynamic_shapes=(ANY_SIZE,)).module()
        for images in (x, other):
            torch.testing.assert_close(program(images), module(images), rtol=1e-5, atol=1e-5)


def test_the_plain_build_exports_for_every_size_too():
    _, (x, other) = build()
    plain = reference.UNet(width=4, depth=1).eval()
    with torch.no_grad():
        program = torch.export.export(plain, (x,), dynamic_shapes=(ANY_SIZE,)).module()
        torch.testing.assert_close(program(other), plain(other), rtol=1e-5, atol=1e-5)


def test_a_saved_program_names_the_import_that_it_needs(tmp_path, caplog):
    model, (x, _) = build()
    path = tmp_path / "network.pt2"
    with torch.no_grad():
        torch.export.save(torch.export.export(model.freeze(), (x,)), path)
        torch.testing.assert_close(torch.export.load(path).module()(x), model(x), rtol=1e-5, atol=1e-5)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "elsewhere.pt2", "w") as elsewhere:
        for name in archive.namelist():  # where no library "fastunet" is known
            elsewhere.writestr(name, archive.read(name).replace(b"torch.ops.fastunet.", b"torch.ops.unknown_."))
    with pytest.raises(RuntimeError):
        torch.export.load(tmp_path / "elsewhere.pt2")
    assert "torch.ops.unknown_." in caplog.text
    assert "Please import the custom op" in caplog.text


@pytest.mark.slow
def test_aot_inductor_runs_the_program_on_a_cpu(tmp_path):
    model = UNet(width=2, depth=0).eval()
    x = torch.randn(1, 2, 8, 8)
    with torch.no_grad(), torch._inductor.config.patch(QUICK):
        program = torch.export.export(model, (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "network.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, torch.zeros(1, 2, 8, 8))])
@pytest.mark.parametrize("form", ["model", "frozen"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused_in_one_sentence(form, make):
    model, _ = build()
    with pytest.raises(ValueError, match=r"fastunet.UNet is not for TorchScript.*torch.export.*fastunet.to_onnx"):
        make(FORMS[form](model))


class Trained(torch.nn.Module):
    """Network and loss as one graph."""

    def __init__(self, model):
        super().__init__()
        self.model, self.loss = model, DiceCrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x, labels):
        return self.loss(self.model(x), labels)


@pytest.mark.slow
@torch._inductor.config.patch(QUICK)
def test_compiled_training_is_the_eager_one_at_every_size():
    """Network and loss in one graph (``fullgraph``), by Inductor: two sizes of 2 would share a symbol."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    step = Trained(UNet(width=2, depth=1, dropout=0.0))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, mode="max-autotune")
    for shape in ((5, 2, 7, 10), (3, 2, 9, 12)):
        x, labels = torch.randn(shape), torch.randint(4, (shape[0], *shape[2:]))
        losses = [function(x, labels) for function in (compiled, step)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        for got, want in zip(*(torch.autograd.grad(loss, list(step.parameters())) for loss in losses), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)

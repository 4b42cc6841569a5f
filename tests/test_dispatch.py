"""The choice of a backend: explicit choices are kept or refused, "auto" falls back and says why once."""

from __future__ import annotations

import itertools
import sys
import types
import warnings

import pytest
import torch

from fastunet import dispatch, functional
from fastunet.functional import conv_relu
from fastunet.inspection.selfcheck import check_operators


class FakeCuda:
    """Stands for a tensor on a CUDA device."""

    device = torch.device("cuda", 0)
    dtype = torch.float32


@pytest.fixture
def cuda(monkeypatch):
    """Pretends that a CUDA device of compute capability 9.0 is there; returns a setter of the capability."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Test GPU")
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_why_not_cuda", dispatch._why_not_cuda.__wrapped__)  # remembers each device
    return lambda *c: capability.__setitem__(0, c)


def test_auto_on_a_cpu_is_torch_without_a_warning(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select_backend("auto", "op", torch.zeros(1)) == "torch"


def test_auto_on_a_gpu_is_triton(cuda):
    assert dispatch.select_backend("auto", "op", FakeCuda) == "auto"
    assert dispatch.select_backend("triton", "op", FakeCuda) == "triton"
    assert dispatch.select_backend("torch", "op", FakeCuda) == "torch"


def test_an_old_gpu_falls_back_with_one_warning(cuda):
    cuda(7, 5)
    with pytest.warns(UserWarning, match=r"Test GPU has compute capability 7.5, below 8.0"):
        assert dispatch.select_backend("auto", "op", FakeCuda) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.select_backend("auto", "op", FakeCuda) == "torch"
    with pytest.raises(ValueError, match="op: backend 'triton' cannot run here: Test GPU"):
        dispatch.select_backend("triton", "op", FakeCuda)


def test_a_missing_triton_falls_back(cuda, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert dispatch.select_backend("auto", "op", FakeCuda) == "torch"


def test_float64_is_torch(cuda, monkeypatch):
    monkeypatch.setattr(FakeCuda, "dtype", torch.float64)
    with pytest.warns(UserWarning, match="not float64"):
        assert dispatch.select_backend(None, "op", FakeCuda) == "torch"


def test_the_environment_sets_what_auto_means(cuda, monkeypatch):
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    assert dispatch.select_backend("auto", "op", FakeCuda) == "torch"
    assert dispatch.select_backend("triton", "op", FakeCuda) == "triton"
    monkeypatch.setenv("FASTUNET_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend is 'fast'"):
        dispatch.select_backend("auto", "op", FakeCuda)


def test_triton_on_a_cpu_is_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    with pytest.raises(ValueError, match="the tensor is on the CPU"):
        conv_relu(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 3, 3), backend="triton")


def test_autocast_casts_like_a_convolution():
    x, weight, exact = torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert dispatch.autocast_operands(x, weight, None)[0] is x
    with torch.autocast("cpu", torch.bfloat16):
        got = dispatch.autocast_operands(x, weight, None, exact)
    assert [None if t is None else t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, None, torch.float64]


def test_an_operator_s_own_limit_falls_back_too(cuda):
    with pytest.warns(UserWarning, match="40 classes, more than 32"):
        assert dispatch.select_backend("auto", "op", FakeCuda, "the head has 40 classes, more than 32") == "torch"
    with pytest.raises(ValueError, match="40 classes"):
        dispatch.select_backend("triton", "op", FakeCuda, "the head has 40 classes, more than 32")


_NUMBERS = itertools.count()
"""An operator cannot be defined again under its name."""


@pytest.fixture
def failing(monkeypatch):
    """An operator whose launcher raises what it is told to."""
    raises = [RuntimeError("Triton Error [CUDA]: ptxas died")]

    def broken(*operands):
        raise raises[0]

    module = types.ModuleType("fastunet.kernels.broken")
    module.launch = broken
    monkeypatch.setitem(sys.modules, "fastunet.kernels.broken", module)
    for name in ("tuning", "_plan"):  # what stands between an operator and its launcher
        room = "fastunet.inspection" if name == "tuning" else "fastunet.kernels"
        stand_in = types.SimpleNamespace(tunable=lambda launcher: launcher, planned=lambda launcher: launcher)
        monkeypatch.setitem(sys.modules, f"{room}.{name}", stand_in)
    monkeypatch.setattr(dispatch, "GIVEN_UP", {})
    name = f"probe_{next(_NUMBERS)}"
    dispatch.define(f"{name}(Tensor x, str backend) -> Tensor", torch_impl=lambda x: 2 * x,
                    triton_impl="broken:launch", fake=torch.empty_like)  # fmt: skip
    yield getattr(torch.ops.fastunet, name), name, raises
    del dispatch.OPERATORS[name]


def test_a_kernel_that_fails_is_given_up_with_one_warning(failing):
    operator, name, _ = failing
    x = torch.ones(3, requires_grad=True)
    with pytest.warns(UserWarning, match=rf"PyTorch for {name} from now on.* RuntimeError: .*ptxas died"):
        y = operator(x, "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (y + operator(x, "auto")).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0))
    with pytest.raises(RuntimeError, match="ptxas died"):
        operator(x, "triton")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
    RuntimeError("Triton Error [CUDA]: out of memory"), ValueError("images of 2**31 pixels"),
])  # fmt: skip
def test_too_little_memory_and_refusals_are_no_failure_of_the_kernel(failing, error):
    operator, _, raises = failing
    raises[0] = error
    with pytest.raises(type(error)):
        operator(torch.ones(3), "auto")
    assert dispatch.GIVEN_UP == {}


def test_the_self_check_names_a_kernel_that_was_given_up(monkeypatch):
    def half_broken(*operands, **options):
        dispatch._give_up("max_pool2d", RuntimeError("no such instruction"))
        return torch.nn.functional.max_pool2d(operands[0], 2)

    monkeypatch.setattr(functional, "max_pool2d", half_broken)
    with pytest.warns(UserWarning, match="max_pool2d"):
        check = next(c for c in check_operators(torch.device("cpu"), torch.float32) if c.operator == "max_pool2d")
    assert not check.passed
    assert "no such instruction" in check.problem
    dispatch.GIVEN_UP.clear()

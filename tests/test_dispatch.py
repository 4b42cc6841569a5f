"""The choice of a backend: explicit choices are kept or refused, "auto" falls back and says why once."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastunet import dispatch
from fastunet.functional import conv_relu


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
    assert dispatch.select_backend("auto", "op", FakeCuda) == "triton"
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

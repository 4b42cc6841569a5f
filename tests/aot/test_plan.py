"""A repeated launch gets what the launcher itself would pass, and costs few Python calls. Compiled, but not run."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import weakref

import pytest
import torch
import triton

from bench.gpu.host_driver import host_driver
from bench.gpu.small import norm_calls
from fastunet.architecture import Architecture
from fastunet.inspection.kernel_table import launches
from fastunet.inspection.layers import network_calls
from fastunet.kernels import _launch, _plan, relu
from fastunet.kernels.conv import forward as conv_relu

VALID = dict(padding="valid", up="transpose", depth=1)
NETWORKS = {
    "upsample": (Architecture(width=32, depth=1), (32, 32)),
    "upsample, 24 wide": (Architecture(width=24, depth=1), (32, 32)),
    "transpose": (Architecture(in_channels=1, num_classes=2, width=16, **VALID), (20, 20)),
}


@pytest.fixture(scope="module")
def started(no_code):
    """The launches since it was last cleared."""
    with host_driver() as found:
        yield found


def calls(networks):
    for name in networks:
        architecture, size = NETWORKS[name]
        for training in (True, False):
            for call in network_calls(architecture, 2, *size, training=training):
                yield f"{name} {'training' if training else 'inference'} {call.layer} {call.operator}", call
    for call in norm_calls(16):
        yield call.operator, call


def kind(call):
    """Equal for calls of an operator that launch the same kernels, with the same of its optional arguments."""
    names = tuple(launch.kernel.__name__ for launch in launches(call, torch.bfloat16, 90))
    return call.operator, names, tuple(argument is None for argument in call.arguments.values())


def addressless(value, tensors):
    """``value`` with addresses as (tensor, byte), without the objects by which Triton tells hooks of a launch."""
    if isinstance(value, (tuple, list)):
        return tuple(addressless(v, tensors) for v in value)
    if hasattr(value, "data_ptr"):
        value = value.data_ptr()
    if isinstance(value, int) and not isinstance(value, bool):
        for i, tensor in enumerate(tensors):
            if 0 <= value - tensor.data_ptr() < tensor.untyped_storage().nbytes():
                return "address", i, value - tensor.data_ptr()
    return None if type(value).__name__ in ("LazyDict", "HookChain") else value


def recorded(function, results):
    def call(*args, **kwargs):
        results.append(function(*args, **kwargs))
        return results[-1]

    return call


def functions_called(function, *operands):
    """The code objects of the Python functions that ``function(*operands)`` calls, once for each call."""
    codes = []
    sys.setprofile(lambda frame, event, argument: codes.append(frame.f_code) if event == "call" else None)
    try:
        function(*operands)
    finally:
        sys.setprofile(None)
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
def test_every_call_of_a_network_repeats_its_launches(started, dtype, monkeypatch, request):
    """With ``--full`` every call of three networks, without it one of each kind."""
    full, networks = request.config.getoption("--full", default=False), ["transpose"]
    if dtype == torch.bfloat16:
        networks += ["upsample, 24 wide", *["upsample"] * full]
    elif not full:
        pytest.skip("compiled with --full")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    found = list(calls(networks))  # first: PyTorch's device contexts remember the functions that make tensors
    found = found if full else list({kind(call): (name, call) for name, call in found}.values())
    allocated = []
    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name), allocated))
    for name, call in found:
        launcher = call.launcher()
        seen = []
        for function in (launcher, launcher, launcher.__wrapped__):
            operands = call.random(dtype, "cpu")
            allocated.clear()
            started.clear()
            results = function(*operands)
            tensors = [*(o for o in operands if isinstance(o, torch.Tensor)), *allocated]
            passed = [addressless(launch, tensors) for launch in started]
            results = results if isinstance(results, tuple) else (results,)
            seen.append((passed, [(r.shape, r.stride(), r.dtype, r.storage_offset()) for r in results]))
        assert seen[0][0], name
        assert seen[1] == seen[2], f"{name}: the repeated call differs"
        assert launcher.__wrapped__.__code__ not in functions_called(launcher, *operands), f"{name} is not kept"


def test_a_repeated_launch_costs_few_python_calls(started):
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((1, 64, 32, 32), (64, 64, 3, 3), (64,)))
    operands = x.contiguous(memory_format=torch.channels_last), None, weight, bias, 1, 0.0
    launcher = _plan.planned(conv_relu.forward)
    launcher(*operands)
    repeated, first = (len(functions_called(f, *operands)) for f in (launcher, launcher.__wrapped__))
    assert repeated < first / 4


def test_what_is_kept_holds_no_tensor(started):
    x, weight, bias = (torch.randn(s).bfloat16() for s in ((1, 64, 32, 32), (64, 64, 3, 3), (64,)))
    x = x.contiguous(memory_format=torch.channels_last)
    launcher = _plan.planned(conv_relu.forward)
    for _ in range(2):
        kept = [weakref.ref(t) for t in (x, weight, bias, launcher(x, None, weight, bias, 1, 0.0))]
        started.clear()  # holds what was launched
        assert [ref() is None for ref in kept] == [False, False, False, True]
    del x, weight, bias
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_what_is_kept_depends_on_all_that_a_launcher_may_look_at(started):
    launcher = _plan.planned(relu.backward)
    y = torch.randn(2, 8, 16, 16).contiguous(memory_format=torch.channels_last)
    for other in (y, y[:1], y[:, :, 1:], y.half(), y.contiguous(), y.expand(2, 8, 16, 16)):
        for _ in range(2):
            expected = relu.backward(other, other, 0.0)
            actual = launcher(other, other, 0.0)
            assert (actual.shape, actual.stride(), actual.dtype) == (expected.shape, expected.stride(), expected.dtype)


def test_operands_of_one_storage_are_not_mixed_up(started):
    """The first call cannot tell whose address it passed on, so that no call is repeated."""
    launcher = _plan.planned(relu.backward)
    flat = torch.randn(2 * 8 * 16 * 16)
    dy, y = (part.view(8, 16, 16, 1).permute(0, 3, 1, 2) for part in flat.view(2, -1))
    for operands in ((dy, y, 0.0), (y, dy, 0.0)):
        started.clear()
        launcher(*operands)
        passed = [int(byte) for byte in re.findall(r"'address', 0, (\d+)", repr(addressless(started[0], [flat])))]
        assert passed == [operand.data_ptr() - flat.data_ptr() for operand in operands[:2]]


def launched_python(launcher, *operands):
    """Whether the call ran the launcher's own Python."""
    return launcher.__wrapped__.__code__ in functions_called(launcher, *operands)


def test_debugging_instrumentation_and_hooks_see_every_launch(started, monkeypatch):
    launcher = _plan.planned(relu.backward)
    dy, y = (torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last) for _ in range(2))
    launcher(dy, y, 0.0)
    assert not launched_python(launcher, dy, y, 0.0)
    for knobs, name, value in ((triton.knobs.runtime, "debug", True),
                               (triton.knobs.compilation, "instrumentation_mode", "gsan")):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(knobs, name, value)
            patch.setattr(_launch, "launch", lambda *args, **kwargs: None)
            assert launched_python(launcher, dy, y, 0.0), name
    assert not launched_python(launcher, dy, y, 0.0)
    seen = []
    monkeypatch.setattr(relu.relu_backward_kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(args)])
    launcher(dy, y, 0.0)
    assert len(seen) == 1, "a hook that was added after the first call"


def test_a_triton_that_was_not_proven_runs_the_launchers(monkeypatch):
    monkeypatch.setattr(_plan, "_PROVEN", False)
    assert _plan.planned(relu.backward) is relu.backward


@pytest.mark.usefixtures("newest_unless_full")
def test_every_setting_of_tf32_is_read_and_none_raises(started):
    """Of PyTorch, whatever the Triton, in a process of its own: PyTorch remembers that its newer settings were used."""
    if not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this PyTorch has allow_tf32 alone")
    script = """
import torch
import triton
from fastunet.kernels import _launch
b = torch.backends
assert _launch.tf32() and _launch.dot_precision(torch.float32) == "tf32"
for owner, value, expected in ((b.cudnn, "ieee", False), (b.cudnn, "tf32", True), (b.cudnn.conv, "ieee", False),
                               (b.cudnn.conv, "tf32", True), (b.cudnn.rnn, "ieee", True), (b, "ieee", True),
                               (b.cudnn.conv, "none", True), (b.cudnn, "none", False), (b, "tf32", True)):
    owner.fp32_precision = value
    assert _launch.tf32() == expected, (owner, value)
    assert _launch.dot_precision(torch.float32) == ("tf32" if expected else "ieee")
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

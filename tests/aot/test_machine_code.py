"""Every kernel that the reference networks launch, compiled for several GPUs, holds what an expert wants to see.

By default every tiling of the larger networks in bfloat16 for sm_90 at batch 16, with those functions that only batch 1
uses, and one of each kernel function that multiplies for other architectures and dtypes; by older versions of Triton
only what multiplies. ``--full`` compiles all.
"""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch

from fastunet.inspection.kernel_table import distinct, examine_all, format_table, uses, uses_of
from fastunet.inspection.layers import CASES, Call, Tensor, network_calls
from fastunet.inspection.machine_code import GFX942, compile_launch, inspect_all
from fastunet.kernels import _launch, _tuned, upsample_bilinear
from tests.aot.selection import BEFORE_3_8

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

THREADS = min(2, os.cpu_count())
MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
ALL = [(architecture, mode) for architecture in (80, 90, 100) for mode in MODES] + [(GFX942, "bf16")]
REDUCED = {(90, "bf16"), (90, "tf32")}
if not BEFORE_3_8:
    REDUCED |= {(80, "bf16"), (80, "ieee"), (100, "bf16"), (GFX942, "bf16")}
"""What is compiled without ``--full``."""
REDUCED_CASES = ("brats 240",) if BEFORE_3_8 else ("brats 240", "isbi 572")


@contextlib.contextmanager
def products(mode: str):
    previous = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = mode != "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = previous


def one_of_each(all_uses, key):
    """The first use of each value of ``key(launch)``."""
    found = {}
    for use in all_uses:
        found.setdefault(key(use.launch), use)
    return list(found.values())


def function(launch):
    return launch.kernel.__name__


def tiling(launch):
    """What chooses the code of a kernel, but for which sizes are multiples of 16."""
    constants = [repr(launch.args.get(p.name)) for p in launch.kernel.params if p.is_constexpr]
    tensors = [getattr(value, "block_shape", value is None) for value in launch.args.values()]
    return function(launch), launch.num_warps, launch.num_stages, *constants, repr(tensors)


def check(all_uses, show_table, title):
    rows = examine_all(all_uses, THREADS)
    show_table(f"{title}\n{format_table(rows)}")
    assert rows
    wrong = [f"{r.report.kernel} ({r.use.case}, {r.use.call.layer}, {r.use.call.operator}, batch "
             f"{next(iter(r.use.call.arguments.values())).shape[0]}): {'; '.join(r.failures)}"
             for r in rows if r.failures]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(rows)} kernels\n" + "\n".join(wrong)


@pytest.mark.parametrize("architecture, mode", ALL)
def test_kernels(architecture, mode, show_table, request):
    full = request.config.getoption("--full", default=False)
    if not full and (architecture, mode) not in REDUCED:
        pytest.skip("compiled with --full")
    with products(mode):
        names = None if full else REDUCED_CASES
        chosen, single = (uses(architecture, MODES[mode], batch=batch, names=names) for batch in (16, 1))
        names = {use.launch.kernel.__name__ for use in chosen}
        chosen += single if full else [use for use in single if use.launch.kernel.__name__ not in names]
        if not full and (BEFORE_3_8 or (architecture, mode) != (90, "bf16")):
            chosen = [use for use in chosen if use.call.macs]
        if not full:
            chosen = one_of_each(chosen, tiling if (architecture, mode) == (90, "bf16") else function)
        check(chosen, show_table, f"{architecture} {mode}")


@pytest.mark.parametrize("file", _tuned.files(), ids=lambda path: path.stem)
@pytest.mark.parametrize("mode", MODES)
def test_committed_winners(file, mode, show_table):
    architecture = json.loads(file.read_text())["architecture"]
    with products(mode):
        check(uses(architecture, MODES[mode], gpu=file.stem), show_table, f"{file.stem} {mode}")


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("name", CASES)
def test_first_use_compiles_few_kernels(name, batch):
    network, (height, width) = CASES[name]
    for architecture in (80, 90):
        training = network_calls(network, batch, height, width)
        inference = network_calls(network, batch, height, width, training=False, output="labels")
        for calls, most in ((training, 70), (inference, 24)):
            assert len(distinct(uses_of(name, calls, torch.bfloat16, architecture))) <= most


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", [80, 90])
def test_strided_convolution(architecture, mode, show_table, request):
    """The convolution of stride 2, 64 to 128 channels, and its gradients."""
    if not request.config.getoption("--full", default=False) and (architecture, mode) != (90, "bf16"):
        pytest.skip("compiled with --full")
    x, z = Tensor((16, 64, 60, 60)), Tensor((16, 128, 30, 30))
    weight, macs = Tensor((128, 64, 3, 3)), 9 * 64 * 16 * 128 * 30 * 30
    calls = [
        Call("down", "conv_strided", dict(x=x, weight=weight, bias=Tensor((128,)), pad=1, slope=0.01), macs),
        Call("down", "conv_strided_data_grad", dict(dz=z, weight=weight, x=x, pad=1), macs),
        Call("down", "conv_strided_weight_grad", dict(dz=z, x=x, pad=1, has_bias=True), macs),
    ]
    with products(mode):
        check(distinct(uses_of("no preset", calls, MODES[mode], architecture)), show_table, f"{architecture} {mode}")


@pytest.mark.parametrize("architecture, dtype", [(90, torch.bfloat16), (80, torch.float32)])
def test_bilinear_upsampling(architecture, dtype):
    """Whole vectors, no spills."""
    x = torch.empty(4, 64, 60, 60, dtype=dtype, device="meta", memory_format=torch.channels_last)
    with _launch.recording(architecture) as launches:
        for align_corners in (False, True):
            upsample_bilinear.forward(x, align_corners)
            upsample_bilinear.backward(x, align_corners)
    for report in inspect_all([compile_launch(launch, architecture) for launch in launches], architecture):
        assert (report.stack, report.spills) == (0, 0), report.kernel
        assert report.count("LDG.E.128") >= 4
        assert report.count("STG.E.128") >= 1

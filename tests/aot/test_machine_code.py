"""Every kernel that the reference networks launch, compiled for several GPUs, holds what an expert wants to see.

By default every option of the BraTS network in bfloat16 for sm_90 at batch 16 and, of its products, each number of
warps and stages, with those functions that only batch 1 uses, and the products of operators that only the ISBI network
has; as slow tests one of each kernel function that multiplies in tf32, for sm_80, sm_100 and AMD, but for convolutions
with a head or in splits; by older versions of Triton one of each function, with each number of warps and
stages and of outputs, that multiplies, in bfloat16 (in tf32 test_in_flight.py compiles some). ``--full`` compiles all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os

import pytest
import torch

from fastunet.inspection.kernel_table import distinct, examine_all, format_table, uses, uses_of
from fastunet.inspection.layers import CASES, Call, Tensor, network_calls
from fastunet.inspection.machine_code import GFX942, compile_launch, failures, inspect_all
from fastunet.kernels import _launch, _tuned, upsample_bilinear
from fastunet.kernels.conv import forward
from fastunet.kernels.conv.weight_grad import Product, partial_sums
from tests.aot.selection import BEFORE_3_8

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

THREADS = min(2, os.cpu_count())
MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
ALL = [pytest.param(*kind, marks=[pytest.mark.slow] * (kind != (90, "bf16")))
       for kind in [*itertools.product((80, 90, 100), MODES), (GFX942, "bf16")]]  # fmt: skip
REDUCED = {(90, "bf16")}
if not BEFORE_3_8:
    REDUCED |= {(90, "tf32"), (80, "bf16"), (100, "bf16"), (GFX942, "bf16")}
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


def multiplies(use):
    return "PRECISION" in use.launch.args


def features(launch):
    """The warps and stages of a product; the value of each option of a kernel."""
    found = {(name, launch.args[name] is None) for name in launch.args}
    for parameter in launch.kernel.params:
        if parameter.is_constexpr and not parameter.name.startswith("BLOCK_") and parameter.name != "ROWS":
            found.add((parameter.name, repr(launch.args.get(parameter.name))))
    if "PRECISION" in launch.args:
        found.add((launch.num_warps, launch.num_stages))
    return {(function(launch), *feature) for feature in found}


def covering(all_uses):
    """Few uses that have every feature of all of them."""
    left = [(use, features(use.launch)) for use in all_uses]
    wanted, chosen = set().union(*(found for _, found in left)), []
    while wanted:
        use, found = max(left, key=lambda one: len(one[1] & wanted))
        chosen.append(use)
        wanted -= found
    return chosen


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
        if not full:
            brats = [use for use in chosen if use.case == "brats 240"]
            known = {use.call.operator for use in brats}
            rest = [use for use in chosen if use.call.operator not in known and multiplies(use)]
            if (architecture, mode) != (90, "bf16"):  # a head or a split changes nothing in the loop
                both = (use for use in brats + rest if multiplies(use) and use.call.operator != "conv_relu_head")
                chosen = one_of_each([use for use in both if "split" not in function(use.launch)], function)
            elif BEFORE_3_8:
                found = [use for use in brats if multiplies(use)]
                chosen = one_of_each(found, lambda launch: (function(launch), launch.num_warps, launch.num_stages,
                                                            launch.args.get("second_desc") is None))
            else:
                chosen = covering(brats) + one_of_each(rest, function)
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
    full = request.config.getoption("--full", default=False)
    if not full and (architecture, mode) != (90, "bf16"):
        pytest.skip("compiled with --full")
    x, z = Tensor((16, 64, 60, 60)), Tensor((16, 128, 30, 30))
    weight, macs = Tensor((128, 64, 3, 3)), 9 * 64 * 16 * 128 * 30 * 30
    calls = [
        Call("down", "conv_strided", dict(x=x, weight=weight, bias=Tensor((128,)), pad=1, slope=0.01), macs),
        Call("down", "conv_strided_data_grad", dict(dz=z, weight=weight, x=x, pad=1), macs),
        Call("down", "conv_strided_weight_grad", dict(dz=z, x=x, pad=1, has_bias=True), macs),
    ]
    with products(mode):
        found = uses_of("no preset", calls, MODES[mode], architecture)
        found = [use for use in found if full or multiplies(use)]
        check(found, show_table, f"{architecture} {mode}")


def test_three_sources_of_a_weight_gradient_take_the_memory_of_one():
    """Their programs run the same loop over buffers of their own, which must lie over each other."""
    x, skip, y, dz = (torch.empty(16, 64, 120, 120, dtype=torch.bfloat16, device="meta",
                                  memory_format=torch.channels_last) for _ in range(4))  # fmt: skip
    products = [Product(dz, x, skip, True), Product(dz, y, None, True)]
    with _launch.recording(90) as launches:
        partial_sums(products, 1)
        partial_sums(products[1:], 1)
    three, one = inspect_all([compile_launch(launch, 90) for launch in launches], 90)
    assert three.shared == one.shared
    assert (three.stack, three.spills) == (0, 0)


def test_two_programs_of_stacked_columns_share_a_multiprocessor():
    """Of 228 KiB and 65,536 registers; 1 KiB a program is the system's."""
    with _launch.recording(90) as launches:
        x, skip = (torch.empty(16, 32, 240, 240, dtype=torch.bfloat16, device="meta",
                               memory_format=torch.channels_last) for _ in range(2))  # fmt: skip
        weight = torch.empty(32, 3, 3, 64, dtype=torch.bfloat16, device="meta").permute(0, 3, 1, 2)
        forward.forward(x, skip, weight, None, 1, 0.0)
    (launch,) = launches
    assert (launch.args["STACK"], launch.args["ROWS"]) == (2, 6)
    (report,) = inspect_all([compile_launch(launch, 90)], 90)
    assert not failures(report, launch)
    assert 2 * (report.shared + 1024) <= 228 * 1024
    assert 2 * 32 * launch.num_warps * (-(-report.registers // 8) * 8) <= 65536


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("architecture, dtype", [(90, torch.bfloat16), (80, torch.float32)])
def test_bilinear_upsampling(architecture, dtype, request):
    """Whole vectors, no spills."""
    if not request.config.getoption("--full", default=False) and architecture != 90:
        pytest.skip("compiled with --full")
    x = torch.empty(4, 64, 60, 60, dtype=dtype, device="meta", memory_format=torch.channels_last)
    with _launch.recording(architecture) as launches:
        for align_corners in (False, True):
            upsample_bilinear.forward(x, align_corners)
            upsample_bilinear.backward(x, align_corners)
    for report in inspect_all([compile_launch(launch, architecture) for launch in launches], architecture):
        assert (report.stack, report.spills) == (0, 0), report.kernel
        assert report.count("LDG.E.128") >= 4
        assert report.count("STG.E.128") >= 1

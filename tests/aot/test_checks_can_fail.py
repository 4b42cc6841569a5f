"""Each check of ``inspection.machine_code.failures`` against a kernel that it must refuse, and against a good one."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
import torch

from fastunet.inspection.machine_code import (
    GFX942,
    compile_launch,
    compiled_key,
    failures,
    inspect,
    inspect_all,
    intermediate,
)
from fastunet.kernels import _launch
from tests.aot import bad_kernels
from tests.aot.selection import BEFORE_3_8

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")


def check(launch, architecture):
    report = inspect(compile_launch(launch, architecture), architecture)
    return report, failures(report, launch)


PRODUCTS = {
    "good": lambda: bad_kernels.product(64, 64, 32, stages=2),
    "four in a loop": lambda: bad_kernels.product(64, 128, 64),
    "eight warps": lambda: bad_kernels.product(128, 128, 64, warps=8),
    "too large": lambda: bad_kernels.product(256, 128, 16),
    "two warps": lambda: bad_kernels.product(64, 64, 32, warps=2, stages=2),
    "32 rows": lambda: bad_kernels.product(32, 64, 32, stages=2),
    "float32": lambda: bad_kernels.product(64, 64, 32, dtype=torch.float32, stages=2),
    "pixels first": bad_kernels.pixels_first,
}


@pytest.fixture(scope="module")
def on_hopper():
    """Launch and report of each of PRODUCTS on sm_90: the disassembler, slow to start, runs once."""
    launches = [make() for make in PRODUCTS.values()]
    reports = inspect_all([compile_launch(launch, 90) for launch in launches], 90)
    return dict(zip(PRODUCTS, zip(launches, reports)))


@pytest.mark.parametrize("architecture", [90] if BEFORE_3_8 else [80, 90, 100, GFX942])
def test_a_good_kernel_passes(architecture, on_hopper):
    launch, report = on_hopper["good"]
    if architecture != 90:
        report = inspect(compile_launch(launch, architecture), architecture)
    found = failures(report, launch)
    made, kept = intermediate(launch, architecture), compile_launch(launch, architecture).asm["ttir"]
    made, kept = (re.sub(r"loc\(.*", "", text) for text in (made, kept))  # a cache may be another checkout's
    assert made == kept
    assert found == [] or (architecture in (80, GFX942) and "narrow" in found[0])
    assert report.main_loops == 1
    assert report.products > 0
    assert report.registers < 256


def test_main_loop_of_the_good_kernel_is_counted(on_hopper):
    """64×128×64: four wgmma of depth 16 and a bulk copy for each operand."""
    launch, report = on_hopper["four in a loop"]
    assert failures(report, launch) == []
    assert report.products == report.count("HGMMA.64x128x16") == 4
    assert report.loads == report.count("UTMALDG") == 2
    assert report.loads_per_product == 0.5
    assert [(d.m, d.n, d.k, d.dtype) for d in report.dots] == [(64, 128, 64, "bf16")]


def test_waiting_for_each_product_is_refused(on_hopper):
    """As Triton before 3.8 has 8 warps do."""
    launch, report = on_hopper["eight warps"]
    assert failures(report, launch) == (["waits 4 times for its 4 products, more than 1"] if BEFORE_3_8 else [])


def test_spills_are_refused(on_hopper):
    launch, report = on_hopper["too large"]
    assert report.stack > 0
    assert report.spills > 0
    assert "local memory" in failures(report, launch)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("newest_unless_full")
def test_spills_of_amd_are_refused():
    report, found = check(bad_kernels.product(128, 128, 64 if BEFORE_3_8 else 16, warps=1, stages=1), GFX942)
    assert report.spills > 0
    assert "local memory" in found[0]


@pytest.mark.parametrize("architecture, limit", [(80, 163), (86, 99), (90, 227), (100, 227)])
def test_too_much_shared_memory_is_refused(architecture, limit, on_hopper):
    launch, report = on_hopper["eight warps"]
    full = dataclasses.replace(report, architecture=architecture, shared=limit * 1024)
    assert not any("shared memory" in f for f in failures(full, launch))
    assert any("shared memory" in f for f in failures(dataclasses.replace(full, shared=limit * 1024 + 1), launch))


@pytest.mark.usefixtures("newest_unless_full")
def test_a_kernel_with_too_many_stages_is_refused():
    report, found = check(bad_kernels.product(128, 256, 64, warps=8, stages=6), 90)
    assert report.shared > 227 * 1024
    assert "shared memory" in found[0]


@pytest.mark.parametrize("architecture, instruction", [(90, "HGMMA")] if BEFORE_3_8 else [(90, "HGMMA"), (100, "UTC")])
def test_old_products_are_refused(architecture, instruction, on_hopper):
    launch, report = on_hopper["two warps"]
    if architecture != 90:
        report = inspect(compile_launch(launch, architecture), architecture)
    assert report.count("HMMA") > 0
    assert instruction in failures(report, launch)[0]


def test_old_products_are_right_below_64_rows(on_hopper):
    launch, report = on_hopper["32 rows"]
    assert report.count("HMMA") > 0
    assert failures(report, launch) == []


def test_ieee_products_need_no_tensor_cores(on_hopper):
    launch, report = on_hopper["float32"]
    dots = tuple(dataclasses.replace(dot, precision="ieee") for dot in report.dots)
    assert failures(dataclasses.replace(report, opcodes=Counter(), dots=dots), launch) == []
    assert failures(dataclasses.replace(report, opcodes=Counter()), launch) != []


def test_operands_through_registers_are_refused(on_hopper):
    launch, report = on_hopper["pixels first"]
    assert report.count("HGMMA") > 0
    assert "LDSM" in failures(report, launch)[0]


@pytest.mark.usefixtures("newest_unless_full")
def test_narrow_loads_are_refused_where_channels_fill_16_bytes():
    report, found = check(bad_kernels.narrow(64), 90)
    assert report.narrow_loads
    assert "narrow global loads" in found[-1]


@pytest.mark.usefixtures("newest_unless_full")
def test_narrow_loads_are_right_for_ragged_channels():
    report, found = check(bad_kernels.narrow(33), 90)
    assert report.narrow_loads
    assert found == []


def test_serialised_products_are_refused(on_hopper):
    launch, report = on_hopper["four in a loop"]
    assert failures(report, launch) == []
    serial = report.opcodes + Counter({"WARPGROUP.DEPBAR.LE": report.count("HGMMA")})
    found = failures(dataclasses.replace(report, opcodes=serial), launch)
    assert found == ["waits 5 times for its 4 products, more than 1"]


def test_one_kernel_serves_launches_that_differ_by_nothing_it_was_specialised_for():
    key = compiled_key(bad_kernels.product(64, 64, 32, size=512), 90)
    assert key == compiled_key(bad_kernels.product(64, 64, 32, size=1024), 90)
    assert key != compiled_key(bad_kernels.product(64, 64, 32, size=520), 90)
    assert key != compiled_key(bad_kernels.product(64, 64, 32, warps=8), 90)

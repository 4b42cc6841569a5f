"""Each check of ``inspection.machine_code.failures`` against a kernel that it must refuse, and against a good one."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from fastunet.inspection.machine_code import GFX942, compile_launch, compiled_key, failures, inspect, intermediate
from fastunet.kernels import _launch
from tests.aot import bad_kernels
from tests.aot.selection import BEFORE_3_8

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")


def check(launch, architecture=90):
    report = inspect(compile_launch(launch, architecture), architecture)
    return report, failures(report, launch)


@pytest.mark.parametrize("architecture", [90] if BEFORE_3_8 else [80, 90, 100, GFX942])
def test_a_good_kernel_passes(architecture):
    launch = bad_kernels.product(64, 64, 32, stages=2)
    report, found = check(launch, architecture)
    assert intermediate(launch, architecture) == compile_launch(launch, architecture).asm["ttir"]
    assert found == [] or (architecture in (80, GFX942) and "narrow" in found[0])
    assert report.main_loops == 1
    assert report.products > 0
    assert report.registers < 256


def test_main_loop_of_the_good_kernel_is_counted():
    """64×128×64: four wgmma of depth 16 and a bulk copy for each operand."""
    report, found = check(bad_kernels.product(64, 128, 64))
    assert found == []
    assert report.products == report.count("HGMMA.64x128x16") == 4
    assert report.loads == report.count("UTMALDG") == 2
    assert report.loads_per_product == 0.5
    assert [(d.m, d.n, d.k, d.dtype) for d in report.dots] == [(64, 128, 64, "bf16")]


def test_waiting_for_each_product_is_refused():
    """As Triton before 3.8 has 8 warps do."""
    _, found = check(bad_kernels.product(128, 128, 64, warps=8))
    assert found == (["waits 4 times for its 4 products, more than 1"] if BEFORE_3_8 else [])


def test_spills_are_refused():
    report, found = check(bad_kernels.product(256, 128, 16))
    assert report.stack > 0
    assert report.spills > 0
    assert "local memory" in found[0]


@pytest.mark.usefixtures("newest_unless_full")
def test_spills_of_amd_are_refused():
    report, found = check(bad_kernels.product(128, 128, 64 if BEFORE_3_8 else 16, warps=1, stages=1), GFX942)
    assert report.spills > 0
    assert "local memory" in found[0]


@pytest.mark.parametrize("architecture, limit", [(80, 163), (86, 99), (90, 227), (100, 227)])
def test_too_much_shared_memory_is_refused(architecture, limit):
    launch = bad_kernels.product(128, 128, 64, warps=8)
    report, _ = check(launch)
    full = dataclasses.replace(report, architecture=architecture, shared=limit * 1024)
    assert not any("shared memory" in f for f in failures(full, launch))
    assert any("shared memory" in f for f in failures(dataclasses.replace(full, shared=limit * 1024 + 1), launch))


@pytest.mark.usefixtures("newest_unless_full")
def test_a_kernel_with_too_many_stages_is_refused():
    report, found = check(bad_kernels.product(128, 256, 64, warps=8, stages=6))
    assert report.shared > 227 * 1024
    assert "shared memory" in found[0]


@pytest.mark.parametrize("architecture, instruction", [(90, "HGMMA")] if BEFORE_3_8 else [(90, "HGMMA"), (100, "UTC")])
def test_old_products_are_refused(architecture, instruction):
    report, found = check(bad_kernels.product(64, 64, 32, warps=2, stages=2), architecture)
    assert report.count("HMMA") > 0
    assert instruction in found[0]


def test_old_products_are_right_below_64_rows():
    report, found = check(bad_kernels.product(32, 64, 32, stages=2))
    assert report.count("HMMA") > 0
    assert found == []


def test_ieee_products_need_no_tensor_cores():
    launch = bad_kernels.product(64, 64, 32, dtype=torch.float32, stages=2)
    report, _ = check(launch)
    dots = tuple(dataclasses.replace(dot, precision="ieee") for dot in report.dots)
    assert failures(dataclasses.replace(report, opcodes=Counter(), dots=dots), launch) == []
    assert failures(dataclasses.replace(report, opcodes=Counter()), launch) != []


def test_operands_through_registers_are_refused():
    report, found = check(bad_kernels.pixels_first())
    assert report.count("HGMMA") > 0
    assert "LDSM" in found[0]


@pytest.mark.usefixtures("newest_unless_full")
def test_narrow_loads_are_refused_where_channels_fill_16_bytes():
    report, found = check(bad_kernels.narrow(64))
    assert report.narrow_loads
    assert "narrow global loads" in found[-1]


@pytest.mark.usefixtures("newest_unless_full")
def test_narrow_loads_are_right_for_ragged_channels():
    report, found = check(bad_kernels.narrow(33))
    assert report.narrow_loads
    assert found == []


def test_serialised_products_are_refused():
    launch = bad_kernels.product(64, 128, 64)
    report, found = check(launch)
    assert found == []
    serial = report.opcodes + Counter({"WARPGROUP.DEPBAR.LE": report.count("HGMMA")})
    found = failures(dataclasses.replace(report, opcodes=serial), launch)
    assert found == ["waits 5 times for its 4 products, more than 1"]


def test_one_kernel_serves_launches_that_differ_by_nothing_it_was_specialised_for():
    key = compiled_key(bad_kernels.product(64, 64, 32, size=512), 90)
    assert key == compiled_key(bad_kernels.product(64, 64, 32, size=1024), 90)
    assert key != compiled_key(bad_kernels.product(64, 64, 32, size=520), 90)
    assert key != compiled_key(bad_kernels.product(64, 64, 32, warps=8), 90)

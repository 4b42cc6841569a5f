"""Counted traffic against sums made by hand."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastunet.inspection import traffic
from fastunet.inspection.machine_code import intermediate
from fastunet.kernels import _launch
from fastunet.kernels._launch import Launch
from tests.aot import bad_kernels

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no intermediate representation")


def count(launch):
    return traffic.count(launch, intermediate(launch, 90))


@triton.jit
def split_sum_kernel(x_ptr, y_ptr, total, shapes, BLOCK: tl.constexpr):
    """Every program but the first sums its share of the blocks, the last one a shorter one; the first writes zeros."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if pid == 0:
        tl.store(y_ptr + offs, tl.zeros((BLOCK,), tl.float32))
    else:
        acc = tl.zeros((BLOCK,), tl.float32)
        first = (pid - 1) * shapes[1]
        for i in range(first, tl.minimum(first + shapes[1], total)):
            if i % 2 == 0:
                acc += tl.load(x_ptr + i * BLOCK + offs)
        tl.store(y_ptr + pid * BLOCK + offs, acc)


@triton.jit
def data_dependent_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for i in range(tl.load(x_ptr)):
        tl.store(y_ptr + i * BLOCK + offs, tl.zeros((BLOCK,), tl.float32))


def test_matrix_product():
    """256 × 256 in tiles of 64: 16 programs, 4 steps of two 64×64 bf16 tiles, one tile written; 2·256³ operations."""
    assert count(bad_kernels.product(64, 64, 64, size=256)) == traffic.Traffic(
        read=16 * 4 * 2 * 64 * 64 * 2, written=16 * 64 * 64 * 2, flop=2 * 256**3
    )


def test_halo_and_padding_of_a_convolution():
    """Two programs, 9 taps × 2 steps, boxes of 8×16×64 pixels (half of them halo or neighbours) and 128×64 weights."""
    found = count(bad_kernels.pixels_first())
    assert found.read == 2 * 18 * (8 * 16 * 64 + 128 * 64) * 2
    assert found.written == 2 * 8 * 16 * 128 * 2
    assert found.flop == 2 * 9 * 256 * 128 * 128


def test_padded_channels_count_in_full():
    """33 channels in steps of 32: two steps of 64 pixels × 32 channels and 32 × 64 weights for each of 4 programs."""
    found = count(bad_kernels.narrow(33))
    assert found.read == 4 * 2 * (64 * 32 + 32 * 64) * 2
    assert found.flop == 4 * 2 * 2 * 64 * 32 * 64


def test_branches_and_uneven_loops():
    """11 blocks in shares of 4: programs 1, 2, 3 read the even ones among 4, 4 and 3 blocks; program 0 only writes."""
    x, y = torch.empty(11 * 128, device="meta"), torch.empty(4 * 128, device="meta")
    launch = Launch(split_sum_kernel, (4,), dict(x_ptr=x, y_ptr=y, total=11, shapes=(2, 4), BLOCK=128), 4, 3, 90)
    assert count(launch) == traffic.Traffic(read=6 * 128 * 4, written=4 * 128 * 4, flop=0)


def test_a_loop_over_loaded_data_is_refused():
    x, y = torch.empty(1, dtype=torch.int32, device="meta"), torch.empty(128, device="meta")
    with pytest.raises(ValueError, match="cannot count"):
        count(Launch(data_dependent_kernel, (1,), dict(x_ptr=x, y_ptr=y, BLOCK=128), 4, 3, 90))

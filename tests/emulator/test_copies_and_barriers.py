"""Asynchronous copies, tensor maps and mbarriers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from .barriers import Barrier
from .bulk_copies import TensorMap
from .global_memory import Fault
from .launch import LAZY, Schedule
from .ptx import BOTH, run, thread_addresses

COPY = """
    mov.b32 %r5, global_smem; shl.b32 %r6, %r0, 4; add.s32 %r7, %r5, %r6; xor.b32 %r8, %r6, 16; add.s32 %r8, %r5, %r8;
    cp.async.cg.shared.global [%r7], [%rd1], 16; cp.async.commit_group;
    setp.lt.u32 %p1, %r0, 20; selp.b32 %r9, 16, 0, %p1;
    cp.async.cg.shared.global [%r7+512], [%rd1], 16, %r9; cp.async.commit_group;
    cp.async.wait_group 1; bar.sync 0; ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r8];
    cp.async.wait_group 0; bar.sync 0; ld.shared.v4.b32 {%r24, %r25, %r26, %r27}, [%r8+512];
    st.global.v4.b32 [%rd0], {%r20, %r21, %r22, %r23}; st.global.v4.b32 [%rd0+16], {%r24, %r25, %r26, %r27};"""


def copies(body: str = COPY):
    x = np.random.default_rng(0).integers(0, 1 << 32, (32, 4), np.uint32)
    out = np.zeros((32, 2, 4), np.uint32)
    records = run(thread_addresses([32, 16]) + body, out, x, shared=1024)
    other = np.arange(32) ^ 1
    assert np.array_equal(out[:, 0], x[other])
    assert np.array_equal(out[:, 1], np.where(other[:, None] < 20, x[other], 0))
    return records


def test_cp_async_and_its_groups():
    """A source size of 0 writes zeros; each wait is for one group."""
    for record in copies():
        assert record.counts["global load"] == 32 * 16 + 20 * 16
        assert record.counts["waits"] == 2


@pytest.mark.parametrize("wait", ["wait_group 1", "wait_group 0"])
def test_a_copy_that_nobody_waits_for_is_seen(wait):
    with pytest.raises(Fault, match="access of what an asynchronous copy in flight writes"):
        copies(COPY.replace(f"cp.async.{wait};", ""))


LOAD = """
    mov.b32 %r5, global_smem; add.s32 %r6, %r5, 4096; mov.u32 %r7, %tid.x; setp.eq.u32 %p1, %r7, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r6], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6], {bytes}; mov.b64 %rd20, kernel_param_1;
    @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r5], [%rd20, {{{start}}}], [%r6];
    W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r6], 0; @!%p2 bra W;
    mad.lo.s32 %r8, %r0, {share}, %r5; ld.shared.b{bits} {register}, [%r8];
    st.global.b{bits} [%rd0], {register};"""


def loaded(x: np.ndarray, box: tuple[int, ...], start: tuple[int, ...], swizzle=0, padding=0) -> np.ndarray:
    """What a box at ``start`` (outermost first) leaves in shared memory, in order of addresses."""
    strides = tuple(s // x.itemsize for s in x.strides)
    tensor = TensorMap(x.ctypes.data, swizzle, x.itemsize, box, x.shape, strides, padding)
    count = int(np.prod(box))
    out = np.zeros(count, x.dtype)
    registers = "".join(f"mov.b32 %r{30 + i}, {s};" for i, s in enumerate(start[::-1]))
    run(thread_addresses([x.itemsize]) + registers + LOAD.format(
        bytes=out.nbytes, rank=len(box), start=", ".join(f"%r{30 + i}" for i in range(len(box))), share=x.itemsize,
        bits=8 * x.itemsize, register="%rs9" if x.itemsize == 2 else "%r9"),
        out, tensor, threads=count, shared=4104)  # fmt: skip
    return out


@pytest.mark.parametrize("start", [(0, 0, 0), (-1, -2, 0), (1, 3, 0), (1, -3, 4), (-2, 0, 0), (0, 9, 0), (1, 1, -4),
                                   (-5, -5, -8)])  # fmt: skip
@pytest.mark.parametrize("padding", [0, 1])
def test_boxes_over_the_edges_of_a_tensor(start, padding):
    """Coordinates may be negative or past the end; what is outside becomes zero, or NaN if the map says so."""
    x = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
    got = loaded(x, (2, 4, 4), start, padding=padding).reshape(2, 4, 4)
    for index in np.ndindex(2, 4, 4):
        at = tuple(s + i for s, i in zip(start, index))
        inside = all(0 <= a < n for a, n in zip(at, x.shape))
        want = x[at] if inside else (np.nan if padding else 0)
        assert np.array_equal(got[index], np.float32(want), equal_nan=True), (index, at)


def test_strided_tensors():
    x = np.arange(5 * 40, dtype=np.uint16).reshape(5, 40)[::2, 8:24]
    assert np.array_equal(loaded(x, (4, 8), (1, 4)).reshape(4, 8)[:2], x[1:3, 4:12])


@pytest.mark.parametrize("mode, span", [(1, 32), (2, 64), (3, 128)])
def test_every_swizzle(mode, span):
    """Sixteen bytes at (line of 128 bytes, unit) lie at unit XOR what the ISA's tables of each mode say."""
    x = np.arange(16 * span // 2, dtype=np.uint16).reshape(16, span // 2)
    units = loaded(x, x.shape, (0, 0), mode).reshape(-1, 8, 8)  # line, unit, element
    plain = x.reshape(-1, 8, 8)
    tables = {
        32: [[0, 1, 2, 3, 4, 5, 6, 7]] + [[1, 0, 3, 2, 5, 4, 7, 6]],
        64: [[0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6], [2, 3, 0, 1, 6, 7, 4, 5], [3, 2, 1, 0, 7, 6, 5, 4]],
        128: [[c ^ r for c in range(8)] for r in range(8)],
    }
    for line in range(len(units)):
        table = tables[span][line % len(tables[span])]
        assert np.array_equal(units[line][table], plain[line]), line


@pytest.mark.parametrize("change, message", [
    ({"base": 8}, "not a multiple of 16"), ({"strides": (12, 1)}, "strides of"), ({"box": (4, 300)}, "box"),
    ({"box": (4, 4)}, "inner box of 8 bytes"), ({"swizzle": 1}, "64 bytes under swizzle 1"),
    ({"strides": (32, 2)}, "not dense"), ({"shape": (0, 64)}, "shape"),
], ids=str)  # fmt: skip
def test_tensor_maps_that_the_driver_refuses(change, message):
    right = TensorMap(1 << 12, 0, 2, (4, 32), (9, 64), (64, 1))
    with pytest.raises(Fault, match=message):
        dataclasses.replace(right, **change)


STORE = """
    mov.b32 %r5, global_smem; shl.b32 %r6, %r0, 2; add.s32 %r7, %r5, %r6; st.shared.b32 [%r7], %r0;
    fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd20, kernel_param_1; mov.b32 %r30, 4; mov.b32 %r31, 1;
    elect.sync %r9|%p1, -1;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd20, {%r30, %r31}], [%r5];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; bar.sync 0; st.shared.b32 [%r7], 0;"""


def stored(body: str = STORE, schedules=(LAZY,)) -> None:
    x = np.full((3, 8), 99, np.uint32)
    tensor = TensorMap(x.ctypes.data, 0, 4, (4, 8), x.shape, (8, 1))
    run(thread_addresses([4]) + body, np.zeros(32, np.uint32), tensor, shared=128, schedules=schedules)
    want = np.full((3, 8), 99, np.uint32)
    want[1:, 4:] = np.arange(32).reshape(4, 8)[:2, :4]
    assert np.array_equal(x, want)


def test_bulk_store_writes_only_inside():
    stored(schedules=BOTH)


@pytest.mark.parametrize("gone, message", [
    ("fence.proxy.async.shared::cta;", "no fence.proxy.async between"),
    ("cp.async.bulk.wait_group.read 0;", "write of what an asynchronous operation in flight reads"),
    ("cp.async.bulk.commit_group;", "write of what an asynchronous operation in flight reads"),
    ("cp.async.bulk.wait_group.read 0; bar.sync 0; st.shared.b32 [%r7], 0;", "may still read its shared memory"),
    ("mov.b32 %r31, 1;", "bulk store at negative coordinates .-1, 4."),
    ("elect.sync %r9|%p1, -1;", "a bulk copy by more than one thread of a warp"),
])  # fmt: skip
def test_misuse_of_a_bulk_store_is_a_fault(gone, message):
    assert gone in STORE
    instead = {"elect.sync": "setp.ne.s32 %p1, %r0, 99;", "mov.b32": "mov.b32 %r31, -1;"}.get(gone.split()[0], "")
    with pytest.raises(Fault, match=message):
        stored(STORE.replace(gone, instead))


PHASES = """
    mov.b32 %r5, global_smem; mov.u32 %r6, %tid.x; setp.eq.u32 %p1, %r6, 0; shr.u32 %r7, %r6, 5;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], {count}; bar.sync 0; mov.b32 %r8, 0;
    setp.eq.u32 %p3, %r7, 0; @%p3 bra WAIT;
    ARRIVE: mbarrier.arrive.shared::cta.b64 _, [%r5]; bra WAIT;
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], {parity}; @!%p2 bra WAIT;
    st.global.b32 [%rd0], 1; bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r5];"""


@pytest.mark.parametrize("warps", ["together", "ascending", "descending"])
def test_a_phase_ends_with_its_last_arrival(warps):
    """The first warp waits for the 32 arrivals of the second, whichever comes first."""
    out = np.zeros(64, np.uint32)
    body = thread_addresses([4]) + PHASES.format(count=32, parity=0)
    run(body, out, threads=64, shared=8, schedules=[Schedule(detect=True, warps=warps)])
    assert (out == 1).all()


@pytest.mark.parametrize("count, message", [
    (33, "waiting for ever at an mbarrier: .'1 of 33 arrivals"),
    (0, "an mbarrier of 0 arrivals"),
    (1 << 20, "an mbarrier of 1048576 arrivals"),
])  # fmt: skip
def test_counts_of_arrivals(count, message):
    with pytest.raises(Fault, match=message):
        run(thread_addresses([4]) + PHASES.format(count=count, parity=0), np.zeros(64, np.uint32), threads=64, shared=8)


def test_phases_end_with_the_last_arrival_and_the_last_byte():
    """Before the first phase ends, the one of parity 1 counts as complete; afterwards that of parity 0."""
    barrier = Barrier(2, 2)
    assert barrier.passed(1)
    barrier.expect(16)
    barrier.arrive(2, "")
    assert not barrier.passed(0)
    with pytest.raises(Fault, match="more arrivals than the mbarrier expects"):
        dataclasses.replace(barrier).arrive(1, "")
    barrier.expect(-16)
    assert barrier.passed(0)
    assert not barrier.passed(1)
    barrier.arrive(2, "")
    assert barrier.passed(1)
    assert not barrier.passed(0)
    with pytest.raises(Fault, match="expects 1048576 bytes"):
        barrier.expect(1 << 20)

"""Loads, stores, warps and control flow; every fault that they can make."""

from __future__ import annotations

import numpy as np
import pytest

from .global_memory import Fault
from .launch import EAGER, LAZY, Schedule
from .ptx import each, run, thread_addresses

SHARED = "mov.b32 %r5, global_smem; mov.u32 %r6, %tid.x; shl.b32 %r7, %r6, 2; add.s32 %r8, %r5, %r7;"
"""%r8 is the thread's own word."""


@pytest.mark.parametrize("kind, count", [("b8", 1), ("b16", 1), ("b32", 1), ("b64", 1), ("v2.b32", 2), ("v4.b32", 4),
                                         ("v2.b64", 2), ("v4.b16", 4)])  # fmt: skip
def test_widths_through_shared_memory(kind, count):
    """Global to registers to shared memory, and the neighbour's back."""
    bits = int(kind.split("b")[1])
    size = bits // 8 * count
    x = np.random.default_rng(0).integers(0, 255, (64, size), np.uint8)
    out = np.zeros_like(x)
    prefix = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
    first, second = ("{" + ", ".join(f"{prefix}{n + i}" for i in range(count)) + "}" for n in (30, 40))
    if count == 1:
        first, second = first[1:-1], second[1:-1]
    run(f"""{thread_addresses([size, size])}
        mov.b32 %r5, global_smem; mov.u32 %r6, %tid.x; mad.lo.s32 %r7, %r6, {size}, %r5;
        xor.b32 %r8, %r6, 33; mad.lo.s32 %r9, %r8, {size}, %r5;
        ld.global.{kind} {first}, [%rd1]; st.shared.{kind} [%r7], {first}; bar.sync 0;
        ld.shared.{kind} {second}, [%r9]; st.global.{kind} [%rd0], {second};""",
        out, x, threads=64, shared=64 * size)  # fmt: skip
    assert np.array_equal(out, x[np.arange(64) ^ 33])


def test_guards_offsets_and_signs():
    x = np.arange(-32, 32, dtype=np.int8)
    out = np.full(32, 7, np.int32)
    run(f"{thread_addresses([4, 1])} setp.lt.u32 %p1, %r0, 9; @%p1 ld.global.s8 %r20, [%rd1+31];"
        "@!%p1 mov.b32 %r20, 100; setp.ne.s32 %p2, %r0, 3; @%p2 st.global.b32 [%rd0], %r20;", out, x)  # fmt: skip
    want = np.where(np.arange(32) < 9, np.arange(-1, 31), 100)
    want[3] = 7
    assert out.tolist() == want.tolist()


@pytest.mark.parametrize("body, message", [
    ("ld.global.b32 %r9, [%rd0+128];", "outside of every tensor: 32 threads, the first 128 bytes from the start"),
    ("setp.eq.s32 %p1, %r0, 31; @%p1 st.global.b32 [%rd0+4], %r0;", "1 threads, the first 128 bytes"),
    ("ld.global.b32 %r9, [%rd0+-4];", "the first -4 bytes"),
    ("ld.global.v2.b32 {%r9, %r10}, [%rd0];", "misaligned access of global memory, 8 bytes"),
    (SHARED + "st.shared.b32 [%r8+128], %r6;", "outside of 256 bytes of shared memory, 128 .. 256"),
    (SHARED + "ld.shared.b64 %rd9, [%r8];", "misaligned access of shared memory, 8 bytes"),
    (SHARED + "ld.shared.b32 %r9, [%r8];", "read of shared memory that nothing wrote"),
    ("setp.lt.u32 %p1, %r0, 7; @%p1 bra A; bar.sync 0; A: mov.b32 %r9, 0;", "threads wait for ever at a bar.sync"),
    ("bar.sync 16;", "barrier number or count out of range"),
    ("bar.sync 0, 40;", "barrier number or count out of range"),
    ("setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.idx.b32 %r9, %r0, 9, 31, -1;", "shuffle from an inactive lane"),
], ids=lambda value: value.split(",")[0].split(";")[-1] if ":" not in value else "")  # fmt: skip
def test_faults(body, message):
    size = 252 if "+128" in body and "shared" in body else 256
    if "128 .. 256" in message:
        message = message.replace("256 bytes", "252 bytes")
    with pytest.raises(Fault, match=message):
        run(thread_addresses([4]) + body, np.zeros(32, np.uint32), shared=size)


RACES = {  # of two warps: what each word's neighbour in the other warp does
    "read after write": "st.shared.b32 [%r8], %r6; ld.shared.b32 %r9, [%r10];",
    "write after read": "st.shared.b32 [%r8], %r6; bar.sync 0; ld.shared.b32 %r9, [%r10]; st.shared.b32 [%r8], %r9;",
    "write after write": "st.shared.b32 [%r8], %r6; st.shared.b32 [%r10], %r6;",
}


@pytest.mark.parametrize("kind", RACES)
def test_races_between_warps(kind):
    """Each is caught, and is none within a warp or with a barrier between any two accesses."""
    start = SHARED + "xor.b32 %r9, %r6, {}; mad.lo.s32 %r10, %r9, 4, %r5; "
    out = np.zeros(1, np.uint32)
    with pytest.raises(Fault, match=f"race, {kind} by another warp"):
        run(start.format(32) + RACES[kind], out, threads=64, shared=256)
    run(start.format(1) + RACES[kind], out, threads=64, shared=256)
    run(start.format(32) + RACES[kind].replace("; ", "; bar.sync 0; "), out, threads=64, shared=256)


@pytest.mark.parametrize("body, message", [
    ("st.global.b32 [%rd50], %r1;", "two programs write one element"),
    ("setp.eq.u32 %p1, %r1, 0; @%p1 st.global.b32 [%rd0], 1; @!%p1 ld.global.b32 %r9, [%rd50];",
     "read of global memory that another program wrote"),
], ids=["write", "read"])  # fmt: skip
def test_races_between_programs(body, message):
    with pytest.raises(Fault, match=message):
        run(thread_addresses([4]) + body, np.zeros(64, np.uint32), grid=2, schedules=[LAZY])


def test_warp_exchanges():
    x = np.random.default_rng(1).integers(0, 1 << 32, 64, np.uint32)
    lanes = np.arange(64)
    for mode, b, mask, source in (("bfly", 5, 31, lanes ^ 5), ("idx", 9, 31, lanes // 32 * 32 + 9),
                                  ("down", 3, 31, np.where(lanes % 32 > 28, lanes, lanes + 3)),
                                  ("up", 3, 0, np.where(lanes % 32 < 3, lanes, lanes - 3))):  # fmt: skip
        text = f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {b}, {mask}, -1;"
        assert np.array_equal(each(text, np.uint32, x), x[source]), mode
    rows = x.reshape(-1, 32)
    for text, want in (("redux.sync.add.s32 {d}, {a}, -1;", rows.sum(1, dtype=np.uint32)),
                       ("redux.sync.max.u32 {d}, {a}, -1;", rows.max(1)),
                       ("redux.sync.min.s32 {d}, {a}, -1;", rows.view(np.int32).min(1).view(np.uint32)),
                       ("redux.sync.xor.b32 {d}, {a}, -1;", np.bitwise_xor.reduce(rows, 1)),
                       ("setp.lt.s32 %p1, {a}, 0; vote.sync.ballot.b32 {d}, %p1, -1;",
                        ((rows >> 31).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1))):  # fmt: skip
        assert np.array_equal(each(text, np.uint32, x), np.repeat(want, 32)), text


@pytest.mark.parametrize("schedule", [EAGER, LAZY, Schedule(warps="ascending"), Schedule(warps="descending")])
def test_loops_of_different_lengths_meet_again(schedule):
    """Collatz steps of each thread, then a sum over the warp: all 32 must be there."""
    x = np.arange(1, 129, dtype=np.uint32)
    out = np.zeros(128, np.uint32)
    run(thread_addresses([4, 4]) + """
        ld.global.b32 %r20, [%rd1]; mov.b32 %r21, 0;
        LOOP: setp.eq.u32 %p1, %r20, 1; @%p1 bra DONE; add.s32 %r21, %r21, 1;
        and.b32 %r22, %r20, 1; setp.eq.u32 %p2, %r22, 0; @%p2 bra EVEN;
        mad.lo.s32 %r20, %r20, 3, 1; bra LOOP;
        EVEN: shr.u32 %r20, %r20, 1; bra LOOP;
        DONE: redux.sync.add.s32 %r23, %r21, -1; st.global.b32 [%rd0], %r23;""",
        out, x, threads=64, grid=2, schedules=[schedule])  # fmt: skip

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert np.array_equal(out, np.repeat(np.array([steps(n) for n in x.tolist()]).reshape(4, 32).sum(1), 32))


@pytest.mark.parametrize("warps", ["together", "ascending", "descending"])
def test_barriers_in_a_loop(warps):
    """A sum over the program by halves; every step needs its barrier."""
    x = np.random.default_rng(2).integers(0, 1 << 20, 256, np.uint32)
    out = np.zeros(2, np.uint32)
    body = thread_addresses([4, 4]) + SHARED + """
        ld.global.b32 %r20, [%rd1]; st.shared.b32 [%r8], %r20; mov.b32 %r21, 64;
        LOOP: bar.sync 0; setp.ge.u32 %p1, %r6, %r21; @%p1 bra SKIP;
        mad.lo.s32 %r22, %r21, 4, %r8; ld.shared.b32 %r23, [%r22]; ld.shared.b32 %r24, [%r8];
        add.s32 %r24, %r24, %r23; st.shared.b32 [%r8], %r24;
        SKIP: shr.u32 %r21, %r21, 1; setp.ne.s32 %p2, %r21, 0; @%p2 bra LOOP;
        setp.ne.s32 %p3, %r6, 0; @%p3 bra END; mul.wide.u32 %rd9, %r1, 4; add.s64 %rd9, %rd9, %rd50;
        st.global.b32 [%rd9], %r24; END: mov.b32 %r30, 0;"""
    run(body, out, x, threads=128, grid=2, shared=512, schedules=[Schedule(detect=True, warps=warps)])
    assert out.tolist() == x.reshape(2, 128).sum(1).tolist()
    with pytest.raises(Fault, match="race"):
        run(body.replace("bar.sync 0;", ""), out, x, threads=128, grid=2, shared=512)


def test_a_result_that_hangs_on_the_elected_lane_is_seen():
    with pytest.raises(Fault, match="other bytes in param_0"):
        run(thread_addresses([4]) + "elect.sync %r20|%p1, -1; @%p1 st.global.b32 [%rd0], 1;", np.zeros(32, np.uint32))

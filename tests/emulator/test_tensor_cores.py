"""Matrix instructions against NumPy, with fragments spelled out lane by lane as in the PTX ISA's figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .bulk_copies import TensorMap
from .global_memory import Fault
from .ptx import run, thread_addresses

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def small(shape, seed=0):
    """Small integers, whose products and sums every type holds."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def bits(x: np.ndarray, kind: str) -> np.ndarray:
    """As unsigned integers of the type's width."""
    if kind == "tf32":
        return np.ascontiguousarray(x).view(np.uint32)
    return torch.from_numpy(np.ascontiguousarray(x)).to(DTYPES[kind]).view(torch.uint16).numpy()


def words(elements: list[np.ndarray]) -> np.ndarray:
    """A register of one or two elements, the first in the lower half."""
    return elements[0].astype(np.uint32) | (elements[1].astype(np.uint32) << np.uint32(16) if len(elements) > 1 else 0)


def fragments(a: np.ndarray, b: np.ndarray | None, kind: str) -> list[np.ndarray]:
    """Registers of A (16 × k), then of B (k × 8), for 32 lanes."""
    each, step = (1, 4) if kind == "tf32" else (2, 8)
    out = []
    for register in range(4):
        out.append([words([a[lane // 4 + 8 * (register % 2), each * (lane % 4) + h + step * (register // 2)]
                           for h in range(each)]) for lane in range(32)])  # fmt: skip
    for register in range(2 if b is not None else 0):
        out.append([words([b[each * (lane % 4) + h + step * register, lane // 4] for h in range(each)])
                    for lane in range(32)])  # fmt: skip
    return [np.array(r, np.uint32) for r in out]


def accumulated(out: np.ndarray, rows: int, n: int) -> np.ndarray:
    """The matrix in registers ``out`` (threads, n / 2): warp w holds rows 16w, …"""
    matrix = np.full((rows, n), np.nan, np.float32)
    for thread, values in enumerate(out):
        warp, lane = divmod(thread, 32)
        for i, value in enumerate(values):
            matrix[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = value
    return matrix


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(kind):
    k = 8 if kind == "tf32" else 16
    a, b = small((16, k)), small((k, 8), 1)
    registers = np.stack(fragments(bits(a, kind), bits(b, kind), kind), 1).copy()
    out = np.zeros((32, 4), np.float32)
    run(thread_addresses([16, 24]) + f"""
        ld.global.v2.b32 {{%r10, %r11}}, [%rd1]; ld.global.v2.b32 {{%r12, %r13}}, [%rd1+8];
        ld.global.v2.b32 {{%r14, %r15}}, [%rd1+16]; mov.b32 %r20, 0f40000000;
        mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {{%r30, %r31, %r32, %r33}},
            {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r20, %r20, %r20, %r20}};
        st.global.v4.b32 [%rd0], {{%r30, %r31, %r32, %r33}};""", out, registers)  # fmt: skip
    assert np.array_equal(accumulated(out, 16, 8), a @ b + 2)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Lane l gets elements 2·(l % 4) and the next of row l / 4, or of that column; storing is the reverse."""
    x = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    out, back = np.zeros((32, 4), np.uint32), np.zeros_like(x)
    trans = ".trans" if transposed else ""
    some = "{" + ", ".join(f"%r{30 + i}" for i in range(count)) + "}"
    stores = "".join(f"st.global.b32 [%rd0+{4 * i}], %r{30 + i};" for i in range(count))
    run(thread_addresses([16, 16, 16]) + f"""
        mov.b32 %r5, global_smem; shl.b32 %r6, %r0, 4; add.s32 %r7, %r5, %r6;
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd1]; st.shared.v4.b32 [%r7], {{%r20, %r21, %r22, %r23}};
        st.shared.v4.b32 [%r7+512], {{%r20, %r21, %r22, %r23}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {some}, [%r7]; {stores}
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r7+512], {some}; bar.sync 0;
        ld.shared.v4.b32 {{%r20, %r21, %r22, %r23}}, [%r7+512];
        st.global.v4.b32 [%rd2], {{%r20, %r21, %r22, %r23}};""",
        out, x, back, shared=1024)  # fmt: skip
    for matrix in range(count):
        m = x[8 * matrix : 8 * matrix + 8]
        m = m.T if transposed else m
        pairs = [m[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist() for lane in range(32)]
        assert [[v & 0xFFFF, v >> 16] for v in out[:, matrix].tolist()] == pairs
    assert np.array_equal(back, x)


def descriptor(register: str, address: str, leading: int, stride: int, mode: int) -> str:
    """A 64-bit descriptor of the shared address in 32-bit register ``address``."""
    fixed = mode << 62 | (stride >> 4) << 32 | (leading >> 4) << 16
    return (f"shr.u32 %r90, {address}, 4; and.b32 %r90, %r90, 16383; cvt.u64.u32 {register}, %r90;"
            f"or.b64 {register}, {register}, {fixed};")  # fmt: skip


LOAD = """
    mov.b32 %r5, global_smem; add.s32 %r5, %r5, {barrier}; mov.u32 %r6, %tid.x; setp.eq.u32 %p1, %r6, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 1; bar.sync 0; mov.b32 %r7, global_smem; add.s32 %r8, %r7, {second};
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5], {total};
    mov.b64 %rd10, kernel_param_1; mov.b64 %rd11, kernel_param_2; mov.b32 %r9, 0;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r7], [%rd10, {{%r9, %r9}}], [%r5];
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%r8], [%rd11, {{%r9, %r9}}], [%r5];
    W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0; @!%p2 bra W;
"""
END = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def multiply(kind: str, span: int, n: int, trans_b: bool = False, warpgroups: int = 1, body=lambda text: text):
    """A (64 × k) times B, by bulk copies with a swizzle of ``span`` bytes and as many products as that holds."""
    element = 4 if kind == "tf32" else 2
    k, groups = span // element, warpgroups
    rows = 64 * groups
    a, b = small((rows, k)), small((n, k), 3)
    stored_b = b.T if trans_b else b  # of which a row has 64 elements
    a_bits, b_bits = bits(a, kind), bits(np.ascontiguousarray(stored_b), kind)
    mode = {32: 1, 64: 2, 128: 3}[span]
    maps = [TensorMap(t.ctypes.data, mode, element, t.shape, t.shape, (t.shape[1], 1)) for t in (a_bits, b_bits)]
    total = a_bits.nbytes + b_bits.nbytes
    text = thread_addresses([4 * (n // 2)]) + LOAD.format(barrier=total, second=a_bits.nbytes, total=total)
    text += f"shr.u32 %r91, %r6, 7; mad.lo.s32 %r7, %r91, {64 * span}, %r7;"
    d = [f"%r{200 + i}" for i in range(n // 2)]
    text += "".join(f"mov.b32 {r}, 0;" for r in d) + "wgmma.fence.sync.aligned;"
    for step in range(k * element // 32):
        text += f"add.s32 %r92, %r7, {32 * step}; add.s32 %r93, %r8, {16 * span * step if trans_b else 32 * step};"
        text += descriptor("%rd20", "%r92", 0, 8 * span, {1: 3, 2: 2, 3: 1}[mode])
        text += descriptor("%rd21", "%r93", 0, 8 * span, {1: 3, 2: 2, 3: 1}[mode])
        last = f", 0, {int(trans_b)}" if kind != "tf32" else ""
        text += (f"wgmma.mma_async.sync.aligned.m64n{n}k{32 // element}.f32.{kind}.{kind} {{{', '.join(d)}}}, "
                 f"%rd20, %rd21, 1, 1, 1{last};")  # fmt: skip
    text += END + "".join(f"st.global.b32 [%rd0+{4 * i}], {r};" for i, r in enumerate(d))
    out = np.zeros((128 * groups, n // 2), np.float32)
    run(body(text), out, *maps, threads=128 * groups, shared=total + 8)
    assert np.array_equal(accumulated(out, rows, n), a @ b.T)


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_wgmma_from_swizzled_bulk_copies(kind, span):
    multiply(kind, span, 24)


def test_wgmma_of_a_transposed_operand():
    """B lies as rows of k with 64 elements of n: 128 bytes."""
    multiply("bf16", 128, 64, trans_b=True)


def test_two_warpgroups_share_an_operand():
    multiply("f16", 128, 16, warpgroups=2)


@pytest.mark.parametrize("before, after, message", [
    (END, "", "ends with wgmma under way"),
    (END, "st.shared.b32 [%r7], %r6;" + END, "write of what an asynchronous operation in flight reads"),
    ("W: ", "st.shared.b32 [%r7], %r6; W: ", "access of what an asynchronous copy in flight writes"),
    ("W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r5], 0; @!%p2 bra W;", "",
     "access of what an asynchronous copy in flight writes"),
    ("wgmma.fence", "bar.sync 0; st.shared.b32 [%r7], %r6; bar.sync 0; wgmma.fence", "no fence.proxy.async"),
    ("_, [%r5], ", "_, [%r5], 1", "waiting for ever at an mbarrier"),
], ids=["no wait", "write in flight", "write under a copy", "no wait for the copy", "no fence", "bytes"])  # fmt: skip
def test_misuse_of_wgmma_is_a_fault(before, after, message):
    def changed(text):
        assert before in text
        return text.replace(before, after)

    with pytest.raises(Fault, match=message):
        multiply("bf16", 128, 16, body=changed)


def in_registers(more: str = ""):
    """A from registers, B without swizzle: units of 8 rows × 16 bytes, each in a line."""
    a, b = small((64, 16)), small((8, 16), 3)
    registers = np.concatenate([np.stack(fragments(bits(a[w : w + 16], "bf16"), None, "bf16"), 1)
                                for w in range(0, 64, 16)]).copy()  # fmt: skip
    units = bits(b, "bf16").reshape(8, 2, 8).swapaxes(0, 1).copy()  # unit along k, row, eight elements
    out = np.zeros((128, 4), np.float32)
    run(thread_addresses([16, 16]) + f"""
        ld.param.u64 %rd30, [kernel_param_2]; mov.b32 %r5, global_smem; shl.b32 %r6, %r0, 1; add.s32 %r7, %r5, %r6;
        cvt.u64.u32 %rd31, %r6; add.s64 %rd30, %rd30, %rd31; ld.global.b16 %rs1, [%rd30]; st.shared.b16 [%r7], %rs1;
        fence.proxy.async.shared::cta; bar.sync 0; mov.b32 %r10, 0;
        ld.global.v4.b32 {{%r20, %r21, %r22, %r23}}, [%rd1]; {descriptor("%rd20", "%r5", 128, 0, 0)}
        wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r30, %r31, %r32, %r33}},
            {{%r20, %r21, %r22, %r23}}, %rd20, 0, 1, 1, 0; {more} {END}
        st.global.v4.b32 [%rd0], {{%r30, %r31, %r32, %r33}};""",
        out, registers, units, threads=128, shared=256)  # fmt: skip
    assert np.array_equal(accumulated(out, 64, 8), a @ b.T)


def test_wgmma_of_registers_and_an_unswizzled_operand():
    in_registers()


def test_registers_written_while_their_product_is_in_flight():
    with pytest.raises(Fault, match="registers of an operand were written while the product was in flight"):
        in_registers("add.s32 %r22, %r22, 1;")

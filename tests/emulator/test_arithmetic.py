"""Arithmetic, comparison and conversion instructions against Python's integers and NumPy's floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from .ptx import each

GENERATOR = np.random.default_rng(0)
EDGES = {32: [0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE],
         64: [0, 1, 2, 63, 64, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]}  # fmt: skip


def integers(bits: int, count: int = 128) -> list[np.ndarray]:
    """Three operands: all pairs of edges, then random ones."""
    edges = EDGES[bits]
    pairs = [(a, b) for a in edges for b in edges]
    more = GENERATOR.integers(0, 1 << bits, (count - len(pairs), 2), np.uint64, endpoint=False) if bits < 64 else (
        GENERATOR.integers(0, (1 << 64) - 1, (count - len(pairs), 2), np.uint64))  # fmt: skip
    both = np.concatenate([np.array(pairs, np.uint64), more])
    kind = np.uint32 if bits == 32 else np.uint64
    return [both[:, 0].astype(kind), both[:, 1].astype(kind), both[::-1, 0].astype(kind)]


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {  # of Python's integers a, b, c; the result is cut to its bits
    "add.s32": lambda a, b, c: a + b,
    "sub.s64": lambda a, b, c: a - b,
    "mul.lo.s32": lambda a, b, c: a * b,
    "mul.lo.s64": lambda a, b, c: a * b,
    "mul.hi.s32": lambda a, b, c: a * b >> 32,
    "mul.hi.u32": lambda a, b, c: a * b >> 32,
    "mul.hi.u64": lambda a, b, c: a * b >> 64,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "min.s32": lambda a, b, c: min(a, b),
    "max.u32": lambda a, b, c: max(a, b),
    "min.s64": lambda a, b, c: min(a, b),
    "and.b32": lambda a, b, c: a & b,
    "or.b64": lambda a, b, c: a | b,
    "xor.b32": lambda a, b, c: a ^ b,
}


@pytest.mark.parametrize("opcode", INTEGER)
def test_integer_arithmetic(opcode):
    bits = int(opcode[-2:])
    operands = integers(bits)
    text = f"{opcode} {{d}}, {{a}}, {{b}}" + (", {c};" if opcode.startswith("mad") else ";")
    got = each(text, operands[0].dtype, *operands)
    read = (lambda x: signed(int(x), bits)) if opcode[-3] == "s" else int
    want = [INTEGER[opcode](*map(read, row)) % (1 << bits) for row in zip(*operands)]
    assert got.tolist() == want


@pytest.mark.parametrize("opcode", ["div.s32", "div.u32", "div.s64", "rem.s32", "rem.u32", "rem.s64"])
def test_division_rounds_to_zero(opcode):
    bits = int(opcode[-2:])
    a, b, _ = integers(bits)
    b = np.where((b == 0) | (b == b.dtype.type(-1 % (1 << bits))), b.dtype.type(7), b)
    read = (lambda x: signed(int(x), bits)) if opcode[-3] == "s" else int
    for x, y, got in zip(a, b, each(f"{opcode} {{d}}, {{a}}, {{b}};", a.dtype, a, b).tolist()):
        q = quotient(read(x), read(y))
        assert got == (q if opcode.startswith("div") else read(x) - q * read(y)) % (1 << bits)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "b32", "b64"])
def test_shifts_past_the_width(kind):
    bits = int(kind[1:])
    a, _, _ = integers(bits)
    n = np.resize(np.array([0, 1, 5, bits - 1, bits, bits + 1, 200], np.uint32), len(a))
    if kind[0] == "b":
        got = each(f"shl.{kind} {{d}}, {{a}}, {{b}};", a.dtype, a, n)
        assert got.tolist() == [(int(x) << int(s)) % (1 << bits) for x, s in zip(a, n)]
    else:
        read = (lambda x: signed(int(x), bits)) if kind[0] == "s" else int
        got = each(f"shr.{kind} {{d}}, {{a}}, {{b}};", a.dtype, a, n)
        assert got.tolist() == [(read(x) >> int(s)) % (1 << bits) for x, s in zip(a, n)]


def test_funnel_shifts():
    a, b, _ = integers(32)
    n = np.resize(np.array([0, 1, 5, 31, 32, 200], np.uint32), len(a))
    whole = [int(y) << 32 | int(x) for x, y in zip(a, b)]
    left = [(w << int(s) % 32 >> 32) % (1 << 32) for w, s in zip(whole, n)]
    assert each("shf.l.wrap.b32 {d}, {a}, {b}, {c};", np.uint32, a, b, n).tolist() == left
    right = [(w >> int(s) % 32) % (1 << 32) for w, s in zip(whole, n)]
    assert each("shf.r.wrap.b32 {d}, {a}, {b}, {c};", np.uint32, a, b, n).tolist() == right


def test_wide_products():
    a, b, _ = integers(32)
    assert each("mul.wide.u32 {d}, {a}, {b};", np.uint64, a, b).tolist() == [int(x) * int(y) for x, y in zip(a, b)]
    want = [signed(int(x), 32) * signed(int(y), 32) % (1 << 64) for x, y in zip(a, b)]
    assert each("mul.wide.s32 {d}, {a}, {b};", np.uint64, a, b).tolist() == want


def test_bit_fields_and_bytes():
    a, b, c = integers(32)
    assert np.array_equal(each("bfe.u32 {d}, {a}, 5, 7;", np.uint32, a), a >> 5 & 127)
    want = [signed(int(x) >> 3 & 31, 5) % (1 << 32) for x in a]
    assert each("bfe.s32 {d}, {a}, 3, 5;", np.uint32, a).tolist() == want
    want = b & ~np.uint32(0xFF00) | (a & np.uint32(255)) << np.uint32(8)
    assert np.array_equal(each("bfi.b32 {d}, {a}, {b}, 8, 8;", np.uint32, a, b), want)
    want = []
    for x, y, s in zip(a, b, c):
        data = [*int(x).to_bytes(4, "little"), *int(y).to_bytes(4, "little")]
        picked = [int(s) >> 4 * i & 15 for i in range(4)]
        found = [(255 if data[p & 7] > 127 else 0) if p & 8 else data[p & 7] for p in picked]
        want.append(int.from_bytes(found, "little"))
    assert each("prmt.b32 {d}, {a}, {b}, {c};", np.uint32, a, b, c).tolist() == want


def floats(kind, count: int = 96) -> list[np.ndarray]:
    edges = np.array([0, -0.0, 1, -1.5, np.inf, -np.inf, np.nan, 3e-39, -65504, 1e30], np.float32)
    a = np.concatenate([np.repeat(edges, len(edges))[:64], GENERATOR.normal(size=count - 64).astype(np.float32)])
    b = np.concatenate([np.tile(edges, len(edges))[:64], GENERATOR.normal(size=count - 64).astype(np.float32)])
    with np.errstate(all="ignore"):
        return [a.astype(kind), b.astype(kind), np.roll(a, 7).astype(kind)]


FLOAT = {
    "add.rn": lambda a, b, c: a + b,
    "sub": lambda a, b, c: a - b,
    "mul.rn": lambda a, b, c: a * b,
    "max": lambda a, b, c: np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b))),
    "min.NaN": lambda a, b, c: np.minimum(a, b),
    "neg": lambda a, b, c: -a,
    "abs": lambda a, b, c: np.abs(a),
    "fma.rn": lambda a, b, c: (a.astype(np.float64) * b + c),
}
OPERANDS = {"neg": "{a}", "abs": "{a}", "fma.rn": "{a}, {b}, {c}"}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("opcode", FLOAT)
def test_float_arithmetic(opcode, kind):
    """16-bit floats once as scalars, once as pairs in 32 bits."""
    text = f"{opcode}.{kind} {{d}}, {OPERANDS.get(opcode, '{a}, {b}')};"
    exact = floats(np.float32)
    with np.errstate(all="ignore"):
        if kind == "f32":
            got, want = each(text, np.float32, *exact), FLOAT[opcode](*exact).astype(np.float32)
        else:
            dtype = torch.float16 if kind == "f16" else torch.bfloat16
            rounded = [torch.from_numpy(x).to(dtype) for x in exact]
            bits = [x.view(torch.uint16).numpy() for x in rounded]
            wide = FLOAT[opcode](*(x.float().numpy() for x in rounded)).astype(np.float32)
            want = torch.from_numpy(wide).to(dtype).float().numpy()
            pairs = [np.concatenate([x, x[::-1]]).reshape(2, -1).T.copy().view(np.uint32).ravel() for x in bits]
            both = each(text.replace(kind, f"{kind}x2"), np.uint32, *pairs).view(np.uint16).reshape(-1, 2)
            got = each(text, np.uint16, *bits)
            assert np.array_equal(both[:, 0], got)
            assert np.array_equal(both[:, 1], got[::-1])
            got = torch.from_numpy(got).view(dtype).float().numpy()
    assert np.array_equal(got, want, equal_nan=True)


def test_transcendental_functions_and_flushing():
    x = np.abs(floats(np.float32)[1]) + np.float32(0.5)
    with np.errstate(all="ignore"):
        for opcode, want in (("ex2.approx.ftz", np.exp2(x)), ("lg2.approx", np.log2(x)), ("rcp.rn", 1 / x),
                             ("sqrt.approx", np.sqrt(x)), ("rsqrt.approx", 1 / np.sqrt(x))):  # fmt: skip
            got = each(f"{opcode}.f32 {{d}}, {{a}};", np.float32, x)
            np.testing.assert_allclose(got, want, rtol=2e-7)
    tiny = np.resize(np.array([3e-39, -3e-39, 1], np.float32), 32)
    assert each("mul.ftz.f32 {d}, {a}, 0f3F800000;", np.float32, tiny)[:3].tolist() == [0, 0, 1]
    signs = each("copysign.f32 {d}, {a}, {b};", np.float32, np.full(32, -1, np.float32), np.full(32, 5, np.float32))
    assert (signs == -5).all()


RELATIONS = ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "nan", "num"]


@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "bf16x2"])
def test_comparisons_of_floats(relation, kind):
    """Ordered relations are false where an operand is NaN, unordered ones true; of pairs both predicates are set."""
    a, b, _ = floats(np.float32)
    if kind != "f32":
        dtype = torch.float16 if kind == "f16" else torch.bfloat16
        a, b = (torch.from_numpy(x).to(dtype) for x in (a, b))
        bits, (a, b) = [x.view(torch.uint16).numpy() for x in (a, b)], (x.float().numpy() for x in (a, b))
    else:
        bits = [a, b]
    order = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    no = np.isnan(a) | np.isnan(b)
    want = {"nan": no, "num": ~no}.get(relation)
    if want is None:
        want = order[relation[:2]] | no if relation.endswith("u") else order[relation] & ~no
    if kind == "bf16x2":
        bits = [np.stack([x, x[::-1]], 1).ravel().view(np.uint32) for x in bits]
        text = f"setp.{relation}.bf16x2 %p1|%p2, {{a}}, {{b}}; selp.b32 %r40, 1, 0, %p1; selp.b32 {{d}}, 2, 0, %p2; "
        got = each(text + "or.b32 {d}, {d}, %r40;", np.uint32, *bits)
        assert np.array_equal(got, want + 2 * want[::-1])
    else:
        got = each(f"setp.{relation}.{kind} %p1, {{a}}, {{b}}; selp.b32 {{d}}, 1, 0, %p1;", np.uint32, *bits)
        assert np.array_equal(got, want)


def test_comparisons_of_integers_and_predicates():
    a, b, _ = integers(32)
    first, second = a.view(np.int32) < b.view(np.int32), a >= b
    for combine, want in (("and", first & second), ("or", first | second), ("xor", first ^ second)):
        text = f"setp.hs.u32 %p1, {{a}}, {{b}}; setp.lt.{combine}.s32 %p2, {{a}}, {{b}}, %p1;"
        assert np.array_equal(each(text + "selp.b32 {d}, 1, 0, %p2;", np.uint32, a, b), want)
    text = "setp.lo.u32 %p1, {a}, {b}; not.pred %p2, %p1; xor.pred %p3, %p1, %p2; selp.b32 {d}, 1, 0, %p3;"
    assert each(text, np.uint32, a, b).all()


def test_conversions_of_floats():
    x = floats(np.float32)[0]
    t = torch.from_numpy(x)
    assert each("cvt.rn.bf16.f32 {d}, {a};", np.uint16, x)[:6].tolist() == t.bfloat16().view(torch.uint16)[:6].tolist()
    with np.errstate(all="ignore"):
        assert np.array_equal(each("cvt.rn.f16.f32 {d}, {a};", np.float16, x), x.astype(np.float16), equal_nan=True)
    half = t.bfloat16()
    assert np.array_equal(each("cvt.f32.bf16 {d}, {a};", np.float32, half.view(torch.uint16).numpy()), half.float(),
                          equal_nan=True)  # fmt: skip
    high, low = np.float32([1, -2] * 16), np.float32([0.5, 3] * 16)
    packed = each("cvt.rn.bf16x2.f32 {d}, {a}, {b};", np.uint32, high, low).view(np.uint16).reshape(-1, 2)
    assert torch.equal(torch.from_numpy(packed.copy()).view(torch.bfloat16).float(),
                       torch.from_numpy(np.stack([low, high], 1)))  # fmt: skip
    ties = np.array([0x3F800FFF, 0x3F801000, 0x3F803000, 0x3F800000] * 8, np.uint32)  # away from zero
    want = [0x3F800000, 0x3F802000, 0x3F804000, 0x3F800000] * 8
    assert each("cvt.rna.tf32.f32 {d}, {a};", np.uint32, ties).tolist() == want


def test_conversions_of_integers():
    a, _, _ = integers(32)
    assert np.array_equal(each("cvt.s64.s32 {d}, {a};", np.int64, a), a.view(np.int32).astype(np.int64))
    assert np.array_equal(each("cvt.u64.u32 {d}, {a};", np.uint64, a), a.astype(np.uint64))
    assert np.array_equal(each("cvt.u16.u32 {d}, {a};", np.uint16, a), a.astype(np.uint16))
    assert np.array_equal(each("cvt.s32.s8 {d}, {a};", np.int32, a), a.astype(np.int8).astype(np.int32))
    assert np.array_equal(each("cvt.rn.f32.s32 {d}, {a};", np.float32, a), a.view(np.int32).astype(np.float32))
    x = np.resize(np.array([2.9, -2.9, np.nan, 1e20, -1e20, 0.5], np.float32), 32)
    assert each("cvt.rzi.s32.f32 {d}, {a};", np.int32, x)[:6].tolist() == [2, -2, 0, 2**31 - 1, -(2**31), 0]
    assert each("cvt.rzi.u32.f32 {d}, {a};", np.uint32, x)[:6].tolist() == [2, 0, 0, 2**32 - 1, 0, 0]


def test_moves_pack_and_unpack():
    a = integers(64)[0]
    assert np.array_equal(each("mov.b64 {{%r30, %r31}}, {a}; mov.b64 {d}, {{%r31, %r30}};", np.uint64, a),
                          a >> np.uint64(32) | a << np.uint64(32))  # fmt: skip
    x = integers(32)[0]
    assert np.array_equal(each("mov.b32 {{_, %rs30}}, {a}; mov.b32 {d}, {{%rs30, %rs30}};", np.uint32, x),
                          (x >> np.uint32(16)) * np.uint32(65537))  # fmt: skip


@pytest.mark.parametrize("text", ["lop3.b32 {d}, {a}, {a}, {a}, 3;", "mul24.lo.s32 {d}, {a}, {a};",
                                  "cvt.rni.s32.f32 {d}, {a};", "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {d}, "
                                  "{a}, {a}, {a};", "atom.global.add.u32 {d}, [%rd0], {a};"])  # fmt: skip
def test_an_unknown_instruction_is_named(text):
    with pytest.raises(NotImplementedError, match=text.split(" ")[0].replace(".", r"\.")):
        each(text, np.uint32, np.zeros(32, np.uint32))

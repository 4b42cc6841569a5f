"""Integer, floating-point, half-precision, comparison and conversion instructions.

PTX ISA: "Integer Arithmetic Instructions", "Logic and Shift Instructions", "Floating Point Instructions", "Half
Precision Floating Point Instructions", "Comparison and Selection Instructions", "cvt".
"""

from __future__ import annotations

from .compiler import Emission, bits_of, instruction

FLOAT = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "fma": "fma32({0}, {1}, {2})",
    "max": "np.fmax({0}, {1})", "min": "np.fmin({0}, {1})", "max.NaN": "np.maximum({0}, {1})",
    "min.NaN": "np.minimum({0}, {1})", "neg": "-{0}", "abs": "np.abs({0})", "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})", "rcp": "1 / {0}", "sqrt": "np.sqrt({0})", "rsqrt": "1 / np.sqrt({0})",
    "copysign": "np.copysign({1}, {0})",
}  # fmt: skip
INTEGER = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})",
    "div": "divide({0}, {1})", "rem": "remainder({0}, {1})", "neg": "-{0}", "abs": "np.abs({0})",
    "not": "~{0}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
}  # fmt: skip
LOGIC = {"and": "({0}) & ({1})", "or": "({0}) | ({1})", "xor": "({0}) ^ ({1})", "not": "~({0})"}
COMPARE = {
    "eq": "{0} == {1}", "ne": "({0} != {1}) & ~nan({0}, {1})", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "equ": "({0} == {1}) | nan({0}, {1})", "neu": "{0} != {1}",
    "ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "num": "~nan({0}, {1})", "nan": "nan({0}, {1})",
}  # fmt: skip
COMPARE_INTEGERS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
                    "hi": ">", "hs": ">="}  # fmt: skip


@instruction("add", "sub", "mul", "mad", "fma", "min", "max", "div", "rem", "neg", "abs", "not", "and", "or", "xor",
             "shl", "shr", "ex2", "lg2", "rcp", "sqrt", "rsqrt", "copysign")  # fmt: skip
def arithmetic(e: Emission) -> list[str]:
    """All of the form ``op.type d, a, b, c``."""
    kind, head, operands = e.op[-1], e.op[0], e.ops[1:]
    if kind == "pred":
        return e.put(e.ops[0], LOGIC[head].format(*(e.typed(o, "pred") for o in operands)))
    if kind in ("bf16x2", "f16x2"):
        low, high = ([f"half_of({e.value(o, 32)}, {i})" for o in operands] for i in (0, 1))
        return e.put(e.ops[0], f"pack2({_half(e, kind[:-2], low)}, {_half(e, kind[:-2], high)})")
    if kind in ("bf16", "f16"):
        return e.put(e.ops[0], _half(e, kind, [e.value(o, 16) for o in operands]))
    if kind == "s16x2":
        e.need(head == "add")
        a, b = (e.value(o, 32) for o in operands)
        return e.put(e.ops[0], f"pack2(half_of({a}, 0) + half_of({b}, 0), half_of({a}, 1) + half_of({b}, 1))")
    if kind[0] == "f":
        return e.put(e.ops[0], _float(e, kind, operands))
    return e.put(e.ops[0], _integer(e, kind, operands))


def _operation(e: Emission, table: dict[str, str]) -> str:
    name = e.op[0] + (".NaN" if "NaN" in e.op else "")
    if name not in table:
        raise e.unknown()
    return table[name]


def _float(e: Emission, kind: str, operands: list[str]) -> str:
    expression = _operation(e, FLOAT)
    if kind == "f64" and e.op[0] == "fma":
        expression = "{0} * {1} + {2}"
    expression = expression.format(*(e.typed(o, kind) for o in operands))
    if "ftz" in e.op:
        expression = f"flush({expression})"
    return f"({expression}).astype(F{kind[1:]}).view(U{kind[1:]})"


def _half(e: Emission, kind: str, bits: list[str]) -> str:
    """Computed in float32, in which the products are exact, and rounded."""
    a = [f"from_bf16({b})" if kind == "bf16" else f"({b}).view(F16).astype(F32)" for b in bits]
    return f"to_{kind}({_operation(e, FLOAT).format(*a)})"


def _integer(e: Emission, kind: str, operands: list[str]) -> str:
    head, bits = e.op[0], bits_of(kind)
    if head in ("shl", "shr"):
        direction = "left" if head == "shl" else "right"
        return f"shift_{direction}({e.typed(operands[0], kind)}, {e.value(operands[1], 32)}).view(U{bits})"
    a = [e.typed(o, kind) for o in operands[:2]]
    if head not in ("mul", "mad"):
        return f"({_operation(e, INTEGER).format(*a)}).view(U{bits})"
    if "wide" in e.op:
        bits *= 2
        product = f"mul_wide({a[0]}, {a[1]})"
    else:
        product = f"mul_hi({a[0]}, {a[1]})" if "hi" in e.op else f"{a[0]} * {a[1]}"
    if head == "mad":
        product += f" + {e.typed(operands[2], f'{kind[0]}{bits}')}"
    return f"({product}).view(U{bits})"


@instruction("setp")
def setp(e: Emission) -> list[str]:
    """``setp.relation[.and|or|xor].type p[|q], a, b[, c]``; of packed halves p and q are one each."""
    names, kind, relation = e.ops[0].split("|"), e.op[-1], e.op[1]

    def compare(a: str, b: str) -> str:
        if kind[0] == "f" or kind.startswith("bf"):
            return COMPARE[relation].format(a, b)
        return f"{a} {COMPARE_INTEGERS[relation]} {b}"

    if kind in ("bf16x2", "f16x2"):
        halves = [[f"from_bf16(half_of({e.value(o, 32)}, {i}))" if kind == "bf16x2" else
                   f"half_of({e.value(o, 32)}, {i}).view(F16).astype(F32)" for o in e.ops[1:3]] for i in (0, 1)]
        lines = [f"x = [{', '.join(compare(*half) for half in halves)}]"]  # before a source is overwritten
        return lines + e.put_all(names, "x")
    e.need(len(names) == 1)
    expression = compare(e.typed(e.ops[1], kind), e.typed(e.ops[2], kind))
    if e.op[2] in ("and", "or", "xor"):
        sign = {"and": "&", "or": "|", "xor": "^"}[e.op[2]]
        expression = f"({expression}) {sign} ({e.typed(e.ops[3], 'pred')})"
    return e.put(names[0], expression)


@instruction("selp")
def selp(e: Emission) -> list[str]:
    bits = bits_of(e.op[-1])
    name, a, b, p = e.ops
    return e.put(name, f"np.where({e.typed(p, 'pred')}, {e.value(a, bits)}, {e.value(b, bits)})")


@instruction("bfe")
def bfe(e: Emission) -> list[str]:
    kind = e.op[-1]
    name, a, *field = e.ops
    position, length = (e.value(o, 32) for o in field)
    return e.put(name, f"bfe({e.value(a, bits_of(kind))}, {position}, {length}, {kind[0] == 's'})")


@instruction("bfi")
def bfi(e: Emission) -> list[str]:
    bits = bits_of(e.op[-1])
    name, a, b, position, length = e.ops
    return e.put(name, f"bfi({e.value(a, bits)}, {e.value(b, bits)}, {e.value(position, 32)}, {e.value(length, 32)})")


@instruction("shf.l.wrap.b32", "shf.r.wrap.b32")
def funnel_shift(e: Emission) -> list[str]:
    """Of the 64 bits {b, a} the upper half after a shift to the left, or the lower one after a shift to the right."""
    name, a, b, count = e.ops
    whole = f"({e.full(b, 32)}.astype(U64) << U64(32) | {e.full(a, 32)})"
    count = f"({e.full(count, 32)} & U32(31))"
    left = e.op[1] == "l"
    return e.put(name, f"({whole} << {count} >> U64(32)).astype(U32)" if left else f"({whole} >> {count}).astype(U32)")


@instruction("prmt.b32")
def prmt(e: Emission) -> list[str]:
    return e.put(e.ops[0], f"prmt({', '.join(e.full(o, 32) for o in e.ops[1:])})")


@instruction("cvt")
def cvt(e: Emission) -> list[str]:
    """``cvt[.rounding].to.from``; two floats are packed with the first in the upper half."""
    to, source = e.op[-2:]
    name, *operands = e.ops
    if to in ("bf16x2", "f16x2"):
        e.need(source == "f32")
        high, low = (f"to_{to[:-2]}({e.typed(o, 'f32')})" for o in operands)
        return e.put(name, f"pack2({low}, {high})")
    a = e.typed(operands[0], source)
    from_float = source in ("bf16", "f16", "f32", "f64")
    if to == "tf32":
        e.need("rna" in e.op)
        return e.put(name, f"to_tf32({a})")
    if to in ("bf16", "f16"):
        return e.put(name, f"to_{to}({a if from_float else f'({a}).astype(F32)'})")
    if to in ("f32", "f64"):
        return e.put(name, f"({a}).astype({to.upper()}).view(U{bits_of(to)})")
    bits = bits_of(to)
    kind = f"{'I' if to[0] == 's' else 'U'}{bits}"
    if from_float:
        e.need("rzi" in e.op)
        low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
        return e.put(name, f"saturating({a}, {kind}, {low}, {high})")
    return e.put(name, f"({a}).astype({kind})")  # a wider register is filled by its sign

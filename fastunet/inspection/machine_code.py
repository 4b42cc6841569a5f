"""What a recorded kernel launch compiles to, read from its machine code; needs no GPU.

:func:`compile_launch` specialises a launch exactly as Triton's own ``kernel[grid](...)`` would and compiles it for any
target; :func:`inspect_all` disassembles results, finds their main loops and counts what an expert would look for;
:func:`failures` says what is wrong with it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastunet.inspection.control_flow import innermost_loops
from fastunet.inspection.disassembly import Code, amd, nvidia
from fastunet.inspection.in_flight import parse_ptx, touched
from fastunet.kernels import _launch
from fastunet.kernels._launch import Launch

GFX942 = 942
"""The number by which this module calls AMD's gfx942 among CUDA's compute capabilities times ten."""

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, GFX942: 64}
"""KiB of shared memory that one program may use (CUDA C++ Programming Guide, table of technical specifications)."""

_PRODUCT = re.compile(r"HGMMA|HMMA|QGMMA|IMMA|UTC\w*MMA|v_mfma_")
_LOAD = re.compile(r"UTMALDG|LDGSTS|LDG|(?:global|buffer)_load_")


@dataclass(frozen=True)
class Dot:
    """One product of a kernel: ``m`` × ``k`` times ``k`` × ``n`` of elements ``dtype``, at ``precision``."""

    m: int
    n: int
    k: int
    dtype: str
    precision: str


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs and what its main loops hold.

    Main loops are the innermost loops with matrix products (or loads, where asked for); ``instructions``, ``products``
    and ``loads`` are those of the one with the most products. ``opcodes`` and ``narrow_loads`` cover all of them; a
    global load is narrow below 16 bytes a thread (8 on AMD).
    A kernel without such a loop has ``main_loops == 0`` and is counted as a whole.
    """

    kernel: str
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int
    main_loops: int
    instructions: int
    products: int
    loads: int
    opcodes: Counter[str]
    narrow_loads: Counter[str]
    dots: tuple[Dot, ...]
    touched: tuple[str, ...]
    """Instructions, of PTX and of SASS, that touch registers of a product in flight."""

    @property
    def loads_per_product(self) -> float:
        """Global or bulk load instructions for each matrix-product instruction of the main loop."""
        return self.loads / self.products if self.products else float("nan")

    def count(self, prefix: str) -> int:
        """Instructions of the main loops whose opcode starts with ``prefix``."""
        return sum(number for opcode, number in self.opcodes.items() if opcode.startswith(prefix))


def target_of(architecture: int) -> GPUTarget:
    """Triton's compilation target for a compute capability times ten, or for :data:`GFX942`."""
    if architecture == GFX942:
        return GPUTarget("hip", "gfx942", 64)
    return GPUTarget("cuda", architecture, 32)


def specialise(launch: Launch, architecture: int) -> tuple[ASTSource, dict[str, Any]]:
    """The source and the options that Triton's just-in-time compiler would make of ``launch``.

    Raises:
        RuntimeError: the kernels were decorated for the interpreter, which has no machine code.
    """
    if _launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels were built for the interpreter and cannot be compiled")
    backend, bind = _binder(launch.kernel, architecture)
    given = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, debug=False, enable_fp_fusion=True)
    bound, specialization, _ = bind(**launch.args, **given)
    pack = launch.kernel._pack_args
    options, signature, constants, attributes = pack(backend, given, bound, specialization, given)
    return ASTSource(launch.kernel, signature, constants, attributes), options.__dict__


@functools.cache
def _binder(kernel: Any, architecture: int) -> tuple[Any, Any]:
    """Triton's backend, and its function that binds and specialises a call's arguments."""
    backend = make_backend(target_of(architecture))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def compiled_key(launch: Launch, architecture: int) -> str:
    """Equal for two launches exactly where Triton would compile one kernel for both."""
    source, options = specialise(launch, architecture)
    parts = source.signature, sorted(source.constants.items(), key=str), sorted(source.attrs.items(), key=str)
    return f"{launch.kernel.__name__} {parts} {options['num_warps']} {options['num_stages']}"


def compile_launch(launch: Launch, architecture: int) -> Any:
    """The compiled kernel of ``launch`` for ``architecture``; Triton's cache on disk makes a repeat cheap."""
    source, options = specialise(launch, architecture)
    return triton.compile(source, target=target_of(architecture), options=options)


def intermediate(launch: Launch, architecture: int) -> str:
    """The Triton IR of ``launch``, as in ``compile_launch(launch, architecture).asm["ttir"]``, but no code is made: a
    tenth of the time."""
    source, given = specialise(launch, architecture)
    target = target_of(architecture)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(given)
    module = source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(),
                            context)  # fmt: skip
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def inspect(compiled: Any, architecture: int, around: str = "products") -> Report:
    """:func:`inspect_all` of one kernel."""
    return inspect_all([compiled], architecture, around)[0]


def inspect_all(compiled: Sequence[Any], architecture: int, around: str = "products") -> list[Report]:
    """Reads the registers, the memory and the main loops of compiled kernels: those around "products" or "loads".

    The disassembler, whose start takes longer than a kernel, runs once for all of them.
    """
    if architecture == GFX942:
        codes = [amd(kernel.asm["amdgcn"]) for kernel in compiled]
    else:
        codes = nvidia([kernel.asm["cubin"] for kernel in compiled], architecture)
    return [_report(kernel, code, architecture, around) for kernel, code in zip(compiled, codes)]


def _report(compiled: Any, code: Code, architecture: int, around: str) -> Report:
    instructions = code.instructions
    products = {i.address for i in instructions if _PRODUCT.match(i.opcode)}
    marked = products if around == "products" else {i.address for i in instructions if _LOAD.match(i.opcode)}
    loops = innermost_loops(instructions, marked)
    touched_in_flight: tuple[str, ...] = ()
    if architecture == 90:
        touched_in_flight = (*touched(parse_ptx(compiled.asm["ptx"]), "ptx"), *touched(instructions, "sass"))
    bodies = loops or [instructions]
    main = max(bodies, key=lambda body: (sum(i.address in products for i in body), len(body)))
    inside = {i.address: i for body in bodies for i in body}.values()
    # a wavefront has twice the threads of a warp, so that each loads half as much of the same tile
    narrow = 8 if architecture == GFX942 else 16
    return Report(
        kernel=compiled.metadata.name,
        architecture=architecture,
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        shared=compiled.metadata.shared,
        main_loops=len(loops),
        instructions=len(main),
        products=sum(i.address in products for i in main),
        loads=sum(bool(_LOAD.match(i.opcode)) for i in main),
        opcodes=Counter(i.opcode for i in inside),
        narrow_loads=Counter(i.opcode for i in inside if _load_bytes(i.opcode) < narrow),
        dots=_dots(compiled.asm["ttir"]),
        touched=touched_in_flight,
    )


def failures(report: Report, launch: Launch) -> list[str]:
    """What is wrong with a kernel compiled for ``report.architecture``, one sentence each; empty if nothing is.

    Checked: registers spilled or local memory used, shared memory over the limit, Hopper's and Blackwell's
    asynchronous products missing where a product's shape allows them, and products that wait for one another (ptxas'
    warning C7515 is one cause). In the main loop of a launch whose pixels all are whole 16-byte pieces, so that bulk
    copies can feed the products from shared memory: ``ldmatrix``, and narrow global loads.
    """
    found = []
    if report.stack or report.spills:
        found.append(f"uses local memory: a stack of {report.stack} bytes, {report.spills} instructions on it")
    limit = SHARED_LIMIT[report.architecture] * 1024
    if report.shared > limit:
        found.append(f"needs {report.shared} bytes of shared memory, more than the {limit} there are")
    if report.architecture in (90, 100) and any(_asynchronous(dot) for dot in report.dots):
        prefix = {90: "HGMMA", 100: "UTC"}[report.architecture]
        if not report.count(prefix):
            found.append(f"multiplies without {prefix} though its products allow it: {_shapes(report)}")
        elif report.main_loops and report.count("LDSM") and _aligned(launch):
            found.append(f"passes {report.count('LDSM')} operands through registers (LDSM) in its main loop")
        elif report.main_loops and report.count("WARPGROUP.DEPBAR") > _most_waits(report):
            waits, products = report.count("WARPGROUP.DEPBAR"), report.count("HGMMA")
            found.append(f"waits {waits} times for its {products} products, more than {_most_waits(report)}")
    if report.touched:
        found.append(f"touches registers of a product in flight {len(report.touched)} times: {report.touched[0]}")
    if report.main_loops and report.narrow_loads and _aligned(launch):
        loads = ", ".join(f"{number} {opcode}" for opcode, number in sorted(report.narrow_loads.items()))
        found.append(f"has narrow global loads in its main loop: {loads}")
    return found


def _most_waits(report: Report) -> int:
    """One wait for four products where each tile's reduction, of 128 bytes or more, is four of them; else fewer waits
    than products."""
    products = report.count("HGMMA")
    whole = all(dot.k * (4 if dot.dtype == "f32" else 2) >= 128 for dot in report.dots)
    return max(1, products // 4 if whole else products - 1)


def _asynchronous(dot: Dot) -> bool:
    """Whether ``wgmma`` or ``tcgen05`` can compute a product: 64 rows or more, 16-bit or tf32 operands."""
    if dot.dtype == "f32" and dot.precision != "tf32":
        return False
    return dot.m >= 64 and dot.n >= 8 and dot.dtype in ("f16", "bf16", "f32")


def _shapes(report: Report) -> str:
    return ", ".join(f"{d.m}×{d.n}×{d.k} {d.dtype}" for d in report.dots)


def _aligned(launch: Launch) -> bool:
    """Whether every image of the launch has pixels of whole 16-byte pieces, so that no load needs to be narrow."""
    bases = [getattr(value, "base", value) for value in launch.args.values()]
    images = [b for b in bases if isinstance(b, torch.Tensor) and b.dim() == 4]
    return bool(images) and all(image.shape[1] * image.element_size() % 16 == 0 for image in images)


def _dots(ttir: str) -> tuple[Dot, ...]:
    pattern = re.compile(
        r"tt\.dot .*?(?:inputPrecision = (\w+))?\s*:\s*tensor<(\d+)x(\d+)x(\w+)> \* tensor<\d+x(\d+)x\w+>"
    )
    found = {Dot(int(m), int(n), int(k), dtype, precision or "ieee")
             for precision, m, k, dtype, n in pattern.findall(ttir)}  # fmt: skip
    return tuple(sorted(found, key=lambda d: (d.m, d.n, d.k)))


def _load_bytes(opcode: str) -> int:
    """Bytes that a global load instruction moves per thread; 16 for anything else."""
    if opcode.startswith(("LDG.", "LDGSTS.")):
        if ".128" in opcode:
            return 16
        return 8 if ".64" in opcode else 2 if ".U16" in opcode or ".S16" in opcode else 1 if "8" in opcode else 4
    if opcode.startswith(("global_load_", "buffer_load_")):
        widths = {"x4": 16, "x3": 12, "x2": 8, "dword": 4, "short": 2, "byte": 1}
        return next((size for word, size in widths.items() if word in opcode), 2)
    return 16

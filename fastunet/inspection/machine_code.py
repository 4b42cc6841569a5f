"""What a recorded kernel launch compiles to, read from its machine code; needs no GPU.

:func:`compile_launch` specialises a launch exactly as Triton's own ``kernel[grid](...)`` would and compiles it for any
target; :func:`inspect` disassembles the result, finds its main loops and counts what an expert would look for;
:func:`failures` says what is wrong with it.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastunet.inspection.control_flow import Instruction, found_in, innermost_loops
from fastunet.inspection.in_flight import parse_ptx, touched
from fastunet.kernels import _launch
from fastunet.kernels._launch import Launch

GFX942 = 942
"""The number by which this module calls AMD's gfx942 among CUDA's compute capabilities times ten."""

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, GFX942: 64}
"""KiB of shared memory that one program may use (CUDA C++ Programming Guide, table of technical specifications)."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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


def inspect(compiled: Any, architecture: int, around: str = "products") -> Report:
    """Reads the registers, the memory and the main loops of a compiled kernel: those around "products" or "loads"."""
    read = _read_amdgcn if architecture == GFX942 else _read_cubin
    registers, stack, spills, instructions = read(compiled)
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
        registers=registers,
        stack=stack,
        spills=spills,
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


def _read_cubin(compiled: Any) -> tuple[int, int, int, list[Instruction]]:
    """Registers, stack bytes, spill instructions and the instructions of an NVIDIA binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        text = _run("nvdisasm", "-c", "-ndf", file.name)  # without data flow: the same text, sooner
    registers, stack = map(int, found_in(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions: list[Instruction] = []
    labels: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels.append(label[1])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            instructions.append(_sass(int(found[1], 16), found[2], tuple(labels)))
            labels = []
    return registers, stack, sum(i.opcode.startswith(("LDL", "STL")) for i in instructions), instructions


def _sass(address: int, text: str, labels: tuple[str, ...]) -> Instruction:
    guard, opcode, rest = found_in(r"^(@!?U?P\w+\s+)?(\S+)\s*(.*)", text).groups()
    branch = re.search(r"`\((\.L_\w+)\)", rest) if opcode.startswith("BRA") else None
    # a branch is conditional by its guard or by a predicate operand: "BRA.U UP0, `(.L_x_1)"
    conditional = guard is not None or "P" in rest.partition("`")[0]
    ends = opcode.startswith(("BRA", "EXIT", "RET", "BRX")) and not conditional
    return Instruction(address, opcode, labels, branch[1] if branch else None, falls_through=not ends,
                       text=f"{opcode} {rest}")  # fmt: skip


def _read_amdgcn(compiled: Any) -> tuple[int, int, int, list[Instruction]]:
    """Registers, scratch bytes, instructions on scratch and the instructions of an AMD assembly text."""
    text = compiled.asm["amdgcn"]
    code = text.partition("s_endpgm")[0] + "s_endpgm"
    instructions: list[Instruction] = []
    labels: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels.append(label[1])
        elif found := re.match(r"\t([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|scratch_\w+)\s*([^;]*)", line):
            opcode, operands = found[1], found[2].strip()
            target = operands if opcode.startswith(("s_branch", "s_cbranch")) else None
            ends = opcode in ("s_branch", "s_endpgm")
            instructions.append(Instruction(len(instructions), opcode, tuple(labels), target, falls_through=not ends))
            labels = []
    # registers that the compiler calls spilled but keeps in other registers cost no memory traffic
    spills = sum(i.opcode.startswith("scratch_") for i in instructions)
    registers, scratch = (int(found_in(rf"\.{field}:\s+(\d+)", text)[1])
                          for field in ("vgpr_count", "private_segment_fixed_size"))  # fmt: skip
    return registers, scratch, spills, instructions


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout

"""What every launcher shares: allocation, dtype policy, descriptors, and the one place a kernel starts from.

Naming code of this folder: ``x_ptr`` a pointer, ``x_desc`` a tensor descriptor, ``X_STRIDES`` a stride tuple,
``BLOCK_M`` a tile side, ``offs_m`` the indices along it, ``m_mask`` their validity, ``HAS_BIAS`` a compile-time flag.
Activations are logical NCHW tensors in ``channels_last`` memory, so that kernels see NHWC rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._limits import check_sizes

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True when the kernels were decorated for the interpreter (``TRITON_INTERPRET=1`` at import)."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch as it would have been made: enough to compile it ahead of time and to count its traffic."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    num_stages: int
    architecture: int


@dataclass(frozen=True)
class Started:
    """A launch that was made: the kernel, what it was compiled to, its grid, and its arguments in order."""

    kernel: Any
    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


@dataclass
class _State:
    poison: bool = False
    capabilities: dict[int, int] = field(default_factory=dict)


class _Thread(threading.local):
    """What one thread alone is told: launches to record or trace, the architecture to choose for, weights to keep."""

    records: list[Launch] | None = None
    architecture: int | None = None
    started: list[Started] | None = None
    kept_weights: Any = None


_state = _State()
thread = _Thread()


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any):
    """Starts ``kernel`` on ``grid``, or records it inside :func:`recording`. An empty grid starts nothing."""
    if 0 in grid:
        return
    check_sizes(kernel.__name__, (*args, *kwargs.values()))
    if thread.records is not None:
        bound = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        thread.records.append(Launch(kernel, grid, bound, num_warps, num_stages, architecture()))
        return
    # stated, because Triton 3.10 turns off by default the fusion of multiplication and addition that 3.9 has on
    compiled = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **kwargs)
    if thread.started is not None:
        arguments = [*args, *(kwargs[name] for name in kernel.arg_names[len(args) :])]
        thread.started.append(Started(kernel, compiled, grid, arguments))


@contextlib.contextmanager
def tracing() -> Iterator[list[Started]]:
    """Collects this thread's launches while they are made."""
    thread.started = started = []
    try:
        yield started
    finally:
        thread.started = None


def observed() -> bool:
    """Whether launches are interpreted, recorded, poisoned, or spared by kept weights: none that a plan may repeat."""
    told = (thread.kept_weights, thread.records, thread.architecture)
    return INTERPRETED or _state.poison or any(each is not None for each in told)


@contextlib.contextmanager
def recording(architecture: int) -> Iterator[list[Launch]]:
    """Collects launches instead of making them; run launchers on ``meta`` tensors inside.

    ``architecture`` is the compute capability times ten (80, 90, 100) for which configurations are chosen.
    """
    previous = thread.records, thread.architecture
    thread.records, thread.architecture = [], architecture
    try:
        yield thread.records
    finally:
        thread.records, thread.architecture = previous


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills every tensor that a launcher allocates with NaN (255 for uint8), so that an unwritten element shows."""
    previous, _state.poison = _state.poison, True
    try:
        yield
    finally:
        _state.poison = previous


def architecture() -> int:
    """Compute capability times ten of the current device; 90 in the interpreter unless :func:`recording` says other."""
    if thread.architecture is not None:
        return thread.architecture
    if INTERPRETED:
        return 90
    index = torch.cuda.current_device()
    if index not in _state.capabilities:
        major, minor = torch.cuda.get_device_capability(index)
        _state.capabilities[index] = 10 * major + minor
    return _state.capabilities[index]


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous uninitialised tensor. Launchers allocate through here and :func:`empty_image` only."""
    return _fill(torch.empty(shape, dtype=dtype, device=device))


def empty_image(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised logical NCHW tensor in NHWC memory."""
    return _fill(torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last))


def _fill(tensor: torch.Tensor) -> torch.Tensor:
    if _state.poison:
        tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 255)
    return tensor


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """``x`` with NHWC memory and exactly the strides (H·W·C, 1, W·C, C), also where torch's own test is lenient.

    PyTorch calls a tensor with C == 1 or H == W == 1 channels_last whatever its strides are; kernels rely on them.
    """
    _, c, h, w = x.shape
    if x.stride() == (h * w * c, 1, w * c, c):
        return x
    out = torch.empty_strided(x.shape, (h * w * c, 1, w * c, c), dtype=x.dtype, device=x.device)
    return out.copy_(x)


def image_descriptor(x: torch.Tensor, box: tuple[int, int, int, int]) -> TensorDescriptor:
    """A bulk-copy descriptor of the NHWC memory of logical NCHW ``x`` with a box of (1, BH, BW, BC)."""
    n, c, h, w = x.shape
    return TensorDescriptor(x, [n, h, w, c], [h * w * c, w * c, c, 1], list(box))


def matrix_descriptor(x: torch.Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """A bulk-copy descriptor of a contiguous matrix."""
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], list(box))


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes microseconds, being made for compile-time values too."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least ``n`` >= 1."""
    return 1 << (n - 1).bit_length()


def bulk_copy_fits(x: torch.Tensor) -> bool:
    """Whether NHWC rows of ``x`` obey the 16-byte rule of bulk tensor copies."""
    return x.shape[1] * x.element_size() % 16 == 0 and (x.is_meta or x.data_ptr() % 16 == 0)


def vector_width(x: torch.Tensor) -> int:
    """Channels of ``x`` that one access may hold: the widest power of two that divides C, 16 bytes at most."""
    return next(width for width in (16 // x.element_size(), 4, 2, 1) if x.shape[1] % width == 0)


def tf32() -> bool:
    """Whether PyTorch's convolutions may round float32 operands to tf32.

    Since PyTorch 2.9 that is one of several settings which inherit from each other; once one of them has been set,
    reading the older ``allow_tf32`` may raise.
    """
    settings = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(settings, "fp32_precision"):
        return settings.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def dot_precision(dtype: torch.dtype) -> str:
    """How :func:`mma` multiplies: "tf32" or "ieee" for float32 as PyTorch's convolutions are set, else "half".

    "upcast" (interpreter only) widens bfloat16 operands, which the interpreter's ``tl.dot`` multiplies wrongly.
    """
    if dtype == torch.float32:
        return "tf32" if tf32() and not INTERPRETED else "ieee"
    return "upcast" if INTERPRETED and dtype == torch.bfloat16 else "half"


@triton.jit
def mma(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in fp32, by :func:`dot_precision`."""
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif PRECISION == "half":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def activation(x, SLOPE: tl.constexpr):
    """x where it is positive, else SLOPE times x: 0 is ReLU, 1 nothing; keeps NaN, as PyTorch's do."""
    if SLOPE == 0:
        x = tl.where(x < 0, 0.0, x)
    elif SLOPE != 1:
        x = tl.where(x > 0, x, x * SLOPE)
    return x


@triton.jit
def activation_gradient(dy, y, SLOPE: tl.constexpr):
    """dy times the derivative of :func:`activation` at its result y, which has the sign of what it was applied to."""
    if SLOPE == 0:
        dy = tl.where(y <= 0, 0.0, dy)
    elif SLOPE != 1:
        dy = tl.where(y > 0, dy, dy.to(tl.float32) * SLOPE)
    return dy

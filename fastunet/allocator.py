"""What glibc does with freed memory; another C library is left alone.

By default it returns large blocks to the system. Getting them back costs page faults, most where most is allocated.
"""

from __future__ import annotations

import contextlib
import ctypes

import torch

_LARGEST = (32 << 20) - (8 << 10)
"""Bytes of the largest block from whose size glibc learns, with room for what it adds."""


def keep_freed_memory() -> None:
    """For a process that is all ours: keeps all that is freed, as the allocators that PyTorch recommends on CPUs do."""
    trim_threshold, most_mappings = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(most_mappings, 0)


def keep_some_freed_memory() -> None:
    """For any process: keeps up to 64 MiB of freed blocks of up to 32 MiB, unless it was told otherwise.

    glibc does so by itself once a program has freed a block of 32 MiB, and this frees one, unwritten.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)

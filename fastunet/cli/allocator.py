"""What the C library does with freed memory, in a process that is all ours."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed, as the allocators that PyTorch recommends on CPUs do.

    By default it returns large blocks to the system; getting them back costs page faults, most where most is allocated.
    """
    trim_threshold, most_mappings = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, 2**31 - 1)
        library.mallopt(most_mappings, 0)

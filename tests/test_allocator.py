"""What glibc keeps of freed memory, counted in page faults."""

import platform

import pytest
import torch

from fastunet import UNet

from . import processes

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")


_FAULTS = 5000
"""Of 4 KiB each a fifth of what four calls allocate."""


def _returned() -> int:
    """0 if a frozen network finds the memory of its last calls again, else 2; an error would be 1."""
    import resource

    frozen, x = UNet(width=8).eval().freeze(), torch.randn(4, 2, 256, 256)
    for call in range(8):
        frozen(x)
        if call == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return 2 * int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before > _FAULTS)


def test_a_frozen_network_finds_the_memory_of_its_last_call():
    process = processes.start(_returned)
    process.join()
    assert process.exitcode == 0

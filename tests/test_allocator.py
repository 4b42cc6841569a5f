"""What glibc keeps of freed memory, counted in page faults."""

import platform

import pytest
import torch

from fastunet import UNet

from . import processes

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")


def _faults() -> int:
    """Page faults of four calls of a frozen network, in thousands; what it allocates would be 24 (4 KiB each)."""
    import resource

    frozen, x = UNet(width=8).eval().freeze(), torch.randn(4, 2, 256, 256)
    for call in range(8):
        frozen(x)
        if call == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 1000


def test_a_frozen_network_finds_the_memory_of_its_last_call():
    process = processes.start(_faults)
    process.join()
    assert process.exitcode <= 4

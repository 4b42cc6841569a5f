"""A Triton driver without a device: kernels compile for it and start as usual, up to the call into the GPU driver.

What is left is what the processor spends on a launch, and a look at the arguments that the GPU would have got.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia import driver as nvidia

from fastunet.kernels import _launch


class _Utilities:
    """The C functions of a driver, which here do nothing."""

    def __init__(self, launch: Callable[..., None]):
        self.launch = launch

    def load_binary(self, name, binary, shared, device):
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 1 << 16}

    def fill_tma_descriptor(self, address, *description):
        """A stand-in for the encoded descriptor, from which what it holds can be read."""
        return address, description

    fill_tma_descriptor_tiled = fill_tma_descriptor

    def unload_module(self, module):
        pass


class HostDriver(DriverBase):
    """Compiles for compute capability ``architecture`` / 10; ``launch(*arguments)`` is called for each launch."""

    def __init__(self, architecture: int, launch: Callable[..., None]):
        self.architecture, self.utils = architecture, _Utilities(launch)
        self.launcher_cls = self._launcher

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("there is nothing to time without a device")

    def map_python_to_cpp_type(self, ty):
        return ty

    def allocate_default_profile_scratch(self, size, align, stream):
        return None

    @staticmethod
    def is_active():
        return True

    def _launcher(self, source, metadata):
        """The Python half of Triton's launcher; its compiled half would need the GPU's driver library."""
        launcher = object.__new__(nvidia.CudaLauncher)
        launcher.num_ctas, launcher.gsan_enabled = 1, False
        launcher.arg_annotations = launcher.kernel_signature = None
        descriptors = getattr(metadata, "tensordesc_meta", None)
        launcher.launch = nvidia.wrap_handle_tensordesc(self.utils.launch, dict(source.signature), descriptors)
        for name in ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align",
                     "launch_cooperative_grid", "launch_pdl"):  # fmt: skip
            setattr(launcher, name, getattr(metadata, name))
        return launcher


@contextlib.contextmanager
def host_driver(architecture: int = 90) -> Iterator[list[tuple[Any, ...]]]:
    """Launches on CPU tensors end in the list that this yields, as flat tuples of what the GPU's driver would get.

    Kernels that were started before keep their driver: use it in a process that has started none.
    """
    started: list[tuple[Any, ...]] = []
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(HostDriver(architecture, lambda *arguments: started.append(arguments)))
    major, minor = divmod(architecture, 10)
    try:
        with mock.patch.multiple(torch.cuda, current_device=lambda: 0, get_device_name=lambda index: "none",
                                 get_device_capability=lambda index=None: (major, minor)):  # fmt: skip
            _launch._state.capabilities.clear()
            yield started
    finally:
        _launch._state.capabilities.clear()
        triton.runtime.driver._active = previous

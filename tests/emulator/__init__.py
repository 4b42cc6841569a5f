"""An emulator of the PTX that Triton emits for sm_80 and sm_90: compiled kernels run without a GPU.

It reads downwards: parser.py; global_memory.py and shared_memory.py; numbers.py; compiler.py, which turns each
instruction into NumPy; the families of instructions arithmetic.py, moves.py, warps.py, tensor_core.py,
asynchronous.py, wgmma.py, barriers.py and bulk_copies.py; machine.py with threads and control flow; launch.py with
schedules and memory; driver.py for Triton; plugin.py and __main__.py for the tests of the kernels.

What is exact and what is not: integers and single operations on floats are; sums of products are rounded in another
order than a tensor core's; division, roots and exponentials are NumPy's, not a GPU's approximations.
"""

ARCHITECTURE: int | None = None
"""Compute capability times ten while the plugin runs tests in the emulator."""
TF32 = False
"""Whether float32 products are to be tf32."""

"""Every kernel runs compiled, in bfloat16 for sm_90 and, slowly, by pointers for sm_80: a subset of tests/kernels."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import fastunet.kernels
from fastunet.kernels import _launch

from . import campaign, proof
from .plugin import logged

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="kernels are interpreted in this process, not compiled")


def every_kernel() -> set[str]:
    """What is launched by itself: by convention its name ends in ``_kernel``."""
    found = set()
    for module in pkgutil.walk_packages(fastunet.kernels.__path__, "fastunet.kernels."):
        found |= {name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}
    return found


def results(target: campaign.Target, log, **options) -> list[dict]:
    campaign.run(target, log, **options)
    rows = logged(log)
    print(proof.table(rows))
    tests = [row for row in rows if "test" in row]
    failed = [(row["test"], row["message"]) for row in tests if row["outcome"] == "failed"]
    assert tests
    assert not failed
    return tests


def test_every_kernel_on_sm_90(tmp_path):
    tests = results(campaign.Target(90, "newest", False), tmp_path / "log.jsonl", subset=True)
    launched = {kernel for row in tests for kernel in row["launches"]}
    assert launched == every_kernel()


@pytest.mark.slow
def test_sm_80(tmp_path):
    """By cp.async and mma.sync: one forward pass and its gradients."""
    some = "(forward_pool and pointer and 1x0+24-16x15x17) or (pointer2x1 and 33x3) or (upsample_conv and 1x33x4x7)"
    files = "test_conv_relu.py", "test_conv_relu_weight_grad.py", "test_upsample_conv.py"
    tests = results(campaign.Target(80, "newest", False), tmp_path / "log.jsonl", dtype="bf16", keyword=some,
                    files=files)  # fmt: skip
    assert {"conv_relu_pointer_kernel", "stride2_forward_kernel"} <= {k for row in tests for k in row["launches"]}

"""What ``fastunet warm-up`` compiles is what a network's calls then find in Triton's cache."""

from __future__ import annotations

import multiprocessing
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from bench.gpu.host_driver import host_driver
from fastunet.architecture import Architecture
from fastunet.cli import main
from fastunet.inspection.layers import network_calls
from fastunet.inspection.warm_up import Work, warm_up
from fastunet.inspection.warm_up import kernels as kernels_of
from fastunet.kernels import _launch
from tests.cli_helpers import assert_user_error

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

NETWORK = Architecture(width=40, depth=1)  # as no other test has it, so that nothing is in memory


def kernels(folder: Path) -> set[Path]:
    return set(folder.rglob("*.cubin"))


@pytest.mark.slow
def test_nothing_is_left_to_compile(no_code, monkeypatch):
    threads = SimpleNamespace(Pool=ThreadPool)  # a process of its own would make code
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: threads)
    folder, told = Path(no_code), []
    number = warm_up([Work(NETWORK, (16, 16), 2, "bf16", 90)], 1, lambda *progress: told.append(progress))
    assert told == [(done, number) for done in range(1, number + 1)]
    ready = kernels(folder)
    assert len(ready) == number
    hits = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **told: hits.append(told["cache_hit"]))
    with host_driver():
        for call in network_calls(NETWORK, 2, 16, 16):
            call.launcher()(*call.random(torch.bfloat16, "cpu"))
        for call in network_calls(NETWORK, 2, 16, 16, training=False, output="labels"):
            call.launcher()(*call.random(torch.bfloat16, "cpu"))
    assert kernels(folder) == ready
    assert len(hits) > 10  # some kernels are in memory already, from other tests
    assert all(hits)


def test_bad_input(capsys):
    assert_user_error(capsys, main(["warm-up", "--architecture", "70"]), "--architecture is 70", "90")
    assert_user_error(capsys, main(["warm-up", "--preset", "isbi", "--size", "63"]), "63×63", "188")
    assert_user_error(capsys, main(["warm-up", "run", "--preset", "isbi"]), "--preset isbi", "run")
    assert_user_error(capsys, main(["warm-up", "nowhere"]), "nowhere")


def test_networks_with_norms_have_their_kernels_listed():
    network = Architecture.from_preset("nnunet2d", width=16, depth=1)
    names = {use.launch.kernel.__name__ for use in kernels_of(Work(network, (16, 16), 2, "bf16", 90))}
    assert {"norm_forward_kernel", "norm_data_grad_kernel", "stride2_weight_grad_kernel"} <= names

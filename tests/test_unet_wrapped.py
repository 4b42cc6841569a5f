"""The fused network inside what shards, averages or adapts it, in two processes where that takes two."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from fastunet import UNet, reference

ROOT = Path(__file__).parents[1]

PRELUDE = """
    import os, sys, torch, warnings
    import torch.distributed as dist
    from fastunet import UNet, reference
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
    def build(kind):
        torch.manual_seed(0)
        return kind(width=4, depth=2, dropout=0.0)
    torch.manual_seed(1)
    images = torch.randn(4, 2, 16, 12)
    mine = images[2 * rank : 2 * rank + 2]
    plain = build(reference.UNet)
    plain(images).square().mean().backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    def check(name, gradient):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m: f"{name}: {m}")
"""

SCRIPTS = {
    "DistributedDataParallel": """
        from torch.nn.parallel import DistributedDataParallel
        for option in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters"):
            model = DistributedDataParallel(build(UNet), **{option: True})
            for step in range(2):
                model.zero_grad(set_to_none=True)
                model(mine).square().mean().backward()
            for name, p in model.module.named_parameters():
                check(name, p.grad)
    """,
    "FSDP2 per block": """
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        mesh = init_device_mesh("cpu", (2,))
        model = build(UNet)
        for block in (*model.encoders, model.bottleneck, *model.decoders, model.head):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model(mine).square().mean().backward()
        for name, p in model.named_parameters():
            check(name, p.grad.full_tensor())
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        before = model(mine).square().mean().item()
        optimiser.step()
        assert model(mine).square().mean().item() < before
    """,
}


@pytest.mark.parametrize("wrapper", SCRIPTS)
def test_two_processes_train_as_the_plain_build_does(wrapper, tmp_path):
    script = tmp_path / "script.py"
    body = textwrap.dedent(PRELUDE) + textwrap.dedent(SCRIPTS[wrapper])
    script.write_text(body + "\ndist.destroy_process_group()\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    processes = [subprocess.Popen([sys.executable, script, str(rank), address], cwd=ROOT, stderr=subprocess.PIPE,
                                  text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) for rank in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


def test_lora_of_peft_moves_the_output_and_learns():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    x, found = torch.randn(2, 2, 16, 16), []
    for build in (reference.UNet, UNet):
        torch.manual_seed(0)
        model = build(width=4, depth=2, dropout=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False)
            adapted = peft.get_peft_model(model, config)
            y = adapted(x)
            y.square().mean().backward()
            gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
            merged = adapted.merge_and_unload()(x)
        found.append((y.detach(), gradients, merged.detach()))
    (want, want_gradients, _), (got, gradients, merged) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, want, rtol=1e-3, atol=1e-4)
    assert len(gradients) == len(want_gradients) > 0
    torch.testing.assert_close(gradients, want_gradients, rtol=1e-3, atol=1e-5)


def test_quantisation_aware_training_observes_every_layer():
    quantization = pytest.importorskip("torch.ao.quantization", reason="this PyTorch has no torch.ao")
    x, found = torch.randn(2, 2, 16, 16), []
    for build in (reference.UNet, UNet):
        torch.manual_seed(0)
        model = build(width=4, depth=2, dropout=0.0).train()
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = quantization.prepare_qat(model)
            y = prepared(x)
            y.square().mean().backward()
        scales = {k: v for k, v in prepared.state_dict().items() if "activation_post_process.min_val" in k}
        found.append((y.detach(), scales, [p.grad for p in prepared.parameters()]))
    (want, want_scales, want_gradients), (got, scales, gradients) = found
    assert scales.keys() == want_scales.keys() != set()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, want_gradients, rtol=1e-3, atol=1e-5)

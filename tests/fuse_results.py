"""What a module and its fused copy give, compared: outputs, gradients and statistics in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastunet import fuse
from tests.fuse_nets import NETS


def randomised(net: nn.Module) -> nn.Module:
    """Biases, norms and running statistics that are not 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point() and tensor.dim() < 2:
                tensor.copy_(torch.rand_like(tensor) + (0.5 if "var" in name or "weight" in name else -0.5))
    return net


def outcome(net: nn.Module, x: torch.Tensor, steps: int = 2) -> dict[str, torch.Tensor]:
    """Outputs, gradients of images and parameters, and buffers, of some steps."""
    found = {}
    for step in range(steps):
        net.zero_grad(set_to_none=True)
        images = x.clone().requires_grad_()
        outputs = net(images)
        for index, y in enumerate(outputs if isinstance(outputs, list | tuple) else [outputs]):
            found[f"output {step} {index}"] = y.detach().clone()
            weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(y.dtype).view(y.shape)
            (y * weights).sum().backward(retain_graph=True)
        found[f"d images {step}"] = images.grad
        found |= {f"d {name} {step}": p.grad for name, p in net.named_parameters() if p.grad is not None}
        found |= {f"{name} {step}": b.clone() for name, b in net.named_buffers()}
    return found


def same(fused: nn.Module, net: nn.Module, x: torch.Tensor) -> None:
    got, want = outcome(fused, x), outcome(net, x)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-9 * (1 + tensor.abs().max().item()), msg=told)


def pair(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A module in float64, and its fused copy."""
    net = randomised(net.double())
    return fuse(net)[0], net


def make(name: str) -> tuple[nn.Module, torch.Tensor]:
    build, shape = NETS[name]
    packages = {"MONAI": "monai", "nnU-Net": "dynamic_network_architectures", "smp": "segmentation_models_pytorch"}
    package = packages.get(name.split()[0])
    if package:
        pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    return build(), torch.randn(shape, dtype=torch.float64)

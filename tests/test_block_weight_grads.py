"""All weight gradients of a block at once: registration, and the blocks that ask for them."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet.functional.blocks import decoder_block, encoder_block
from tests import operators

OPERATOR = torch.ops.fastunet.block_weight_grads


@pytest.mark.parametrize("up", ["none", "upsample", "transpose"])
def test_registration(up):
    dz, x, skip, du, low = (
        torch.randn(2, c, h, w) for c, h, w in ((4, 6, 8), (3, 6, 8), (2, 7, 10), (3, 6, 8), (5, 3, 4))
    )
    ups = (None, None) if up == "none" else (du, low)
    operators.check_registration(OPERATOR.default, dz, x, skip, dz, dz, *ups, 1, up == "transpose", "torch")


class Names(TorchDispatchMode):
    """Names of the weights' operators, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "weight_grad" in function.name():
            self.found.append(function.name().removeprefix("fastunet::"))
        return function(*args, **(kwargs or {}))


def decoder(x, skip, *tensors):
    return decoder_block(x, skip, *tensors, up="upsample")


SHAPES = {
    encoder_block: [(1, 3, 8, 8), (4, 3, 3, 3), (4,), (4, 4, 3, 3), (4,)],
    decoder: [(1, 6, 4, 4), (1, 2, 8, 8), (4, 6, 2, 2), (4,), (3, 6, 3, 3), (3,), (3, 3, 3, 3), (3,)],
}


@pytest.mark.parametrize("block", SHAPES)
def test_a_block_with_frozen_parameters_asks_for_the_others_alone(block):
    """Of all one call; else one for each layer that has a parameter to train, with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES[block]]
    first = len(tensors) - 2 * ((len(tensors) - 1) // 2)  # x, and the skip

    def gradients(frozen):
        leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
        y = block(*leaves)
        with Names() as names:
            (y[0] if isinstance(y, tuple) else y).sin().sum().backward()
        return [leaf.grad for leaf in leaves], names.found

    expected, calls = gradients(())
    assert calls == ["block_weight_grads"]
    for frozen in range(first, len(tensors)):
        found, calls = gradients((frozen,))
        assert "block_weight_grads" not in calls
        assert len(calls) == (len(tensors) - first) // 2
        for index, (grad, other) in enumerate(zip(found, expected)):
            assert (grad is None) == (index == frozen)
            if grad is not None:
                torch.testing.assert_close(grad, other)

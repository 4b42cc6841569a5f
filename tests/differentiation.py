"""What every way to differentiate must give, for both backends: plain PyTorch's numbers, or one clear sentence."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fastunet import UNet, functional, reference
from fastunet.reference import centre_crop
from tests.dice_cases import literal as literal_dice


def _conv(x, skip, weight, bias):
    x = x if skip is None else torch.cat([centre_crop(skip, *x.shape[2:]), x], 1)
    return F.relu(F.conv2d(x, weight, bias, padding=1))


def _pool(x, weight, bias):
    y = _conv(x, None, weight, bias)
    return y, F.max_pool2d(y, 2)


def _upsample(x, weight, bias):
    return F.relu(F.conv2d(F.pad(F.interpolate(x, scale_factor=2.0), (0, 1, 0, 1)), weight, bias))


OPERATORS = {
    "conv_relu": (
        lambda x, skip, w, b, backend: functional.conv_relu(x, w, b, skip=skip, backend=backend),
        _conv,
        ((2, 3, 6, 5), (2, 2, 8, 7), (4, 5, 3, 3), (4,)),
    ),
    "conv_relu, stride 2": (
        lambda x, w, b, backend: functional.conv_relu(x, w, b, stride=2, backend=backend),
        lambda x, w, b: F.relu(F.conv2d(x, w, b, 2, 1)),
        ((2, 3, 6, 5), (4, 3, 3, 3), (4,)),
    ),
    "conv_relu_pool": (functional.conv_relu_pool, _pool, ((2, 3, 6, 5), (4, 3, 3, 3), (4,))),
    "max_pool2d": (functional.max_pool2d, lambda x: F.max_pool2d(x, 2), ((2, 3, 6, 5),)),
    "conv_transpose2d": (
        functional.conv_transpose2d,
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2),
        ((2, 3, 3, 4), (3, 4, 2, 2), (4,)),
    ),
    "upsample_conv_relu": (functional.upsample_conv_relu, _upsample, ((2, 3, 3, 4), (4, 3, 2, 2), (4,))),
    "upsample_bilinear2d": (
        functional.upsample_bilinear2d,
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        ((2, 3, 3, 4),),
    ),
    "segmentation_head": (functional.segmentation_head, F.conv2d, ((2, 3, 3, 4), (4, 3, 1, 1), (4,))),
    "probabilities": (
        lambda x, w, b, backend: functional.segmentation_head(x, w, b, output="probabilities", backend=backend),
        lambda x, w, b: F.conv2d(x, w, b).softmax(1),
        ((2, 3, 3, 4), (4, 3, 1, 1), (4,)),
    ),
}

NETWORKS = {
    "brats": (dict(width=3, depth=2, dropout=0.0), (1, 2, 8, 8)),
    "brats, shallow": (dict(width=3, depth=1, dropout=0.0), (1, 2, 4, 4)),
    "isbi": (dict(width=3, depth=1, padding="valid", up="transpose", dropout=0.0), (1, 2, 20, 20)),
}


def random(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To 1e-9 (1e-4 in float32) of the greatest value."""
    scale = wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=(1e-9 if wanted.dtype == torch.float64 else 1e-4) * scale)


def penalty_gradients(function, tensors, needed: list[int]) -> list[torch.Tensor]:
    """The gradients of a sum of squared gradients; its loss is a root, whose incoming gradient needs no gradient."""
    tensors = [t.clone().requires_grad_(index in needed) for index, t in enumerate(tensors)]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in tensors if t.requires_grad]
    loss = sum(y.square().sum() if y.dim() else y for y in outputs)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True, allow_unused=True)


def check_second_derivatives(function, literal, tensors) -> None:
    """With respect to all tensors together and to each alone."""
    for needed in [list(range(len(tensors))), *([index] for index in range(len(tensors)))]:
        for found, wanted in zip(
            penalty_gradients(function, tensors, needed), penalty_gradients(literal, tensors, needed), strict=True
        ):
            assert_close(found, wanted)


def check_torch_func(function, literal, tensors) -> None:
    """``grad``, ``grad`` of ``grad``, ``vjp``, ``jacrev`` and gradients of each sample."""
    numbers = tuple(range(len(tensors)))

    def scalar(f):
        def value(*t):
            outputs = f(*t)
            return sum(y.square().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))

        return value

    def penalty(f):
        return lambda *t: sum(g.square().sum() for g in torch.func.grad(scalar(f), numbers)(*t))

    for transform in (
        lambda f: torch.func.grad(penalty(f), numbers)(*tensors),
        lambda f: torch.func.grad(scalar(f), numbers)(*tensors),
        lambda f: torch.func.vjp(scalar(f), *tensors)[1](tensors[0].new_ones(())),
        lambda f: torch.func.jacrev(scalar(f), numbers)(*tensors),
        lambda f: torch.func.vmap(lambda x: torch.func.grad(scalar(f))(x, *tensors[1:]))(torch.stack([tensors[0]] * 2)),
    ):
        for found, wanted in zip(transform(function), transform(literal), strict=True):
            assert_close(found, wanted)


def builds(name: str, backend: str, dtype: torch.dtype):
    """fastunet's network and the plain build with the same weights, an image and labels."""
    arguments, shape = NETWORKS[name]
    torch.manual_seed(0)
    fast, plain = UNet(**arguments, backend=backend).to(dtype), reference.UNet(**arguments).to(dtype)
    plain.load_state_dict(fast.state_dict())
    (x,) = random(shape, dtype=dtype)
    return fast, plain, x, torch.randint(0, 4, (1, *fast.output_size(*shape[2:])))


def check_network_penalty(name: str, backend: str, dtype: torch.dtype) -> None:
    """Penalties of the gradients of the image, as in WGAN-GP, and of the parameters, of the whole network."""
    fast, plain, x, labels = builds(name, backend, dtype)
    ours = functools.partial(functional.dice_cross_entropy, backend=backend)

    def gradients(model, dice):
        def loss(logits):
            return dice(logits, labels)

        leaves = [x.clone().requires_grad_(), *model.parameters()]
        first, *others = torch.autograd.grad(loss(model(leaves[0])), leaves, create_graph=True)
        penalty = (first.flatten(1).norm(dim=1) - 1).square().sum() + loss(model(leaves[0]))
        return torch.autograd.grad(penalty + sum(g.square().sum() for g in others), leaves)

    for found, wanted in zip(gradients(fast, ours), gradients(plain, literal_dice), strict=True):
        assert_close(found, wanted)


def check_network_torch_func(name: str, backend: str, dtype: torch.dtype) -> None:
    fast, plain, x, labels = builds(name, backend, dtype)
    ours, call = functools.partial(functional.dice_cross_entropy, backend=backend), torch.func.functional_call
    found, wanted = (
        torch.func.grad(lambda p, m=model, dice=dice: dice(call(m, p, (x,)), labels))(dict(model.named_parameters()))
        for model, dice in ((fast, ours), (plain, literal_dice))
    )
    for key, gradient in wanted.items():
        assert_close(found[key], gradient)


def check_export_trains(name: str, backend: str, strict: bool) -> None:
    """A program exported in training mode gives every parameter its gradient."""
    fast, _, x, _ = builds(name, backend, torch.float32)
    program = torch.export.export(fast, (x,), strict=strict).module()
    for model in (fast, program):
        model(x).square().sum().backward()
    found = dict(program.named_parameters())
    for key, parameter in fast.named_parameters():
        assert_close(found[key].grad, parameter.grad)


def check_compiled_training(name: str, backend: str, compiler: str) -> None:
    fast, _, x, labels = builds(name, backend, torch.float32)

    def loss(image):
        return functional.dice_cross_entropy(fast(image), labels, backend=backend)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        value = function(x)
        results.append([value, *torch.autograd.grad(value, list(fast.parameters()))])
    for found, wanted in zip(*results):
        assert_close(found, wanted)

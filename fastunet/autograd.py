"""How the operators carry their own derivatives, so that every way of PyTorch to ask for them finds them.

An operator is differentiated where PyTorch looks for derivatives, at the dispatch key ``Autograd``: in eager mode, in
exported programs, under ``torch.compile``, ``torch.func`` and for second derivatives alike. One with a formula uses it;
one without, as all operators of backward passes, is differentiated through its PyTorch implementation.
``torch.library.register_autograd`` does the same but has no part in ``torch.func.grad``, and drops forward-mode
tangents without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch import autograd_function  # private; proven on PyTorch 2.13
from torch.autograd import forward_ad

Function = Callable[..., Any]
Context = Any
"""A ``torch.autograd.function.FunctionCtx``, to which a formula adds what it keeps."""
Inputs = tuple[Any, ...]
"""All arguments of an operator, ``backend`` the last of them."""
Gradients = tuple[torch.Tensor | None, ...]
"""Of operands, None where none is asked for."""


def kernel(operator: torch._ops.OpOverload, setup: Function, backward: Function) -> Function:
    """The ``Autograd`` kernel of ``operator``; ``setup`` and ``backward`` are those of ``torch.autograd.Function``."""

    def below(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def forward(*arguments: Any) -> Any:
        # Off inside a Function; but an outer level of torch.func follows what this one computes.
        with torch.set_grad_enabled(torch._C._are_functorch_transforms_active()):
            return below(*arguments)

    def jvp(ctx: Context, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{operator.name()} has no forward-mode derivative (jvp); use reverse mode, as backward() does"
        )

    members = dict(forward=forward, setup_context=setup, backward=backward, jvp=jvp)
    function = type(operator.__name__, (torch.autograd.Function,), {k: staticmethod(v) for k, v in members.items()})
    # torch.func has already peeled off its outer levels
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def run(*arguments: Any) -> Any:
        if forward_ad._current_level < 0 and not tracked(*arguments):
            return below(*arguments)
        refuse_inference(operator.name(), arguments)
        with autograd_function.enable_single_level_autograd_function():  # type: ignore[attr-defined]
            return apply(*arguments)

    return run


def through(implementation: Function) -> tuple[Function, Function]:
    """``setup`` and ``backward`` of an operator without a formula: those of its PyTorch ``implementation``."""

    def setup(ctx: Context, inputs: Inputs, output: Any) -> None:
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.at = [index for index, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(inputs[index] for index in ctx.at))

    def backward(ctx: Context, *grads: Any) -> Gradients:
        inputs = list(ctx.others)
        for index, tensor in zip(ctx.at, ctx.saved_tensors):
            inputs[index] = tensor
        return *vjp(implementation, inputs[:-1], ctx.needs_input_grad, grads), None

    return setup, backward


def vjp(function: Function, inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> list[Any]:
    """The gradients of the ``needed`` inputs of ``function``, None for others; differentiable if grad mode is on."""
    again = torch.is_grad_enabled()
    if vmapped():
        # As torch.func.jacrev asks: the level of the saved tensors is gone, and the numbers would be zeros.
        raise NotImplementedError("fastunet: no second derivatives under torch.func.vmap, jacrev or hessian")
    with torch.enable_grad():
        # An input that was computed from another one must not pass its gradient on to it here: a node of its own each.
        own = [
            (value.view_as(value) if again else value.detach().requires_grad_()) if need else value
            for value, need in zip(inputs, needed)
        ]
        outputs = function(*own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, dy) for y, dy in zip(outputs, grads) if dy is not None and y.requires_grad]
        wanted = [value for value, need in zip(own, needed) if need]
        if not pairs:
            return [None] * len(inputs)
        ys, dys = zip(*pairs)
        found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=again, allow_unused=True))
    return [next(found) if need else None for _, need in zip(inputs, needed)]


def tracked(*values: Any) -> bool:
    """Whether a derivative with respect to one of ``values`` may be asked for later."""
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)


def refuse_inference(operator: str, values: Sequence[Any]) -> None:
    """Raises ``ValueError`` for tensors that were made in inference mode, which PyTorch keeps for no derivative."""
    if any(isinstance(value, torch.Tensor) and value.is_inference() for value in values):
        raise ValueError(f"{operator}: tensors of inference mode have no part in derivatives; clone() them")


class _Casts(torch.autograd.Function):
    """Casts of several tensors in one launch of a GPU, and of their gradients in another."""

    @staticmethod
    def forward(ctx: Context, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        ctx.set_materialize_grads(False)
        found = copies(tensors, dtype)
        ctx.mark_non_differentiable(*(cast for cast, tensor in zip(found, tensors) if not tensor.requires_grad))
        return tuple(found)

    @staticmethod
    def backward(ctx: Context, *grads: torch.Tensor | None) -> Gradients:
        if differentiated_again():
            return None, *(None if grad is None else grad.to(ctx.dtype) for grad in grads)
        found = iter(copies([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(found) for grad in grads)


def copies(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors in another ``dtype``, in one launch where they share theirs."""
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


def casts(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """The ``tensors`` in ``dtype``, differentiable: plain ones of one dtype together, others one by one.

    So are all where something follows the operations: compilers, ``torch.func``, export, and ``torch.jit.trace``, whose
    programs hold no Python.
    """
    plain = all(type(each) in (torch.Tensor, torch.nn.Parameter) and not each.is_inference() for each in tensors)
    alike = len({each.dtype for each in tensors}) == 1
    traced = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    if traced or torch.compiler.is_compiling() or transformed() or not (plain and alike):
        return [each.to(dtype) for each in tensors]
    apply: Function = _Casts.apply
    return apply(dtype, *tensors) if tracked(*tensors) else copies(tensors, dtype)


def transformed() -> bool:
    """Whether ``torch.func``, forward mode or export is at work, where units of operators run as these operators."""
    if torch.compiler.is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def vmapped() -> bool:
    """Whether ``torch.func.vmap`` is at work."""
    if torch.compiler.is_compiling():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def differentiated_again() -> bool:
    """Whether the backward pass that is running will be differentiated itself (``create_graph=True``)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()

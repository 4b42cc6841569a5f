"""The operators behind the Dice losses of classes and of regions, and the loss that both make of their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunet import autograd, dispatch
from fastunet.autograd import Context, Function, Gradients, Inputs
from fastunet.functional import dice_cpu, dice_regions_cpu, dice_rule
from fastunet.functional._checks import processes_of
from fastunet.functional.dice_arguments import cannot_raise, pixels_of, raise_out_of_range
from fastunet.functional.dice_rule import check_rule, check_tversky


def _sums_like(logits: Tensor, per_sample: bool) -> Tensor:
    rows = logits.shape[0] if per_sample else 1
    return logits.new_empty((rows, 3 * logits.shape[1] + 3), dtype=dice_cpu.sum_dtype(logits))


def _setup_sums(tensors: int) -> Function:
    def setup(ctx: Context, inputs: Inputs, output: Tensor) -> None:
        ignore_index, cross_entropy, _, *others = inputs[tensors:]
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options, ctx.none = (ignore_index, cross_entropy, *others), [None] * (len(inputs) - 1)

    return setup


def _differentiate_sums(operator: str) -> Function:
    def differentiate(ctx: Context, grad: Tensor) -> Gradients:
        arguments = grad.new_ones(()), grad, *ctx.saved_tensors, *ctx.options
        return getattr(torch.ops.fastunet, operator)(*arguments), *ctx.none

    return differentiate


def _setup_rule(ctx: Context, inputs: Inputs, outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], outputs[2])
    ctx.rule = inputs[2:-1]
    ctx.mark_non_differentiable(outputs[1])
    ctx.set_materialize_grads(False)


def _differentiate_rule(ctx: Context, grad: Tensor | None, _: None, d_slopes: Tensor | None) -> Gradients:
    sums, class_weights, slopes = ctx.saved_tensors
    d_sums = None if grad is None else grad * slopes
    if d_slopes is not None:
        needed = [True] + [False] * 9
        more = autograd.vjp(dice_rule.loss, [sums, class_weights, *ctx.rule], needed, [None, None, d_slopes])[0]
        d_sums = more if d_sums is None else d_sums + more
    return d_sums, *[None] * 10


def _define_sums(name: str, tensors: str, others: str, on_cpu: Any, kernels: str) -> None:
    """Defines ``fastunet::<name>``, the sums of logits and what else ``tensors`` lists, and ``fastunet::<name>_grad``,
    the gradient of a loss of them with respect to the logits; ``others`` are arguments that both have last."""
    options, count = "int? ignore_index, bool cross_entropy", len(tensors.split(", "))
    dispatch.define(
        f"{name}({tensors}, {options}, bool per_sample{others}, str backend) -> Tensor",
        torch_impl=on_cpu.sums,
        triton_impl=f"{kernels}:sums",
        fake=lambda *arguments: _sums_like(arguments[0], arguments[count + 2]),
        setup=_setup_sums(count),
        backward=_differentiate_sums(f"{name}_grad"),
    )
    dispatch.define(
        f"{name}_grad(Tensor grad, Tensor slopes, {tensors}, {options}{others}, str backend) -> Tensor",
        torch_impl=on_cpu.sums_grad,
        triton_impl=f"{kernels}:sums_grad",
        fake=lambda grad, slopes, logits, *arguments: torch.empty_like(logits),
    )


_define_sums("dice_sums", "Tensor logits, Tensor targets, Tensor? class_weights", ", float label_smoothing",
             dice_cpu, "dice.sums")  # fmt: skip
_define_sums("dice_region_sums", "Tensor logits, Tensor labels, Tensor? region_weights, Tensor members", "",
             dice_regions_cpu, "dice.regions")  # fmt: skip
dispatch.define(
    "dice_rule(Tensor sums, Tensor? class_weights, float smooth, str empty, bool include_background,"
    " float dice_weight, float ce_weight, bool nan_if_wrong, float alpha, float beta, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    torch_impl=dice_rule.loss,
    triton_impl="dice.rule:loss",
    fake=lambda sums, *arguments: (sums.new_empty(()), sums.new_empty(()), torch.empty_like(sums)),
    setup=_setup_rule,
    backward=_differentiate_rule,
)


def _operators(members: torch.Tensor | None) -> tuple[Any, Any, Any]:
    """The operators for the sums and their gradient, and the module that has both for a CPU."""
    operators = torch.ops.fastunet
    if members is None:
        return operators.dice_sums, operators.dice_sums_grad, dice_cpu
    return operators.dice_region_sums, operators.dice_region_sums_grad, dice_regions_cpu


def _operands(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Logits, targets, weights and the table of regions, which the operators of classes do not have."""
    return tensors if tensors[-1] is not None else tensors[:-1]


def _loss(
    logits: Tensor, targets: Tensor, weights: Tensor | None, members: Tensor | None, options: tuple[int | None, bool],
    per_sample: bool, others: tuple[float, ...], rule: tuple[object, ...], shared: tuple[Any, float] | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:class:`_DiceLoss` as two operators, each with its own derivative."""
    if shared is not None:
        raise NotImplementedError("fastunet: with sync=True the Dice loss has no second derivative and no torch.func")
    operands = _operands(logits, targets, weights, members)
    sums = _operators(members)[0](*operands, *options, per_sample, *others, backend)
    return torch.ops.fastunet.dice_rule(sums, None if logits.shape[1] == 1 else weights, *rule, backend)[:2]


class _DiceLoss(torch.autograd.Function):
    """The loss, and the number of labels out of range.

    ``members`` is the table of regions, or None for classes; ``options`` and ``others`` are the arguments of the sums
    behind the tensors, before and after ``per_sample``, ``rule`` those of ``dice_rule`` behind the weights. ``shared``
    is (process group, factor of the gradient) for sums over processes, else None.
    """

    @staticmethod
    def forward(
        ctx: Context, logits: Tensor, targets: Tensor, weights: Tensor | None, members: Tensor | None,
        options: tuple[int | None, bool], per_sample: bool, others: tuple[float, ...], rule: tuple[object, ...],
        shared: tuple[Any, float] | None, backend: str,
    ) -> tuple[Tensor, Tensor]:
        ctx.rest, ctx.kept = (options, per_sample, others, rule, shared, backend), None
        operator, _, cpu = _operators(members)
        arguments = *_operands(logits, targets, weights, members), *options, per_sample, *others
        # Not under torch.compile, fake tensors and the like, which see the operators below as single nodes.
        if ctx.needs_input_grad[0] and type(logits) is torch.Tensor and not torch.compiler.is_compiling():
            ctx.kept = cpu.room_for_probabilities(logits) if backend == "torch" else None
        sums = operator(*arguments, backend) if ctx.kept is None else cpu.sums(*arguments, ctx.kept)
        if shared is not None:
            torch.distributed.all_reduce(sums, group=shared[0])
        dice_weights = None if logits.shape[1] == 1 else weights
        loss, wrong, slopes = torch.ops.fastunet.dice_rule(sums, dice_weights, *rule, backend)
        ctx.save_for_backward(slopes, logits, targets, weights, members)
        ctx.mark_non_differentiable(wrong)
        ctx.set_materialize_grads(False)  # zeros for ``wrong`` would be a launch
        return loss, wrong

    @staticmethod
    def backward(ctx: Context, grad: Tensor | None, _: None) -> Gradients:
        if grad is None:
            return (None,) * 10
        slopes, *tensors = ctx.saved_tensors
        options, _, others, _, shared, backend = ctx.rest
        if autograd.differentiated_again():
            return tuple(autograd.vjp(_loss, [*tensors, *ctx.rest], ctx.needs_input_grad, [grad, None]))
        if shared is not None:
            grad = grad * shared[1]
            torch.distributed.all_reduce(grad, group=shared[0])
        _, operator, cpu = _operators(tensors[-1])
        arguments = grad, slopes, *_operands(*tensors), *options, *others
        if ctx.kept is None:
            dlogits = operator(*arguments, backend)
        else:
            # A second backward pass through a retained graph computes the probabilities again.
            kept, ctx.kept = ctx.kept, None
            dlogits = cpu.sums_grad(*arguments, kept)
        return dlogits, *[None] * 9


def loss_of_sums(
    operator: str,
    logits: torch.Tensor,
    tensors: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    classes: int,
    ignore_index: int | None,
    others: tuple[float, ...],
    rule: tuple[float, str, bool, float, float],
    *,
    tversky: Sequence[float],
    reduction: str,
    check_labels: bool,
    sync: bool,
    process_group: Any,
    grad_reduction: str,
    backend: str | None,
) -> torch.Tensor:
    """The loss of logits and validated ``tensors``: targets, weights, and the table of regions or None.

    Args:
        operator: the public function, for messages.
        classes: labels are from 0 to classes - 1.
        others: the last arguments of the operator for the sums.
        rule: ``smooth``, ``empty``, ``include_background``, ``dice_weight`` and ``ce_weight``; these and all other
            options are those of :func:`fastunet.functional.dice.dice_cross_entropy`.

    Raises:
        ValueError: options that are not known or exclude each other, or a label out of range.
    """
    smooth, empty, *_, ce_weight = rule
    check_rule(empty, smooth)
    if reduction not in ("batch", "sample"):
        raise ValueError(f"reduction is {reduction!r}; expected 'batch' or 'sample'")
    if grad_reduction not in ("mean", "sum"):
        raise ValueError(f"grad_reduction is {grad_reduction!r}; expected 'mean' or 'sum'")
    if sync and reduction == "sample":
        raise ValueError("sync=True sums over the whole batch and needs reduction='batch'")
    if autograd.tracked(logits) and not torch.compiler.is_compiling():
        autograd.refuse_inference(operator, [logits, *tensors])
    backend = dispatch.select_backend(backend, operator, logits)
    may_raise = check_labels and not cannot_raise(logits)
    if sync:
        processes = processes_of(process_group, "sync=True")
        shared = process_group, 1 / processes if grad_reduction == "sum" else 1.0
    loss, wrong = (_loss if autograd.transformed() else _DiceLoss.apply)(
        pixels_of(logits), *tensors, (ignore_index, bool(ce_weight)), reduction == "sample", others,
        (*rule, check_labels and not may_raise, *check_tversky(tversky)), shared if sync else None, backend,
    )  # fmt: skip
    if may_raise and wrong.item() > 0:
        raise_out_of_range(tensors[0], classes, ignore_index)
    return loss

"""The usual training pass of `FactoredOutput`: a built-in loss, reduced, on a CPU.

All of it is linear in the gradient that backward is given, one number. So one compiled call makes, in the forward
pass already, the loss, the gradient of the hidden states and the record of the step for a 1; backward multiplies
where it is another number. `factored_record.py` has every other pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.spherical import SphericalLoss, built_in
from lastlayer.kernels.factored import WholePass, whole_pass
from lastlayer.layers.factored_record import Record, mark_of, needed_columns

PLAIN = (Tensor, nn.Parameter)


def whole_loss(
    hidden: Tensor,  # (..., d)
    targets: Tensor,  # (..., K) or (...)
    weights: Tensor | None,  # (N, K), float64; None: 1 each
    loss: SphericalLoss,
    record: Record,
    reduction: str,
) -> Tensor | None:  # ()
    """The loss, whose backward records the step; None where this form does not serve, or a target is no class."""
    kernel = None if reduction == "none" or not eager_on_cpu(hidden) else built_in(loss)
    if kernel is None:
        return None
    state = record.state
    columns = needed_columns(hidden.numel() // state.features, state.features)
    mean = reduction == "mean"
    made = whole_pass(hidden, targets, weights, state.stacked, state.factor, kernel, mean, columns)
    return None if made is None else _applied(hidden, record.anchor, made, record)


def is_usual(
    hidden: Any,  # (..., d)
    targets: Any,  # (...)
    features: int,
    dtype: torch.dtype,
) -> bool:
    """Whether both are all that `whole_loss` wants, but for the ids, which it looks at itself."""
    return (
        type(hidden) in PLAIN
        and type(targets) in PLAIN
        and hidden.dtype == dtype
        and targets.dtype == torch.int64
        and targets.shape == hidden.shape[:-1]
        and hidden.shape[-1:] == (features,)
        and hidden.layout == targets.layout == torch.strided
        and hidden.device == targets.device
    )


class _WholePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, made: WholePass, record: Record) -> Tensor:
        ctx.record, ctx.left, ctx.gradient, ctx.shape = record, made.record, made.gradient, hidden.shape
        return made.loss

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, upstream)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    record: Record = ctx.record
    record.check_weight()
    factor = upstream.item()
    if not torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
        kept = ctx.left.parts()["products"][:, : record.state.features] if record.committed else ctx.gradient
        return kept.reshape(ctx.shape) * factor, None, None, None
    record.commit(ctx.left)
    gradient, ctx.gradient = ctx.gradient, None  # nobody else's, so that it becomes `hidden.grad` uncopied
    if factor != 1:
        gradient.mul_(factor)
        ctx.left.scale(factor)
    return gradient, mark_of(record.anchor), None, None


_backward_once = once_differentiable(_backward)
_above: Any = super(torch.autograd.Function, _WholePass)
_applied = _above.apply  # without the look for transforms of functions

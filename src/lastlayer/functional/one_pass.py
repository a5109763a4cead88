"""Losses whose gradients are formed in the forward pass, while the logits of a chunk are in memory."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lastlayer.functional.ordinary import eager_on_cpu, ordinary
from lastlayer.functional.precision import no_autocast
from lastlayer.functional.second_order import HandWritten, Tensors, gradients


class RowLosses(Protocol):
    """The losses of N rows, a function of some tensors."""

    @property
    def plain(self) -> Callable[..., Tensor]:
        """The losses `(N,)` of the inputs, by PyTorch's own operations."""
        ...

    def run(
        self,
        inputs: tuple[Any, ...],
        shares: Tensor | None,  # (N,) or (); None: all are 1
        wanted: Sequence[bool] | None,  # of the inputs
    ) -> tuple[Tensor, Tensors | None]:
        """The losses times their shares, `(N,)`; and the gradients of their sum, None where none is wanted."""
        ...


def one_pass_loss(
    losses: RowLosses,
    inputs: Tensors,
    shares: Tensor | None = None,  # (N,)
    *,
    reduced: bool,
    constants: Tensors = (),  # what the losses have no gradient for
) -> Tensor:  # (), or (N,) where it is not reduced
    """The sum of the losses times their shares, with its gradients formed at once; or each, not `reduced`: then
    the backward pass repeats the forward pass."""
    if not ordinary(*inputs, shares, *constants):
        return _plain(losses, shares, reduced, *inputs)
    wanted = None
    if reduced and torch.is_grad_enabled():
        needed = tuple(part is not None and part.requires_grad for part in inputs)
        wanted = needed if any(needed) else None
    first = next(part for part in inputs if part is not None)
    with no_autocast(first.device.type):
        found: Any = _OnePass.run(losses, shares, reduced, wanted, *inputs)
    return found[0]


def _plain(losses: RowLosses, shares: Tensor | None, reduced: bool, *inputs: Tensor | None) -> Tensor:
    values = losses.plain(*inputs)
    values = values if shares is None else values * shares
    return values.sum() if reduced else values


class _OnePass(HandWritten):
    @staticmethod
    def forward(
        losses: RowLosses,
        shares: Tensor | None,
        reduced: bool,
        wanted: tuple[bool, ...] | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, Tensors | None]:
        values, formed = losses.run(inputs, shares, wanted)
        return values.sum() if reduced else values, formed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *ctx.settings, _ = inputs[:4]
        _, ctx.formed = output
        ctx.save_for_backward(*inputs[4:])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (losses, shares, _), scale, inputs = ctx.settings, upstream[0], ctx.saved_tensors

        def form() -> Tensors:
            formed, ctx.formed = ctx.formed, None
            if formed is None:  # not reduced, or a second pass over a retained graph
                both = scale if shares is None else scale * shares
                _, formed = losses.run(inputs, both, ctx.needs_input_grad[4:])
            elif not (eager_on_cpu(scale) and float(scale) == 1.0):
                for gradient in formed:
                    if gradient is not None:  # no other reference to it exists
                        gradient.mul_(scale)
            return formed

        return None, None, None, None, *gradients(form, partial(_plain, *ctx.settings), inputs, upstream[:1])

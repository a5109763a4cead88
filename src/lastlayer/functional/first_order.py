"""Gradients that cannot be differentiated again, and say so."""

from typing import Any

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    """The identity; differentiating through it raises."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"{ctx.name} forms its own gradients and cannot be differentiated twice; for second derivatives "
            "use torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets)"
        )


def first_order(name: str, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """`gradients` as a backward pass may return them: a second derivative is an error, not silently wrong."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(
        None if gradient is None else _Refuse.apply(name, gradient.detach().requires_grad_())
        for gradient in gradients
    )

"""Functions whose work depends on the data, as operators of PyTorch: a compiled graph holds them as one node each.

`lastlayer::NAME` runs a differentiable function eagerly, and `lastlayer::NAME_backward` its gradient, for which
the function runs again: an operator can keep nothing whose size depends on the data. So they serve under
`torch.compile` alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.precision import no_autocast

Function = Callable[..., Tensor]


def make_operator(
    name: str,
    arguments: str,  # as in a schema: "Tensor hidden, Tensor? bias, Tensor targets"
    function: Function,
    *,
    leaves: int,  # how many of the arguments, the first ones, it is differentiable for
    empty: Function,  # of the same arguments: an uninitialised tensor of the shape and dtype of the result
) -> Function:
    """`function` as the operator `lastlayer::name`, with its shapes and its gradient.

    The arguments are all tensors, or None; the result is one new tensor, and its gradients are dense.
    """

    def run(*tensors: Any) -> Tensor:
        with torch.no_grad(), no_autocast(tensors[0].device.type):
            return function(*tensors)

    def backward(upstream: Tensor, wanted: Sequence[bool], *tensors: Tensor | None) -> list[Tensor]:
        with torch.enable_grad(), no_autocast(upstream.device.type):
            own = [_leaf(tensor, want) for tensor, want in zip(tensors, wanted, strict=False)]
            result = function(*own, *tensors[len(own) :])
            chosen = [leaf for leaf, want in zip(own, wanted, strict=True) if leaf is not None and want]
            return list(torch.autograd.grad(result, chosen, upstream, materialize_grads=True))

    def shapes(upstream: Tensor, wanted: Sequence[bool], *tensors: Tensor | None) -> list[Tensor]:
        pairs = zip(tensors, wanted, strict=False)
        return [
            torch.empty_like(t, memory_format=torch.contiguous_format)
            for t, want in pairs
            if want and t is not None
        ]

    forward = torch.library.custom_op(
        f"lastlayer::{name}", run, mutates_args=(), schema=f"({arguments}) -> Tensor"
    )
    forward.register_fake(empty)
    schema = f"(Tensor upstream, bool[] wanted, {arguments}) -> Tensor[]"
    gradient = torch.library.custom_op(f"lastlayer::{name}_backward", backward, mutates_args=(), schema=schema)
    gradient.register_fake(shapes)

    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:leaves])
        found = iter(gradient(upstream, wanted, *ctx.saved_tensors))
        of_leaves = [next(found) if want else None for want in wanted]
        return *of_leaves, *(None for _ in ctx.saved_tensors[leaves:])

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


def _leaf(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(wanted)

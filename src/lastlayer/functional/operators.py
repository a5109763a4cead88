"""Functions whose work depends on the data, under `torch.compile`: operators, or outside of the graph.

A compiled graph holds an operator as one node. `lastlayer::NAME` runs a differentiable function eagerly, and
`lastlayer::NAME_backward` its gradient. Where that is left to autograd, the function runs again for it: an
operator can keep nothing whose size depends on the data. So they serve under `torch.compile` alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from lastlayer.functional.precision import no_autocast

P = ParamSpec("P")
R = TypeVar("R")
Function = Callable[..., Any]  # of the arguments, to a tensor or a tuple of them
Gradient = Callable[..., Sequence[Tensor | None]]  # of upstream, wanted, and the arguments


def make_operator(
    name: str,
    arguments: str,  # as in a schema: "Tensor hidden, Tensor? bias, Tensor targets"
    function: Function,
    *,
    leaves: int,  # how many of the arguments, the first ones, it is differentiable for
    empty: Function,  # of the same arguments: uninitialised tensors of the shapes and dtypes of the results
    results: int = 1,
    gradient: Gradient | None = None,  # gradients of the leaves, None where not wanted; None: by autograd
) -> Function:
    """`function` as the operator `lastlayer::name`, with its shapes and its gradient.

    The arguments are all tensors, or None; the results are new tensors, and their gradients are dense.
    """

    def run(*tensors: Any) -> Any:
        with torch.no_grad(), no_autocast(tensors[0].device.type):
            return function(*tensors)

    def by_autograd(upstream: Sequence[Tensor], wanted: Sequence[bool], *tensors: Any) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            own = [_leaf(tensor, want) for tensor, want in zip(tensors, wanted, strict=False)]
            found = function(*own, *tensors[len(own) :])
            found = (found,) if isinstance(found, Tensor) else found
            chosen = [leaf for leaf, want in zip(own, wanted, strict=True) if leaf is not None and want]
            formed = iter(torch.autograd.grad(found, chosen, upstream, materialize_grads=True))
        return [
            next(formed) if want and leaf is not None else None for leaf, want in zip(own, wanted, strict=True)
        ]

    def backward(upstream: Sequence[Tensor], wanted: Sequence[bool], *tensors: Any) -> list[Tensor]:
        with torch.no_grad(), no_autocast(upstream[0].device.type):
            formed = (gradient or by_autograd)(upstream, wanted, *tensors)
        return [part for part in formed if part is not None]

    def shapes(upstream: Sequence[Tensor], wanted: Sequence[bool], *tensors: Any) -> list[Tensor]:
        pairs = zip(tensors, wanted, strict=False)
        return [leaf.new_empty(leaf.shape) for leaf, want in pairs if want and leaf is not None]

    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    forward = torch.library.custom_op(
        f"lastlayer::{name}", run, mutates_args=(), schema=f"({arguments}) -> {returns}"
    )
    forward.register_fake(empty)
    schema = f"(Tensor[] upstream, bool[] wanted, {arguments}) -> Tensor[]"
    of_leaves = torch.library.custom_op(f"lastlayer::{name}_backward", backward, mutates_args=(), schema=schema)
    of_leaves.register_fake(shapes)

    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:leaves])
        found = iter(of_leaves(list(upstream), wanted, *ctx.saved_tensors))
        spread = [next(found) if want else None for want in wanted]
        return *spread, *(None for _ in ctx.saved_tensors[leaves:])

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


def _leaf(tensor: Tensor | None, wanted: bool) -> Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_(wanted)


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run eagerly in the middle of a compiled model: the graph breaks there, and goes on after it.

    `torch.compiler.disable` imports the compiler, which takes a second: not before something is compiled.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            eager: Any = torch.compiler.disable(function)
            return eager(*args, **kwargs)
        return function(*args, **kwargs)

    return call

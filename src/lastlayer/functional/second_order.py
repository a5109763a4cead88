"""Hand-written gradients that can be differentiated again.

The backward pass of a hand-written function returns `gradients(...)`. A first derivative costs what the
hand-written formula costs. A second one, or one under `vmap`, comes from the function's plain twin: the same
function by PyTorch's own operations, which autograd differentiates to any order, with all `(N, V)` logits.

The autograd node of the second derivative has as inputs everything that the gradient depends on, the inputs and
the upstream gradient, so that autograd does not prune it, however the second derivative is requested.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.ordinary import ordinary

Tensors = tuple[Tensor | None, ...]
Twin = Callable[..., Tensor | tuple[Tensor, ...]]


class HandWritten(torch.autograd.Function):
    """A function with a hand-written gradient, in the form that `torch.func` takes: `forward` has no context, and
    `setup_context` saves what `backward` needs. It is called by `run`, never by `apply`.

    Transformed tensors take the function's plain twin (see `ordinary`); a batched one never comes here.
    """

    @classmethod
    def run(cls, *args: Any) -> Any:
        """`apply`; in a compiled graph where nothing is differentiated, `forward` alone.

        There Dynamo would call `forward` itself, and with `*parameters` in its signature pass it the context too.
        """
        if torch.compiler.is_compiling() and not (
            torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in args)
        ):
            return cls.forward(*args)
        return cls.apply(*args)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(
            "a hand-written function of lastlayer was called with a tensor that torch.func.vmap batches beside "
            "others that it does not; batch hidden or weight too, by expand() and in_dims=0"
        )


def gradients(
    form: Callable[[], Tensors],
    twin: Twin,
    inputs: Tensors,
    upstream: Tensors,
) -> Tensors:
    """The gradients for `inputs` of a function, in its backward pass.

    Args:
        form: returns the hand-written gradients; None for an input that needs none.
        twin: `twin(*inputs)` is the output of the function, or its outputs, by PyTorch's own operations.
        inputs: the tensors as `ctx.saved_tensors` gives them.
        upstream: the gradients of the outputs; None for one that was not used.
    """
    if not ordinary(*upstream):  # many at once, as by `is_grads_batched`
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = _aliases(inputs)
            wanted = [i for i, leaf in enumerate(leaves) if leaf is not None and leaf.requires_grad]
            found = _first(twin, leaves, wanted, upstream, again)
        return _spread(found, wanted, len(inputs))
    with torch.no_grad():
        formed = form()
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return formed
    wanted = [i for i, gradient in enumerate(formed) if gradient is not None]
    found: Any = _Formed.run(twin, tuple(formed[i] for i in wanted), wanted, len(inputs), *inputs, *upstream)
    return _spread(found, wanted, len(inputs))


class _Formed(HandWritten):
    """The identity for gradients that were computed already; its backward pass differentiates the twin's."""

    @staticmethod
    def forward(
        twin: Twin, formed: tuple[Tensor, ...], wanted: list[int], count: int, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        return formed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.twin, _, ctx.wanted, ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = _aliases(ctx.saved_tensors)
            inputs, of_outputs = leaves[: ctx.count], leaves[ctx.count :]
            first = _first(ctx.twin, inputs, ctx.wanted, of_outputs, True)
            pairs = [(f, u.to_dense()) for f, u in zip(first, upstream, strict=True) if u is not None]
            wanted = [i for i, leaf in enumerate(leaves) if leaf is not None and leaf.requires_grad]
            second = _grad(pairs, [leaves[i] for i in wanted], again)
        return None, None, None, None, *_spread(second, wanted, len(leaves))


def _aliases(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same tensors as inputs of their own, though one may have been computed from another."""
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def _first(
    twin: Twin, inputs: Sequence[Tensor | None], wanted: list[int], upstream: Sequence[Tensor | None], again: bool
) -> list[Tensor]:
    """The gradients for the inputs that need one, by autograd."""
    outputs = twin(*inputs)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None]
    return _grad(pairs, [inputs[i] for i in wanted], again)


def _grad(pairs: list[tuple[Tensor, Tensor]], leaves: list[Any], again: bool) -> list[Tensor]:
    """The gradients of some outputs for `leaves`, zeros where an output does not depend on a leaf."""
    pairs = [(output, of_output) for output, of_output in pairs if output.requires_grad]
    if not pairs:
        return [torch.zeros_like(leaf) for leaf in leaves]
    outputs, of_outputs = zip(*pairs, strict=True)
    options = {"create_graph": again, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(outputs, leaves, of_outputs, **options))


def _spread(found: Sequence[Tensor], places: list[int], count: int) -> Tensors:
    """`found` at their places among `count`, None elsewhere."""
    spread: list[Tensor | None] = [None] * count
    for place, tensor in zip(places, found, strict=True):
        spread[place] = tensor
    return tuple(spread)


def refused(gradient: Tensor, why: str, *sources: Tensor | None) -> Tensor:
    """`gradient`, which raises RuntimeError(why) when it is differentiated, as a function of `sources`."""
    return _Refused.run(why, gradient, *sources) if torch.is_grad_enabled() else gradient


class _Refused(HandWritten):
    """The identity for its first tensor; differentiating through it raises."""

    @staticmethod
    def forward(why: str, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ctx.why)

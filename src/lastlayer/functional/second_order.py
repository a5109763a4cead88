"""Hand-written gradients that can be differentiated again.

The backward pass of a hand-written function returns `gradients(...)`. A first derivative costs what the
hand-written formula costs. One that will be differentiated again (`create_graph=True`), or under `vmap`, comes
from the function's plain twin: the same function by PyTorch's own operations, which autograd differentiates to any
order, with all `(N, V)` logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.ordinary import ordinary

Tensors = tuple[Tensor | None, ...]


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
    twin: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Tensors,
    upstream: Tensors,
) -> Tensors:
    """The gradients for `inputs` of a function, in its backward pass; None for an input that needs none.

    Args:
        form: returns the hand-written gradients.
        twin: `twin(*inputs)` is the output of the function, or its outputs, by PyTorch's own operations.
        inputs: the tensors as `ctx.saved_tensors` gives them.
        upstream: the gradients of the outputs; None for one that was not used.
    """
    again = torch.is_grad_enabled()  # they are to be differentiated
    if torch.compiler.is_compiling() or (ordinary(*upstream) and not again):  # not many, as by `is_grads_batched`
        with torch.no_grad():
            return form()
    with torch.enable_grad():
        # Inputs of their own, though one may have been computed from another.
        leaves = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        outputs = twin(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if u is not None and o.requires_grad]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = [torch.zeros_like(leaf) for leaf in wanted]
        if pairs and wanted:
            outputs, of_outputs = zip(*pairs, strict=True)
            options = {"create_graph": again, "allow_unused": True, "materialize_grads": True}
            found = torch.autograd.grad(outputs, wanted, of_outputs, **options)
    each = iter(found)
    return tuple(next(each) if leaf is not None and leaf.requires_grad else None for leaf in leaves)


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

"""The two levels for a small batch, where calling PyTorch's operations would cost more than their work."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lastlayer.functional.groups import Targets
from lastlayer.functional.row_sparse import row_sparse
from lastlayer.kernels import grouped as kernels
from lastlayer.kernels.arrays import arrays_of


class SmallTwoLevelLogProb(torch.autograd.Function):
    """As `two_level_log_prob`, with everything in one call of compiled loops each way."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Targets,
        hidden: Tensor,  # (N, d)
        *parameters: Any,  # of `TwoLevel`
    ) -> Tensor:  # (N,)
        head_weight, _, weight, _ = parameters
        *places, sparse = targets
        none = weight[:0, 0]
        tensors = (hidden.contiguous(), *parameters, *places)
        arrays = arrays_of(*(none if t is None else t for t in tensors))
        answer, touched, ctx.state = kernels.small_forward(*arrays, sparse, ctx.needs_input_grad[1])
        ctx.touched, ctx.sparse = torch.from_numpy(touched), sparse
        ctx.like, ctx.num_clusters, ctx.num_classes = weight[:0], len(head_weight), len(weight)
        return torch.from_numpy(answer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = upstream[0].contiguous()
        wanted, like, touched = ctx.needs_input_grad[1:], ctx.like, ctx.touched
        width = like.shape[1]
        head = ctx.num_clusters if wanted[1] or wanted[2] else 0
        gradients = [
            like.new_empty(len(grad) if wanted[0] else 0, width),
            like.new_empty(head, width),
            like.new_empty(head),
        ]
        if not (wanted[3] or wanted[4]):
            gradients += [like, like[:, 0]]
        elif ctx.sparse:
            gradients += [like.new_empty(len(touched), width), like.new_empty(len(touched))]
        else:
            gradients += [like.new_zeros(ctx.num_classes, width), like.new_zeros(ctx.num_classes)]
        kernels.small_backward(ctx.state, *arrays_of(grad, *gradients))
        if ctx.sparse and (wanted[3] or wanted[4]):
            gradients[3:] = [row_sparse(touched, gradient, ctx.num_classes) for gradient in gradients[3:]]
        return (None, *(g if want else None for g, want in zip(gradients, wanted, strict=True)))

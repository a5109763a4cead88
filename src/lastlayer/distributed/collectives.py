"""The collectives of sharded layers, differentiable.

All ranks compute the same loss from the same hidden states, and each runs its own backward pass. So the gradient
of a tensor that all ranks hold is the same on all; and with R ranks

| forward | backward |
|---|---|
| `copied`, `copied_together`: nothing, before each rank does its own part | the sum over the ranks |
| `summed`: the sum over the ranks | nothing |
| `gathered`: the columns of all ranks | the rank's own columns |

Each backward pass is made of these again, and so second derivatives are right too.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lastlayer.distributed.ranks import Ranks
from lastlayer.distributed.row_sums import gather_alike, quotient, sum_rows
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.second_order import HandWritten
from lastlayer.functional.sent_bytes import count_sent

NOT_BATCHED = (
    "the collectives of lastlayer.distributed cannot be batched, by torch.func.vmap, is_grads_batched=True or "
    "vectorize=True; loop over the examples, on all ranks"
)


def copied(tensor: Tensor, ranks: Ranks, *, mean: bool = False) -> Tensor:
    """`tensor`, whose gradient is the sum over the ranks, or their mean."""
    return tensor if ranks.size == 1 else _Copied.run(tensor, ranks, mean)


def copied_together(tensors: Sequence[Tensor], ranks: Ranks) -> Sequence[Tensor]:
    """Each as by `copied`, with one all-reduce of all their gradients."""
    return tensors if ranks.size == 1 else _CopiedTogether.run(ranks, *tensors)


def summed(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks."""
    return tensor if ranks.size == 1 else _Summed.run(tensor, ranks)


def summed_together(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """The sum of each over the ranks, by one all-reduce."""
    whole = summed(torch.cat([tensor.reshape(-1) for tensor in tensors]), ranks)
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def largest(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The largest over the ranks, elementwise; no gradient flows through it."""
    return _reduce(tensor.detach(), ranks, dist.ReduceOp.MAX)


def gathered(
    tensor: Tensor,  # (N, w)
    spans: Sequence[slice],  # the columns of each rank among all, in order
    ranks: Ranks,
) -> Tensor:  # (N, total)
    """The columns of all ranks, in their order."""
    return tensor if ranks.size == 1 else _Gathered.run(tensor, spans, ranks)


def gathered_alike(tensor: Tensor, ranks: Ranks) -> list[Tensor]:
    """The tensors of all ranks, all of one shape; no gradient flows through them."""
    tensor = tensor.detach().contiguous()
    if ranks.size == 1 or not tensor.numel():
        return [tensor] * ranks.size
    count_sent("all_gather", tensor.nbytes * (ranks.size - 1))
    return gather_alike(tensor, ranks.group)


def from_first(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The tensor of the first rank, on all."""
    if ranks.size > 1 and tensor.numel():
        tensor = tensor.clone()
        count_sent("broadcast", tensor.nbytes * (ranks.size - 1) / ranks.size)
        dist.broadcast(tensor, group=ranks.group, group_src=0)
    return tensor


def _reduce(tensor: Tensor, ranks: Ranks, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    if ranks.size == 1 or not tensor.numel():
        return tensor
    if tensor.is_sparse:
        return _sum_of_rows(tensor.coalesce(), ranks)
    if not ordinary(tensor):
        raise RuntimeError(NOT_BATCHED)
    result = tensor.clone(memory_format=torch.contiguous_format)
    count_sent("all_reduce", 2 * (ranks.size - 1) / ranks.size * result.nbytes)
    dist.all_reduce(result, operation, group=ranks.group)
    return result


def _sum_of_rows(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum of row-sparse gradients: two all-gathers of the touched rows, of as many as a rank has at most."""
    count = torch.tensor(tensor.indices().shape[1], device=tensor.device)
    most = int(_reduce(count, ranks, dist.ReduceOp.MAX))
    numbers = math.prod(tensor.shape[1:])
    count_sent("all_gather", most * (numbers * tensor.itemsize + tensor.indices().itemsize) * (ranks.size - 1))
    return sum_rows(tensor, most, ranks.group)


class _Collective(HandWritten):
    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(NOT_BATCHED)


class _Copied(_Collective):
    @staticmethod
    def forward(tensor: Tensor, ranks: Ranks, mean: bool) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.ranks, ctx.mean = inputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        total = summed(upstream[0], ctx.ranks)
        return quotient(total, ctx.ranks.size) if ctx.mean else total, None, None


class _CopiedTogether(_Collective):
    @staticmethod
    def forward(ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.ranks = inputs[0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, *summed_together(upstream, ctx.ranks)


class _Summed(_Collective):
    @staticmethod
    def forward(tensor: Tensor, ranks: Ranks) -> Tensor:
        return _reduce(tensor, ranks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.ranks = inputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return copied(upstream[0], ctx.ranks), None


class _Gathered(_Collective):
    @staticmethod
    def forward(tensor: Tensor, spans: Sequence[slice], ranks: Ranks) -> Tensor:
        widths = [span.stop - span.start for span in spans]
        padded = tensor.new_zeros(len(tensor), max(widths))
        padded[:, : tensor.shape[1]] = tensor
        return torch.cat([p[:, :w] for p, w in zip(gathered_alike(padded, ranks), widths, strict=True)], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, spans, ctx.ranks = inputs
        ctx.own = spans[ctx.ranks.rank]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return copied(upstream[0], ctx.ranks)[:, ctx.own], None, None

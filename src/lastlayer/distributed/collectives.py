"""The collectives of sharded layers, differentiable.

All ranks compute the same loss from the same hidden states, and each runs its own backward pass. So the gradient
of a tensor that all ranks hold is the same on all; and with R ranks

| forward | backward |
|---|---|
| `copied`: nothing, before each rank does its own part | the sum over the ranks |
| `summed`: the sum over the ranks | nothing |
| `gathered`: the columns of all ranks | the rank's own columns |

Each backward pass is made of these again, and so second derivatives are right too.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lastlayer.distributed.ranks import Ranks
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.row_sparse import row_sparse
from lastlayer.functional.second_order import HandWritten
from lastlayer.functional.sent_bytes import count_sent

NOT_BATCHED = (
    "the collectives of lastlayer.distributed cannot be batched, by torch.func.vmap, is_grads_batched=True or "
    "vectorize=True; loop over the examples, on all ranks"
)


def copied(tensor: Tensor, ranks: Ranks, *, mean: bool = False) -> Tensor:
    """`tensor`, whose gradient is the sum over the ranks, or their mean."""
    return tensor if ranks.size == 1 else _Copied.run(tensor, ranks, mean)


def summed(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks."""
    return tensor if ranks.size == 1 else _Summed.run(tensor, ranks)


def copied_together(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """Each as by `copied`, with one all-reduce of all their gradients."""
    return _together(tensors, lambda whole: copied(whole, ranks))


def summed_together(tensors: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """The sum of each over the ranks, by one all-reduce."""
    return _together(tensors, lambda whole: summed(whole, ranks))


def _together(tensors: Sequence[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    whole = work(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    parts = whole.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def averaged(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The mean over the ranks; of a tensor that is sparse in its rows too, coalesced."""
    if not tensor.is_sparse:
        return summed(tensor, ranks) / ranks.size
    total = summed(tensor.coalesce(), ranks)
    return row_sparse(total.indices()[0], total.values() / ranks.size, len(total))


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
    parts = [torch.empty_like(tensor) for _ in range(ranks.size)]
    dist.all_gather(parts, tensor, group=ranks.group)
    return parts


def from_first(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The tensor of the first rank, on all."""
    if ranks.size > 1 and tensor.numel():
        tensor = tensor.clone()
        count_sent("broadcast", tensor.nbytes * (ranks.size - 1) / ranks.size)
        dist.broadcast(tensor, group=ranks.group, group_src=0)
    return tensor


@contextmanager
def same_random_numbers(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """PyTorch's default generators draw what those of the first rank draw; sends their states, some kB.

    A rank whose generator was in the same state goes on from where the first rank's is afterwards; another's own
    generator is left as it was.
    """
    if ranks.size == 1:
        yield
        return
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    before = [generator.get_state() for generator in generators]
    own_device = torch.device(ranks.mesh.device_type)
    firsts = [from_first(state.to(own_device), ranks).to(state.device) for state in before]
    for generator, first in zip(generators, firsts, strict=True):
        generator.set_state(first)
    try:
        yield
    finally:
        for generator, state, first in zip(generators, before, firsts, strict=True):
            if not torch.equal(state, first):
                generator.set_state(state)


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


def _sum_of_rows(
    part: Tensor,  # (V, ...), sparse and coalesced
    ranks: Ranks,
) -> Tensor:  # (V, ...), sparse and coalesced
    """Two all-gathers: each rank sends its rows and their ids, padded to the most that one has."""
    count = part.indices().shape[1]
    most = int(_reduce(torch.tensor(count, device=part.device), ranks, dist.ReduceOp.MAX))
    ids = part.indices().new_full((most,), -1)
    values = part.values().new_zeros(most, *part.shape[1:])
    ids[:count], values[:count] = part.indices()[0], part.values()
    all_ids, all_values = (torch.cat(gathered_alike(own, ranks)) for own in (ids, values))
    used = all_ids >= 0
    touched, places = all_ids[used].unique(return_inverse=True)
    total = values.new_zeros(len(touched), *part.shape[1:])
    return row_sparse(touched, total.index_add_(0, places, all_values[used]), len(part))


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
        return (averaged if ctx.mean else summed)(upstream[0], ctx.ranks), None, None


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

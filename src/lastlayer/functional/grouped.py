"""The batch grouped by cluster: `log P(class | cluster, hidden)` by one matrix product a touched cluster."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lastlayer.functional.linear_chunks import exact_dtype, product_dtype
from lastlayer.functional.row_sparse import GradientMemory, row_sparse


class Groups(NamedTuple):
    """The rows of a batch sorted by cluster; the lists have one entry for each cluster that occurs."""

    order: Tensor  # (N,), the row at each sorted place
    starts_of_rows: Tensor  # (N,), where the cluster of each sorted row begins in the weight
    sizes_of_rows: Tensor  # (N,), how many classes it has
    rows: list[int]  # how many rows of the batch each cluster has
    starts: list[int]  # where each cluster begins in the weight
    sizes: list[int]  # how many classes it has


def group_by_cluster(
    clusters: Tensor,  # (N,), the cluster of each row
    offsets: Tensor,  # (C + 1,): cluster c holds the weight rows from offsets[c] up to offsets[c + 1]
) -> Groups:
    """The rows of a batch by cluster. On a GPU this waits for the device."""
    ordered, order = clusters.sort(stable=True)
    starts = offsets.index_select(0, ordered)
    sizes = offsets.index_select(0, ordered + 1) - starts
    touched, rows = starts.unique_consecutive(return_counts=True)
    first = rows.cumsum(0) - rows
    return Groups(order, starts, sizes, rows.tolist(), touched.tolist(), sizes.index_select(0, first).tolist())


def grouped_log_prob(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d), cluster after cluster
    bias: Tensor | None,  # (V,)
    slots: Tensor,  # (N,), the weight row of each target
    groups: Groups,
    *,
    sparse: bool = False,
    memory: GradientMemory | None = None,
) -> Tensor:  # (N,)
    """`log P(target | its cluster)`: of each row only the target's own cluster is computed.

    Equals, a row at a time, `(weight[a:b] @ h + bias[a:b]).log_softmax(0)[slot - a]`, where the weight rows from a
    up to b are the target's cluster. There is no `(N, rows, d)` gather: every touched cluster is read once,
    forward and backward together, and of the gradient only touched clusters are written. Once differentiable.

    Args:
        sparse: gradients of `weight` and `bias` hold the touched clusters' rows only, coalesced.
        memory: lends the memory for the weight's gradient.
    """
    dtype = product_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        log_prob: Any = _GroupedLogProb.apply(hidden.to(dtype), weight, bias, slots, groups, sparse, memory)
    return log_prob


class _GroupedLogProb(torch.autograd.Function):
    """Of a row h with target t, its cluster's weight rows W, p = softmax(W h + b) and upstream gradient g:

    hidden: g (W[t] - W^T p)   the factor of g is formed in the forward pass, while W is in the cache
    weight: (e_t - p) g h^T    summed over the cluster's rows of the batch: one product, written once
    bias:   (e_t - p) g        summed likewise
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slots: Tensor,
        groups: Groups,
        sparse: bool,
        memory: GradientMemory | None,
    ) -> Tensor:
        dtype, accurate = hidden.dtype, exact_dtype(hidden.dtype)
        rows, targets = hidden.index_select(0, groups.order), slots.index_select(0, groups.order)
        numbers = [n * size for n, size in zip(groups.rows, groups.sizes, strict=True)]
        log_p = torch.empty(sum(numbers), dtype=accurate, device=hidden.device)
        mean_weight = torch.empty_like(rows) if ctx.needs_input_grad[0] else None  # W^T p
        means = () if mean_weight is None else mean_weight.split(groups.rows)
        for k, (own, flat) in enumerate(zip(rows.split(groups.rows), log_p.split(numbers), strict=True)):
            start, size = groups.starts[k], groups.sizes[k]
            block = weight.narrow(0, start, size).to(dtype)
            logits = own @ block.T if bias is None else own @ block.T + bias.narrow(0, start, size).to(dtype)
            log_p_own = torch.log_softmax(logits, 1, dtype=accurate, out=flat.view(-1, size))
            if means:
                torch.mm(log_p_own.exp().to(dtype), block, out=means[k])
        ends = groups.sizes_of_rows.cumsum(0)
        at_target = ends - groups.sizes_of_rows + targets - groups.starts_of_rows
        log_prob = torch.empty(len(rows), dtype=accurate, device=hidden.device)
        log_prob[groups.order] = log_p[at_target]
        slope = None if mean_weight is None else weight.index_select(0, targets).to(dtype) - mean_weight
        ctx.save_for_backward(rows, log_p, at_target, slope)
        ctx.groups, ctx.sparse, ctx.memory = groups, sparse, memory
        ctx.num_rows, ctx.like = len(weight), weight.new_empty(0)
        return log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, log_p, at_target, slope = ctx.saved_tensors
        groups: Groups = ctx.groups
        grad = grad.index_select(0, groups.order)
        grad_hidden = grad_weight = grad_bias = None
        if slope is not None:
            grad_hidden = torch.empty_like(slope)
            grad_hidden[groups.order] = slope * grad[:, None].to(slope.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_logits = log_p.exp().mul_(-grad.repeat_interleave(groups.sizes_of_rows))
            grad_logits[at_target] += grad
            grad_weight, grad_bias = _parameter_gradients(ctx, rows, grad_logits)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _parameter_gradients(ctx: Any, rows: Tensor, grad_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias: `grad_logits^T rows` and its sum, a cluster at a time."""
    groups, like = ctx.groups, ctx.like
    num_rows = sum(groups.sizes) if ctx.sparse else ctx.num_rows
    values = biases = None
    if ctx.needs_input_grad[1]:
        shape = (num_rows, rows.shape[1])
        memory = ctx.memory or GradientMemory()
        values = memory.lend(shape, like) if ctx.sparse else like.new_zeros(shape)
    if ctx.needs_input_grad[2]:
        biases = like.new_empty(num_rows) if ctx.sparse else like.new_zeros(num_rows)
    numbers = [n * size for n, size in zip(groups.rows, groups.sizes, strict=True)]
    place = 0
    for k, (own, flat) in enumerate(zip(rows.split(groups.rows), grad_logits.split(numbers), strict=True)):
        size = groups.sizes[k]
        start = place if ctx.sparse else groups.starts[k]
        of_group = flat.view(-1, size)
        if values is not None:
            _product_into(values.narrow(0, start, size), of_group.T.to(own.dtype), own)
        if biases is not None:
            biases.narrow(0, start, size).copy_(of_group.sum(0))
        place += size
    if not ctx.sparse:
        return values, biases
    touched = _touched_rows(groups, rows.device)
    return (
        None if values is None else row_sparse(touched, values, ctx.num_rows),
        None if biases is None else row_sparse(touched, biases, ctx.num_rows),
    )


def _product_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == right.dtype:
        torch.mm(left, right, out=out)
    else:  # a float32 gradient of products taken in half precision
        out.copy_(left @ right)


def _touched_rows(groups: Groups, device: torch.device) -> Tensor:
    """The weight rows of the touched clusters, rising."""
    starts, sizes = torch.tensor([groups.starts, groups.sizes], dtype=torch.int64).to(device)
    before = sizes.cumsum(0) - sizes
    return torch.arange(sum(groups.sizes), device=device) + (starts - before).repeat_interleave(sizes)

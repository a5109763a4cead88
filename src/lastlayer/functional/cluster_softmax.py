"""`log P(class | cluster)`: many softmaxes, each of some rows of a batch over the classes of one cluster."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lastlayer.functional.linear_chunks import linear_logits
from lastlayer.functional.operators import make_operator, outside_graphs
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.functional.row_sparse import GradientMemory, row_sparse
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.functional.segments import row_clusters
from lastlayer.kernels import backends
from lastlayer.kernels import grouped as kernels
from lastlayer.kernels.backends import grouped_softmax_backend_for


def cluster_log_prob(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d), cluster after cluster
    bias: Tensor | None,  # (V,)
    slots: Tensor,  # (N,), the row of each target in `weight`
    clusters: Tensor | None = None,  # (N,), the cluster of each target; None: one cluster of all classes
    offsets: Tensor | None = None,  # (C + 1,): cluster c holds the rows from offsets[c] up to offsets[c + 1]
    *,
    sparse: bool = False,
    memory: GradientMemory | None = None,
) -> Tensor:  # (N,)
    """`log P(class | cluster)` of the targets; only touched clusters are read.

    Equals, a row at a time, `F.linear(h, weight[a:b], bias[a:b]).log_softmax(0)[slot - a]` where the target's
    cluster holds the rows from a up to b. The batch is sorted by cluster, so there is no `(N, rows, d)` gather:
    every touched cluster is read once, forward and backward together, and of the gradient of `weight` only touched
    clusters are written, once. Second derivatives, the transforms of `torch.func` and exported programs read all
    classes, by PyTorch's own operations.

    Args:
        sparse: the gradients of `weight` and `bias` hold the touched clusters' rows only, coalesced.
        memory: allocates the buffer of the sparse gradient of `weight`.
    """
    tables, dtype = (slots, clusters, offsets), product_dtype(hidden)
    with no_autocast(hidden.device.type):
        hidden = hidden.to(dtype)
        if not ordinary(hidden, weight, bias, slots):
            return _plain(tables, hidden, weight, bias)
        if torch.compiler.is_compiling() and not sparse:
            return _OPERATOR(hidden, weight, bias, *tables)
        return _grouped(hidden, weight, bias, *tables, sparse, memory)


def _plain(tables: tuple[Any, ...], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (N,)
    """The same by PyTorch's own operations on all classes: no shape depends on the targets."""
    slots, clusters, offsets = tables
    logits, _ = linear_logits(hidden, weight, bias, None, (), hidden.dtype)
    if clusters is not None:
        others = row_clusters(offsets, len(weight)) != clusters[:, None]  # (N, V)
        logits = logits.masked_fill(others, -torch.inf)
    return logits.log_softmax(1).gather(1, slots[:, None])[:, 0]


class Groups(NamedTuple):
    """The rows of a batch sorted by cluster."""

    order: Tensor  # (N,), the row at each sorted place
    # (G, 4) int64 on the CPU, of each cluster that occurs: its first place in `order`, how many rows it has, where
    # it begins in the weight, and how many classes it has.
    table: Tensor

    def each(self) -> Iterator[tuple[Tensor, int, int]]:
        """For each cluster: the batch's rows that are in it, where it begins in the weight, and its size."""
        _, counts, starts, sizes = self.table.T.tolist()
        return zip(self.order.split(counts), starts, sizes, strict=True)


def group_by_cluster(
    clusters: Tensor,  # (N,), the cluster of each row
    offsets: Tensor,  # (C + 1,)
) -> Groups:
    """The rows of a batch by cluster. On a GPU this waits for the device."""
    ordered, order = clusters.sort(stable=True)
    touched, counts = ordered.unique_consecutive(return_counts=True)
    starts = offsets[touched]
    table = torch.stack([counts.cumsum(0) - counts, counts, starts, offsets[touched + 1] - starts], 1)
    return Groups(order, table.cpu())


def touched_rows(groups: Groups) -> Tensor:  # (R,)
    """The weight rows of the touched clusters, rising."""
    starts, sizes = groups.table[:, 2:].T.numpy()  # NumPy, for the reason of `scaled_rows`
    shift = starts - (sizes.cumsum() - sizes)
    return torch.tensor(np.arange(sizes.sum()) + shift.repeat(sizes), device=groups.order.device)


@outside_graphs
def _grouped(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    clusters: Tensor | None,
    offsets: Tensor | None,
    sparse: bool = False,
    memory: GradientMemory | None = None,
) -> Tensor:
    if clusters is None or offsets is None:
        group = [[0, len(hidden), 0, len(weight)]] if len(hidden) else []
        table = torch.tensor(group, dtype=torch.int64, device="cpu").view(-1, 4)
        groups = Groups(torch.arange(len(hidden), device=hidden.device), table)
    else:
        groups = group_by_cluster(clusters, offsets)
    settings = _Settings((slots, clusters, offsets), groups, sparse, memory)
    wants_slope = torch.is_grad_enabled() and hidden.requires_grad
    found: Any = _ClusterLogProb.run(settings, wants_slope, hidden, weight, bias)
    return found[0]


class _Settings(NamedTuple):
    tables: tuple[Any, ...]  # slots, clusters and offsets
    groups: Groups
    sparse: bool
    memory: GradientMemory | None

    def compiled(self, hidden: Tensor, weight: Tensor) -> bool:
        """Whether the kernels serve."""
        backend = grouped_softmax_backend_for(hidden.device, hidden.dtype, weight.dtype)
        return backend == "compiled" and weight.is_contiguous()


class _ClusterLogProb(HandWritten):
    """Each group is a softmax p over weight rows W with target t. With the residual r = p - e_t and scale = -g:

    hidden: scale W^T r        its slope W^T r is formed in the forward pass, while W is in the cache
    weight: r (scale h)^T      summed over the batch: one product a cluster
    bias:   scale r            summed in the same way
    """

    @staticmethod
    def forward(
        settings: _Settings, wants_slope: bool, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:  # (N,)
        (order, table), slots = settings.groups, settings.tables[0]
        hidden = hidden.contiguous().resolve_neg()
        log_prob = hidden.new_empty(len(hidden), dtype=exact_dtype(hidden.dtype))
        residual = log_prob.new_empty(int((table[:, 1] * table[:, 3]).sum()))  # group after group
        slope = torch.empty_like(hidden) if wants_slope else None
        if settings.compiled(hidden, weight):
            inputs = hidden, weight, None if bias is None else bias.contiguous(), slots.contiguous()
            kernels.softmax_forward(table, backends.GROUP_WORK, order, *inputs, residual, log_prob, slope)
            return log_prob, (residual, slope)
        for (at, start, size), part in zip(settings.groups.each(), _parts(residual, table), strict=True):
            block = weight.narrow(0, start, size).to(hidden.dtype)
            logits = (hidden[at] @ block.T).to(log_prob.dtype)
            if bias is not None:
                logits += bias.narrow(0, start, size).to(logits.dtype)
            target = slots[at, None] - start
            of_classes = logits.log_softmax(1)
            found = of_classes.gather(1, target)
            log_prob[at] = found[:, 0]
            part.copy_(of_classes.exp_().scatter_add_(1, target, -torch.ones_like(found)))
            if slope is not None:
                slope[at] = part.to(hidden.dtype) @ block
        return log_prob, (residual, slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        ctx.settings, _, hidden, weight, bias = inputs
        ctx.save_for_backward(*output[1], hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        saved, twin = ctx.saved_tensors, partial(_plain, ctx.settings.tables)
        return None, None, *gradients(lambda: _form(ctx, upstream[0], *saved[:4]), twin, saved[2:], upstream[:1])


def _form(
    ctx: Any, upstream: Tensor, residual: Tensor, slope: Tensor | None, hidden: Tensor, weight: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden, weight and bias."""
    settings, wanted = ctx.settings, ctx.needs_input_grad[2:]
    groups, hidden, scale = settings.groups, hidden.contiguous().resolve_neg(), -upstream.contiguous()
    compiled = settings.compiled(hidden, weight)
    of_hidden = None
    if slope is not None:
        of_hidden = kernels.scaled_rows(slope, scale) if compiled else (slope * scale[:, None]).to(slope.dtype)
    if not (wanted[1] or wanted[2]):
        return of_hidden, None, None
    num_classes, (order, table) = len(weight), groups
    sizes = table[:, 3]
    num_rows = int(sizes.sum())
    if settings.sparse:
        of_weight = (settings.memory or GradientMemory()).allocate((num_rows, weight.shape[1]), weight)
        of_bias = weight.new_empty(num_rows)
    else:
        make = weight.new_empty if num_rows == num_classes else weight.new_zeros  # every touched row is written
        of_weight, of_bias = make(weight.shape), make(num_classes)
    if compiled:
        arrays = hidden, residual, scale, of_weight, of_bias
        kernels.softmax_backward(table, backends.GROUP_WORK, order, *arrays, compact=settings.sparse)
    else:
        outs = (sizes.cumsum(0) - sizes).tolist() if settings.sparse else table[:, 2].tolist()
        for (at, _, size), part, out in zip(groups.each(), _parts(residual, table), outs, strict=True):
            factors = (part * scale[at, None]).T
            of_weight.narrow(0, out, size).copy_(factors.to(hidden.dtype) @ hidden[at])
            of_bias.narrow(0, out, size).copy_(factors.sum(1))
    if settings.sparse:
        touched = touched_rows(groups)
        of_weight, of_bias = row_sparse(touched, of_weight, num_classes), row_sparse(touched, of_bias, num_classes)
    return of_hidden, of_weight if wanted[1] else None, of_bias if wanted[2] else None


def _parts(residual: Tensor, table: Tensor) -> list[Tensor]:
    """The residuals of each group, `(count, size)`."""
    shapes = table[:, [1, 3]].tolist()
    flat = residual.split([count * size for count, size in shapes])
    return [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]


_OPERATOR = make_operator(
    "cluster_log_prob",
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor slots, Tensor? clusters, Tensor? offsets",
    _grouped,
    leaves=3,
    empty=lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=exact_dtype(hidden.dtype)),
)

"""`log P(cluster) + log P(class | cluster)` with the batch grouped by cluster, and its gradient."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.groups import Groups, Targets, group_by_cluster, touched_rows, whole_batch
from lastlayer.functional.linear_twin import linear_logits
from lastlayer.functional.operators import make_operator
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.outside_graphs import outside_graphs
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.functional.row_sparse import GradientMemory, row_sparse
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.functional.segments import row_clusters
from lastlayer.functional.softmaxes import Softmaxes


class TwoLevel(NamedTuple):
    """The parameters of both levels."""

    head_weight: Tensor  # (C, d)
    head_bias: Tensor | None  # (C,)
    weight: Tensor  # (V, d), cluster after cluster
    bias: Tensor | None  # (V,)


def two_level_log_prob(
    hidden: Tensor,  # (N, d)
    parameters: TwoLevel,
    clusters: Tensor,  # (N,), the cluster of each target
    slots: Tensor,  # (N,), the row of each target in `weight`
    offsets: Tensor,  # (C + 1,): cluster c holds the rows from offsets[c] up to offsets[c + 1]
    *,
    with_head: bool = True,
    sparse: bool = False,
    memory: GradientMemory | None = None,
) -> Tensor:  # (N,)
    """`log P(cluster) + log P(class | cluster)` of the targets; of the second level only touched rows are read.

    Equals, a row at a time,

        (head_weight @ h + head_bias).log_softmax(0)[c] + (weight[a:b] @ h + bias[a:b]).log_softmax(0)[slot - a]

    where cluster c holds the rows from a up to b. The batch is sorted by cluster, so there is no `(N, rows, d)`
    gather: every touched cluster is read once, forward and backward together, and of the gradient of `weight` only
    touched clusters are written, once. Second derivatives, the transforms of `torch.func` and exported programs
    read all classes, by PyTorch's own operations.

    Args:
        with_head: whether the first term is in it; without, only the second level is computed.
        sparse: the gradients of `weight` and `bias` hold the touched clusters' rows only, coalesced.
        memory: allocates the buffer of the sparse gradient of `weight`.
    """
    targets, dtype = Targets(clusters, slots, offsets, sparse, memory), product_dtype(hidden)
    own = parameters if with_head else (None, None, *parameters[2:])
    with no_autocast(hidden.device.type):
        if not ordinary(hidden, *own, clusters):
            return _plain(targets, hidden.to(dtype), *own)
        if torch.compiler.is_compiling() and not sparse:
            return _OPERATOR(hidden.to(dtype), *own, clusters, slots, offsets)
        return _grouped(targets, hidden.to(dtype), *own)


def _plain(
    targets: Targets,
    hidden: Tensor,  # (N, d)
    head_weight: Tensor | None,  # None: the second level alone
    head_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # (N,)
    """The same by PyTorch's own operations on all classes: no shape depends on the targets."""

    def logits(weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_logits(hidden, weight, bias, None, (), hidden.dtype)[0]

    others = row_clusters(targets.offsets, len(weight)) != targets.clusters[:, None]  # (N, V)
    inner = logits(weight, bias).masked_fill(others, -torch.inf).log_softmax(1)
    log_prob = inner.gather(1, targets.slots[:, None])
    if head_weight is not None:
        head = logits(head_weight, head_bias).log_softmax(1)
        log_prob = log_prob + head.gather(1, targets.clusters[:, None])
    return log_prob[:, 0]


@outside_graphs
def _grouped(targets: Targets, hidden: Tensor, *parameters: Tensor | None) -> Tensor:
    wants_slope = torch.is_grad_enabled() and hidden.requires_grad
    found: Any = _TwoLevelLogProb.run(targets, wants_slope, hidden, *parameters)
    return found[0]


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass; the tensors sorted by cluster."""

    order: Tensor  # (N,)
    rows: Tensor  # (N, d)
    slope: Tensor | None  # (N, d)
    head_residual: Tensor | None
    residual: Tensor
    head: Softmaxes | None
    inner: Softmaxes
    groups: Groups


class _TwoLevelLogProb(HandWritten):
    """Each level is a softmax p over weight rows W with target t. With the residual r = p - e_t and scale = -g:

    hidden: scale W^T r        its factor of scale is formed in the forward pass, while W is in the cache
    weight: (scale r) h^T      summed over the batch: one product a cluster
    bias:   scale r            summed in the same way

    The head is a level of one group, the whole batch; inside the clusters each group has its own weight rows.
    """

    @staticmethod
    def forward(
        targets: Targets,
        wants_slope: bool,
        hidden: Tensor,  # (N, d)
        *parameters: Any,  # of `TwoLevel`; those of the head may be None
    ) -> tuple[Tensor, _Kept]:  # (N,)
        head_weight, head_bias, weight, bias = parameters
        groups = group_by_cluster(targets.clusters, targets.offsets)
        order = groups.order
        rows = groups.sorted(hidden)
        slots, clusters = (ids.index_select(0, order) for ids in (targets.slots, targets.clusters))
        head = None
        inner = Softmaxes.of(groups, rows, weight, compact=targets.sparse)
        log_prob = rows.new_zeros(rows.shape[0], dtype=exact_dtype(rows.dtype))
        slope = torch.empty_like(rows) if wants_slope else None
        head_residual = None
        if head_weight is not None:
            head = Softmaxes.of(whole_batch(rows, len(head_weight)), rows, head_weight)
            head_residual = head.forward(
                rows, head_weight, head_bias, clusters, log_prob, slope, slope_is_new=True
            )
        residual = inner.forward(rows, weight, bias, slots, log_prob, slope, slope_is_new=head is None)
        kept = _Kept(order, rows, slope, head_residual, residual, head, inner, groups)
        return torch.empty_like(log_prob).index_copy_(0, order, log_prob), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, _Kept]) -> None:
        ctx.targets, _, hidden, *parameters = inputs
        *tensors, head, inner, ctx.groups = output[1]
        ctx.levels, weight = (head, inner), parameters[2]
        ctx.like, ctx.num_clusters, ctx.num_classes = weight[:0], len(ctx.targets.offsets) - 1, len(weight)
        ctx.save_for_backward(*tensors, hidden, *parameters)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        saved, twin = ctx.saved_tensors, partial(_plain, ctx.targets)
        return None, None, *gradients(lambda: _form(ctx, upstream[0], *saved[:5]), twin, saved[5:], upstream[:1])


def _form(
    ctx: Any,
    upstream: Tensor,
    order: Tensor,
    rows: Tensor,
    slope: Tensor | None,
    head_residual: Tensor,
    residual: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of hidden and all parameters."""
    (head, inner), wanted, like = ctx.levels, ctx.needs_input_grad[2:], ctx.like
    scale = upstream.index_select(0, order).neg_()
    of_hidden = of_head_weight = of_head_bias = of_weight = of_bias = None
    if slope is not None:
        of_hidden = ctx.groups.unsorted(slope, scale)
    if wanted[1] or wanted[2]:
        make = like.new_empty if rows.shape[0] else like.new_zeros  # all are written where there is a row
        of_head_weight, of_head_bias = make(ctx.num_clusters, rows.shape[1]), make(ctx.num_clusters)
        head.backward(rows, head_residual, scale, of_head_weight, of_head_bias)
    if wanted[3] or wanted[4]:
        of_weight, of_bias = _inner_gradients(ctx, inner, rows, residual, scale)
    formed = (of_hidden, of_head_weight, of_head_bias, of_weight, of_bias)
    return tuple(gradient if want else None for gradient, want in zip(formed, wanted, strict=True))


def _inner_gradients(
    ctx: Any, inner: Softmaxes, rows: Tensor, residual: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Of weight and bias: dense, or of the touched clusters' rows only."""
    like, num_classes = ctx.like, ctx.num_classes
    if not ctx.targets.sparse:
        of_weight, of_bias = like.new_zeros(num_classes, rows.shape[1]), like.new_zeros(num_classes)
        inner.backward(rows, residual, scale, of_weight, of_bias)
        return of_weight, of_bias
    touched = touched_rows(ctx.groups)
    shape = ctx.groups.num_touched, rows.shape[1]
    of_weight, of_bias = (ctx.targets.memory or GradientMemory()).allocate(shape, like), like.new_empty(shape[0])
    inner.backward(rows, residual, scale, of_weight, of_bias)
    return row_sparse(touched, of_weight, num_classes), row_sparse(touched, of_bias, num_classes)


def _two_level(hidden: Tensor, *others: Tensor) -> Tensor:
    """`_grouped` of dense gradients, its arguments all tensors."""
    *parameters, clusters, slots, offsets = others
    return _grouped(Targets(clusters, slots, offsets, False, None), hidden, *parameters)


_OPERATOR = make_operator(
    "two_level_log_prob",
    "Tensor hidden, Tensor? head_weight, Tensor? head_bias, Tensor weight, Tensor? bias, "
    "Tensor clusters, Tensor slots, Tensor offsets",
    _two_level,
    leaves=5,
    empty=lambda hidden, *_: hidden.new_empty(hidden.shape[0], dtype=exact_dtype(hidden.dtype)),
)

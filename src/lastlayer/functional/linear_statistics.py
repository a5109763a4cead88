"""Log-probability, normaliser, entropy and top-k of a linear layer's softmax without its `(N, V)` logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count, check_linear, check_targets, eager_on_cpu
from lastlayer.functional.linear_chunks import Gradients, LinearChunks, Wanted
from lastlayer.functional.linear_twin import linear_logits, log_normalizer
from lastlayer.functional.logit_map import LogitMap, bound, check_logit_map
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import no_autocast, product_dtype
from lastlayer.functional.results import TopK
from lastlayer.functional.second_order import gradients
from lastlayer.functional.selection import Selection


class LinearStatistics(NamedTuple):
    """The result of `linear_statistics`, in float32 at least."""

    target_log_prob: Tensor | None  # (...)
    log_normalizer: Tensor  # (...), the log-sum-exp of the mapped logits
    entropy: Tensor  # (...), in nats
    topk: TopK | None  # (..., k) each


def linear_statistics(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    targets: Tensor | None = None,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_map: LogitMap | None = None,
    k: int | None = None,
    selection: Selection | None = None,
    ignore_index: int = -100,
) -> LinearStatistics:
    """Statistics for trainers of `logits = logit_map(hidden @ weight.T + bias)`, without `(N, V)` memory.

    Equals, in one pass over chunks of rows,

        log_prob = logits.log_softmax(-1)
        target_log_prob = log_prob.gather(-1, targets)       # None without targets
        log_normalizer = logits.logsumexp(-1)
        entropy = -(log_prob.exp() * log_prob).sum(-1)
        topk = log_prob.topk(k)                              # None without k; ordered by the raw logits

    All four are differentiable, for hidden, weight, bias and the map's parameters; the backward pass recomputes
    the chunks. Cost: one matrix product of `2 N V d` operations forward and three backward; memory one chunk of
    logits. For the loss alone `linear_cross_entropy` is cheaper by one product.

    `selection` says which classes `topk` may return; the index is -1 and the log-probability -inf where fewer than
    k are left. `FullSoftmax.topk` builds it from its `exclude` and `allowed`.

    A row whose target is `ignore_index` is absent: all four are 0 there (the indices of `topk` -1), carry no
    gradient, and on a CPU cost nothing. Without targets every row counts.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.
        IndexError: a target that is no class (on a GPU: a device-side assertion).

    >>> import torch
    >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(1000, 8)
    >>> result = linear_statistics(hidden, weight, torch.randint(1000, (2, 3)), k=5)
    >>> result.target_log_prob.shape, result.entropy.shape, result.topk.indices.shape
    (torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([2, 3, 5]))
    """
    check_linear(hidden, weight, bias)
    check_logit_map(logit_map)
    shape, rows = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
    ids = absent = at = None
    if targets is not None:
        targets, all_count = check_targets(targets, shape, len(weight), ignore_index)
        ids = targets.reshape(-1, 1)
        if not all_count or 0 <= ignore_index < len(weight):
            absent = ids == ignore_index
            if eager_on_cpu(ids):  # absent rows cost nothing
                at = (~absent[:, 0]).nonzero().squeeze(1)
                rows, ids = rows.index_select(0, at), ids.index_select(0, at)
                selection = None if selection is None else selection.rows(at)
            else:
                ids = ids.masked_fill(absent, 0)
    if k is not None:
        k = check_count("k", k, 1, len(weight))
    parameters = () if logit_map is None else tuple(logit_map.parameters())
    dtype = product_dtype(hidden)
    if ordinary(rows, weight, bias, ids, *parameters):
        with no_autocast(hidden.device.type):
            found = _LinearStatistics.apply(rows, weight, bias, ids, logit_map, k, selection, dtype, *parameters)
    else:
        found = _plain(rows, weight, bias, ids, logit_map, parameters, k, selection, dtype)
    if absent is not None:
        found = [_without(part, -1 if part.dtype == torch.int64 else 0, absent, at) for part in found]
    target, normalizer, entropy, best, indices = found
    return LinearStatistics(
        None if ids is None else target.reshape(shape),
        normalizer.reshape(shape),
        entropy.reshape(shape),
        None if k is None else TopK(best.reshape(*shape, k), indices.reshape(*shape, k)),
    )


def _without(
    part: Tensor,  # (n,) or (n, k)
    value: int,
    absent: Tensor,  # (N, 1), bool
    at: Tensor | None,  # (n,), the rows that are present; None: `part` has all N
) -> Tensor:  # (N,) or (N, k)
    """`part` with `value` at the absent rows."""
    if at is None:
        return part.masked_fill(absent.view(-1, *(1 for _ in part.shape[1:])), value)
    return part.new_full((len(absent), *part.shape[1:]), value).index_copy(0, at, part)


def linear_score(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    ids: Tensor,  # (N, M), valid classes
    *,
    bias: Tensor | None = None,  # (V,)
    logit_map: LogitMap | None = None,
) -> Tensor:  # (N, M), float32 at least
    """`logit_map(hidden @ weight.T + bias).log_softmax(-1).gather(-1, ids)` in the same chunks, differentiable.

    Nothing is checked.
    """
    parameters = () if logit_map is None else tuple(logit_map.parameters())
    dtype = product_dtype(hidden)
    if not ordinary(hidden, weight, bias, ids, *parameters):
        return _plain(hidden, weight, bias, ids, logit_map, parameters, None, None, dtype)[0]
    with no_autocast(hidden.device.type):
        found: Any = _LinearStatistics.apply(hidden, weight, bias, ids, logit_map, None, None, dtype, *parameters)
    return found[0]


def _plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    logit_map: LogitMap | None,
    parameters: Sequence[Tensor],
    k: int | None,
    selection: Selection | None,
    dtype: torch.dtype,
    indices: Tensor | None = None,  # (N, k); None: they are computed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_LinearStatistics` returns, by PyTorch's own operations."""
    logits, values = linear_logits(hidden, weight, bias, logit_map, parameters, dtype)
    log_prob = values.log_softmax(1)
    target = log_prob[:, :0] if ids is None else log_prob.gather(1, ids)
    entropy = -(log_prob.exp() * log_prob.clamp(min=-1e4)).sum(1)
    if indices is None:
        found = (logits if selection is None else selection.bar(logits)).topk(k or 0)
        indices = found.indices.masked_fill(found.values == -torch.inf, -1)
    best = log_prob.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)
    return target, log_normalizer(values), entropy, best, indices


class _LinearStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,  # (N, M)
        logit_map: LogitMap | None,
        k: int | None,
        selection: Selection | None,
        dtype: torch.dtype,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        chunks = LinearChunks(hidden, weight, bias, logit_map, dtype)
        # The normaliser is kept as peak + log_mass, whose sum would round away digits where the peak is large.
        peak, log_mass, entropy = (hidden.new_empty(len(hidden), dtype=chunks.exact) for _ in range(3))
        target = hidden.new_empty(len(hidden), 0 if ids is None else ids.shape[1], dtype=chunks.exact)
        best = hidden.new_empty(len(hidden), k or 0, dtype=chunks.exact)
        indices = torch.empty_like(best, dtype=torch.int64)
        for rows in chunks.all_parts():
            logits = chunks.logits(rows)
            if k is not None:
                found = (logits if selection is None else selection.rows(rows).bar(logits)).topk(k)
                indices[rows] = found.indices.masked_fill(found.values == -torch.inf, -1)
            values = chunks.map(logits)
            peak[rows] = values.amax(1)
            shifted = values - peak[rows, None]
            at_target = None if ids is None else shifted.gather(1, ids[rows])
            at_best = shifted.gather(1, indices[rows].clamp(min=0))
            # The shift is bounded so that a class of probability 0 adds 0 to the entropy, not nan.
            shifted.clamp_(min=-1e4)
            mass = torch.exp(shifted, out=values).sum(1)
            log_mass[rows] = mass.log()
            entropy[rows] = log_mass[rows] - torch.einsum("nv,nv->n", values, shifted) / mass
            best[rows] = (at_best - log_mass[rows, None]).masked_fill_(indices[rows] < 0, -torch.inf)
            if at_target is not None:
                target[rows] = at_target - log_mass[rows, None]
        ctx.settings = logit_map, dtype
        ctx.save_for_backward(hidden, weight, bias, ids, indices, peak, log_mass, entropy, *parameters)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return target, peak + log_mass, entropy, best, indices

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """With p the probabilities, H the entropy, [.] an indicator, f the mapped logits:

        d target / d f_c = [c = y] - p_c        d normalizer / d f_c = p_c
        d best_j / d f_c = [c = i_j] - p_c      d entropy / d f_c = -p_c (log p_c + H)
        """
        hidden, weight, bias, ids, indices, peak, log_mass, entropy, *parameters = ctx.saved_tensors
        (logit_map, dtype), needs = ctx.settings, ctx.needs_input_grad

        def form() -> tuple[Tensor | None, ...]:
            chunks = LinearChunks(hidden, weight, bias, logit_map, dtype)
            chunks.want(Wanted(needs[0], needs[1], needs[2], any(needs[8:])))
            formed = _form(chunks, upstream, ids, indices, peak, log_mass, entropy)
            return *formed[:3], *formed.logit_map

        def twin(hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor) -> tuple[Tensor, ...]:
            return _plain(hidden, weight, bias, ids, logit_map, parameters, None, None, dtype, indices)[:4]

        inputs = hidden, weight, bias, *parameters
        found = gradients(lambda: bound(logit_map, parameters, form), twin, inputs, upstream[:4])
        return *found[:3], None, None, None, None, None, *found[3:]


def _form(
    chunks: LinearChunks,
    upstream: Sequence[Tensor | None],
    ids: Tensor | None,
    indices: Tensor,
    peak: Tensor,
    log_mass: Tensor,
    entropy: Tensor,
) -> Gradients:
    """The gradients of `_LinearStatistics`, chunk by chunk."""
    of_target, of_normalizer, of_entropy, of_best, *_ = upstream
    of_mass = torch.zeros_like(log_mass)  # what p_c is multiplied by
    if of_normalizer is not None:
        of_mass += of_normalizer
    if of_target is not None and ids is not None:
        of_mass -= of_target.sum(1)
    if of_best is not None:
        of_best, indices = of_best.masked_fill(indices < 0, 0.0), indices.clamp(min=0)
        of_mass -= of_best.sum(1)
    for rows in chunks:
        for part in chunks.parts(rows):
            logits = chunks.logits(part)
            log_prob = (chunks.map(logits) - peak[part, None]).sub_(log_mass[part, None])
            gradient = log_prob.exp()
            if of_entropy is None:
                gradient.mul_(of_mass[part, None])
            else:
                surprise = log_prob.clamp_(min=-1e4).add_(entropy[part, None])
                gradient.mul_(surprise.mul_(-of_entropy[part, None]).add_(of_mass[part, None]))
            if of_target is not None and ids is not None:
                gradient.scatter_add_(1, ids[part], of_target[part])
            if of_best is not None:
                gradient.scatter_add_(1, indices[part], of_best[part])
            chunks.map_back(part, logits, gradient)
        chunks.multiply_back(rows)
    return chunks.gradients()

"""Log-probabilities, normaliser, entropy, divergence and top-k of a linear softmax without its `(N, V)` logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_above_zero, check_count, check_linear, check_targets, eager_on_cpu
from lastlayer.functional.logit_map import LogitMap, check_logit_map
from lastlayer.functional.precision import product_dtype
from lastlayer.functional.reference_head import ReferenceHead, check_reference
from lastlayer.functional.results import TopK
from lastlayer.functional.selection import Selection, check_candidates
from lastlayer.functional.statistics_pass import RowStatistics, StatisticsSettings, row_statistics


class LinearStatistics(NamedTuple):
    """The result of `linear_statistics`, in float32 at least."""

    target_log_prob: Tensor | None  # (...)
    log_normalizer: Tensor  # (...), the log-sum-exp of the mapped logits divided by the temperature
    entropy: Tensor  # (...), in nats
    topk: TopK | None  # (..., k) each
    ids_log_prob: Tensor | None = None  # (..., C)
    kl: Tensor | None = None  # (...), KL(this || reference) in nats
    reference_target_log_prob: Tensor | None = None  # (...), no gradient
    reference_ids_log_prob: Tensor | None = None  # (..., C), no gradient


def linear_statistics(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    targets: Tensor | None = None,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_map: LogitMap | None = None,
    temperature: float = 1.0,
    ids: Tensor | None = None,  # (..., C)
    reference: ReferenceHead | tuple[Tensor, ...] | None = None,
    k: int | None = None,
    selection: Selection | None = None,
    ignore_index: int = -100,
) -> LinearStatistics:
    """Statistics of `logits = logit_map(hidden @ weight.T + bias) / temperature` without `(N, V)` memory.

    Equals, in one pass over chunks of rows,

        log_prob = logits.log_softmax(-1)
        target_log_prob = log_prob.gather(-1, targets)       # None without targets
        log_normalizer = logits.logsumexp(-1)
        entropy = -(log_prob.exp() * log_prob).sum(-1)
        topk = log_prob.topk(k)                              # None without k; ordered by the raw logits
        ids_log_prob = log_prob.gather(-1, ids)              # None without ids

    and, for `reference_log_prob` of the reference's own logits, divided by the same temperature,

        kl = (log_prob.exp() * (log_prob - reference_log_prob)).sum(-1)
        reference_target_log_prob, reference_ids_log_prob    # gathered in the same way

    All but the reference's are differentiable, for hidden, weight, bias and the map's parameters; the backward
    pass recomputes the chunks. Cost: one matrix product of `2 N V d` operations forward and three backward; of a
    reference one more forward, and one backward where `kl` is used. Memory: one chunk of logits. For the loss
    alone `linear_cross_entropy` is cheaper by one product.

    Args:
        ids: any C classes of each row, padded with `ignore_index`, where the result is 0.
        reference: `(hidden, weight)`, `(hidden, weight, bias)` or `(hidden, weight, bias, logit_map)` of another
            linear layer over the same V classes and of any width, or a `ReferenceHead`. It gets no gradient.
            Without a logit map of its own it has none, whatever `logit_map` is.
        selection: which classes `topk` may return; the index is -1 and the log-probability -inf where fewer than
            k are left. `FullSoftmax.topk` builds it from its `exclude` and `allowed`.

    A row whose target is `ignore_index` is absent: all results are 0 there (the indices of `topk` -1), carry no
    gradient, and on a CPU cost nothing. Without targets every row counts.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.
        IndexError: a target or id that is no class (on a GPU: a device-side assertion).

    >>> import torch
    >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(1000, 8)
    >>> old_hidden, old_weight = torch.randn(2, 3, 16), torch.randn(1000, 16)
    >>> targets, candidates = torch.randint(1000, (2, 3)), torch.randint(1000, (2, 3, 4))
    >>> result = linear_statistics(
    ...     hidden, weight, targets, temperature=0.7, ids=candidates, reference=(old_hidden, old_weight), k=5
    ... )
    >>> result.target_log_prob.shape, result.entropy.shape, result.topk.indices.shape
    (torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([2, 3, 5]))
    >>> result.ids_log_prob.shape, result.kl.shape, result.reference_target_log_prob.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3]), torch.Size([2, 3]))
    """
    check_linear(hidden, weight, bias)
    check_logit_map(logit_map)
    check_above_zero("temperature", temperature)
    shape, num_classes = hidden.shape[:-1], len(weight)
    if k is not None:
        k = check_count("k", k, 1, num_classes)
    other = None if reference is None else check_reference(reference, shape, num_classes)
    gathered, absent, padded = _gathered(targets, ids, shape, num_classes, ignore_index)
    rows, at = hidden.reshape(-1, hidden.shape[-1]), None
    if absent is not None and eager_on_cpu(absent):  # absent rows cost nothing
        at = (~absent).nonzero().squeeze(1)
        rows = rows.index_select(0, at)
        gathered = None if gathered is None else gathered.index_select(0, at)
        selection = None if selection is None else selection.rows(at)
        other = None if other is None else other._replace(hidden=other.hidden.index_select(0, at))
    settings = StatisticsSettings(product_dtype(hidden), logit_map, temperature, k, selection, other)
    found = row_statistics(rows, weight, bias, gathered, settings)
    if absent is not None:
        found = RowStatistics(*(_without(part, absent, at) for part in found))
    return _shaped(found, shape, padded, targets is not None, k is not None, reference is not None)


def _gathered(
    targets: Tensor | None,  # (...)
    ids: Tensor | None,  # (..., C)
    shape: torch.Size,
    num_classes: int,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The classes whose log-probabilities are computed, `(N, 1 + C)`, the target first; which rows are absent,
    `(N,)`, None if none is known to be; and which of `ids` are padding, `(N, C)`, None without ids."""
    parts, absent, padded = [], None, None
    if targets is not None:
        targets, some_ignored = check_targets(targets, shape, num_classes, ignore_index)
        of_rows = targets.reshape(-1, 1)
        if some_ignored:
            missing = of_rows == ignore_index
            of_rows, absent = of_rows.masked_fill(missing, 0), missing[:, 0]
        parts.append(of_rows)
    if ids is not None:
        candidates = check_candidates(ids, shape, num_classes, ignore_index)
        padded = candidates == ignore_index
        parts.append(candidates.masked_fill(padded, 0))
    return torch.cat(parts, 1) if parts else None, absent, padded


def _without(
    part: Tensor,  # (n, ...), or no rows at all
    absent: Tensor,  # (N,), bool
    at: Tensor | None,  # (n,), the rows that are present; None: `part` has all N
) -> Tensor:  # (N, ...)
    """`part` with 0 at the absent rows, -1 in indices."""
    value = 0 if part.is_floating_point() else -1
    if at is None:
        return part.masked_fill(absent.view(-1, *(1 for _ in part.shape[1:])), value)
    return part.new_full((len(absent), *part.shape[1:]), value).index_copy(0, at, part)


def _shaped(
    found: RowStatistics,
    shape: torch.Size,
    padded: Tensor | None,  # (N, C)
    with_targets: bool,
    with_topk: bool,
    with_reference: bool,
) -> LinearStatistics:
    """The statistics of rows in the leading shape of `hidden`, None for what was not requested."""

    def of_targets(log_prob: Tensor) -> Tensor | None:
        return log_prob[:, 0].reshape(shape) if with_targets else None

    def of_ids(log_prob: Tensor) -> Tensor | None:
        if padded is None:
            return None
        return log_prob[:, int(with_targets) :].masked_fill(padded, 0).reshape(*shape, padded.shape[1])

    topk = TopK(*(part.reshape(*shape, part.shape[1]) for part in (found.best, found.indices)))
    return LinearStatistics(
        of_targets(found.gathered),
        found.log_normalizer.reshape(shape),
        found.entropy.reshape(shape),
        topk if with_topk else None,
        of_ids(found.gathered),
        found.kl[:, 0].reshape(shape) if with_reference else None,
        of_targets(found.reference) if with_reference else None,
        of_ids(found.reference) if with_reference else None,
    )


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
    return row_statistics(hidden, weight, bias, ids, StatisticsSettings(product_dtype(hidden), logit_map)).gathered

"""Log-probabilities of several given classes of each row in a two-level softmax."""

from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.linear_statistics import linear_score
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import as_exact
from lastlayer.functional.row_sparse import row_sparse
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.functional.two_level import TwoLevel, two_level_log_prob


def two_level_score(
    hidden: Tensor,  # (N, d)
    parameters: TwoLevel,
    clusters: Tensor,  # (N, M), the cluster of each candidate
    slots: Tensor,  # (N, M), its row in `weight`
    offsets: Tensor,  # (C + 1,)
    *,
    sparse: bool = False,
) -> Tensor:  # (N, M)
    """`two_level_log_prob` of M candidates a row: one softmax over the clusters for each row, and one for each
    pair of a row and a cluster that holds some of its candidates.

    In each pair one candidate is the reference of the others: with r its slot and s another's,

        log P(s | cluster) = log P(r | cluster) + h . (w_s - w_r) + b_s - b_r
    """
    total = linear_score(hidden, parameters.head_weight, clusters, bias=parameters.head_bias)
    if not slots.numel():
        return total
    num_rows, count = slots.shape
    rows = torch.arange(num_rows, device=slots.device).repeat_interleave(count)
    flat_clusters, flat_slots = clusters.flatten(), slots.flatten()
    _, pair = (rows * (len(offsets) - 1) + flat_clusters).unique(return_inverse=True)
    leader = _leaders(pair, flat_slots, parameters.bias)
    led = two_level_log_prob(
        hidden.index_select(0, rows[leader]),
        parameters,
        flat_clusters[leader],
        flat_slots[leader],
        offsets,
        with_head=False,
        sparse=sparse,
    )
    inside = led.index_select(0, pair)
    leads = flat_slots[leader][pair]
    others = (leads != flat_slots).nonzero().squeeze(1)
    if len(others):
        gap = _differences(hidden, parameters, rows[others], flat_slots[others], leads[others], sparse)
        inside = inside.index_add(0, others, gap)
    return total + inside.view(num_rows, count)


def _leaders(pair: Tensor, slots: Tensor, bias: Tensor | None) -> Tensor:  # (num_pairs,)
    """Where in the list of candidates each pair has the one with the largest bias."""
    by_bias = torch.arange(len(pair), device=pair.device)
    if bias is not None:
        by_bias = bias.detach()[slots].argsort(descending=True, stable=True)
    sorted_pairs, order = pair[by_bias].sort(stable=True)
    first = torch.ones_like(sorted_pairs, dtype=torch.bool)
    first[1:] = sorted_pairs[1:] != sorted_pairs[:-1]
    return by_bias[order[first]]


def _differences(
    hidden: Tensor,  # (N, d)
    parameters: TwoLevel,
    rows: Tensor,  # (P,)
    slots: Tensor,  # (P,)
    leads: Tensor,  # (P,)
    sparse: bool,
) -> Tensor:  # (P,)
    """`logit(slot) - logit(lead)` of each row, without the rounding error of a large common logit."""
    own, lead = (as_exact(_rows(parameters.weight, places, sparse)) for places in (slots, leads))
    gap = (as_exact(hidden.index_select(0, rows)) * (own - lead)).sum(1)
    if parameters.bias is not None:
        own, lead = (as_exact(_rows(parameters.bias, places, sparse)) for places in (slots, leads))
        gap = gap + (own - lead)
    return gap


def _rows(table: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """`table.index_select(0, rows)`, whose gradient may hold the selected rows alone, each once."""
    if not sparse or not ordinary(table, rows):
        return table.index_select(0, rows)
    return _Rows.run(table, rows)


class _Rows(HandWritten):
    @staticmethod
    def forward(table: Tensor, rows: Tensor) -> Tensor:
        return table.index_select(0, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        table, rows = ctx.saved_tensors

        def form() -> tuple[Tensor]:
            touched, place = rows.unique(return_inverse=True)
            values = upstream[0].new_zeros(len(touched), *table.shape[1:]).index_add_(0, place, upstream[0])
            return (row_sparse(touched, values, len(table)),)

        return *gradients(form, lambda table: table.index_select(0, rows), (table,), upstream), None

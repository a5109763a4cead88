"""Many softmaxes, each over its own rows of one matrix (`csrc/grouped.cpp`), and the grouping of a batch
(`csrc/sorted_rows.cpp`).

The plain twins are `functional/softmaxes.py` and `functional/groups.py`.
"""

import torch
from torch import Tensor

from lastlayer.kernels.engine import Kernel

# table, G, large_work, hidden, weight, bias, slots, residual, log_prob, slope, slope is new, V, d, in float64
_FORWARD = Kernel("grouped_softmax_forward", "pnnpppppppnnnn")
# table, G, large_work, compact, hidden, residual, scale, of_weight, of_bias, R, d, in float64
_BACKWARD = Kernel("grouped_softmax_backward", "pnnnpppppnnn")
# clusters, offsets, N, C, order, table, totals
_GROUP = Kernel("group_by_cluster", "ppnnppp")
_TOUCHED = Kernel("touched_rows", "pnp")  # table, G, rows
_GATHER = Kernel("gather_rows", "pppnn")  # rows, order, out, N, bytes of a row
_SCALED = Kernel("scaled_rows", "ppppnnn")  # rows, order, scale, out, N, d, in float64
_ADD = Kernel("add_rows", "ppppnnnn")  # sums, places, factors, rows, N, K, d, in float64


def softmax_forward(
    table: Tensor,  # (G, 4) int64: first row of the batch, count, first weight row, size of each group
    large_work: int,  # multiply-adds from which threads share a group, not the groups
    hidden: Tensor,  # (N, d) float32 or float64, sorted by group
    weight: Tensor,  # (V, d), of the same dtype, as all that follow
    bias: Tensor | None,  # (V,)
    slots: Tensor,  # (N,) int64, the weight row of each target
    residual: Tensor,  # flat; becomes softmax - one_hot(target), group after group
    log_prob: Tensor,  # (N,); gains the target's log-probability in its group
    slope: Tensor | None,  # (N, d); gains residual @ weight
    *,
    slope_is_new: bool,  # and becomes it
) -> None:
    """For every group `log_softmax(hidden @ weight.T + bias)` at the targets, and what its gradient needs."""
    _FORWARD(
        table, table.shape[0], large_work, hidden, weight, bias, slots, residual, log_prob, slope,
        slope_is_new, *weight.shape, hidden.dtype == torch.float64,
    )  # fmt: skip


def softmax_backward(
    table: Tensor,  # (G, 4) int64
    large_work: int,
    hidden: Tensor,  # (N, d), sorted by group
    residual: Tensor,  # flat, from the forward pass
    scale: Tensor,  # (N,)
    of_weight: Tensor,  # (R, d); rows of the groups become (scale * residual).T @ hidden
    of_bias: Tensor,  # (R,); likewise the sums over the batch
    *,
    compact: bool,  # whether of_weight and of_bias hold the rows of the groups only, one group after the other
) -> None:
    """The gradients of weight and bias, every row written once."""
    _BACKWARD(
        table, table.shape[0], large_work, compact, hidden, residual, scale, of_weight, of_bias,
        *of_weight.shape, hidden.dtype == torch.float64,
    )  # fmt: skip


def group_by_cluster(
    clusters: Tensor,  # (N,) int64, the cluster of each row
    offsets: Tensor,  # (C + 1,) int64: cluster c holds the weight rows from offsets[c] up to offsets[c + 1]
) -> tuple[Tensor, Tensor, list[int]]:  # (N,), (G, 4)
    """The rows of a batch sorted by cluster; the table of the clusters that occur.

    And the sums of their count * size and of their sizes.
    """
    clusters, offsets = clusters.contiguous(), offsets.contiguous()
    num_rows, num_clusters = clusters.shape[0], offsets.shape[0] - 1
    order, table, totals = torch.empty_like(clusters), clusters.new_empty(num_rows, 4), clusters.new_empty(2)
    num_groups = _GROUP(clusters, offsets, num_rows, num_clusters, order, table, totals)
    return order, table[:num_groups], totals.tolist()


def touched_rows(table: Tensor, num_touched: int) -> Tensor:  # (R,)
    """The weight rows of the groups of a table, whose sizes sum to `num_touched`."""
    rows = table.new_empty(num_touched)
    _TOUCHED(table, table.shape[0], rows)
    return rows


def gather_rows(
    rows: Tensor,  # (N, d)
    order: Tensor,  # (N,) int64
) -> Tensor:  # (N, d)
    """`rows[order]`."""
    gathered = torch.empty_like(rows)
    _GATHER(rows, order, gathered, rows.shape[0], rows.shape[1] * rows.element_size())
    return gathered


def scaled_rows(
    rows: Tensor,  # (N, d) float32 or float64
    scale: Tensor,  # (N,), of the same dtype
    order: Tensor | None = None,  # (N,) int64, a permutation
) -> Tensor:  # (N, d)
    """Row `order[n]` of the result, or row n without an order, is `scale[n] * rows[n]`."""
    scaled = torch.empty_like(rows)
    _SCALED(rows, order, scale, scaled, *rows.shape, rows.dtype == torch.float64)
    return scaled


def add_rows(
    sums: Tensor,  # (R, d) float32 or float64; gains the rows
    places: Tensor,  # (N, K) int64, where each goes
    factors: Tensor | None,  # (N, K), of the same dtype, as is all that follows; None: ones
    rows: Tensor,  # (N, d)
) -> None:
    """`sums[places[n, c]] += factors[n, c] * rows[n]`, as `index_add_` does in some thirty times the time."""
    _ADD(sums, places, factors, rows, *places.shape, rows.shape[1], sums.dtype == torch.float64)

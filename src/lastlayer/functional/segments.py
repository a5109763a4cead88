"""Largest logits and sums of exponentials of all clusters of neighbouring columns at once."""

import torch
from torch import Tensor


def row_clusters(offsets: Tensor, num_classes: int) -> Tensor:  # (C + 1,) to (V,)
    """The cluster of each row; their number is not in the offsets of a layer on "meta"."""
    sizes = offsets.diff()
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=num_classes)


def cluster_sums(
    logits: Tensor,  # (N, V)
    offsets: Tensor,  # (C + 1,): cluster c holds the columns from offsets[c] up to offsets[c + 1]
) -> tuple[Tensor, Tensor]:  # (N, C) each
    """The largest logit of every cluster, without a gradient, and the log of its sum of `exp(logit - largest)`.

    Separate, as their sum, the log-sum-exp, would lose what is small beside a large common logit. Of a cluster of
    -inf alone they are 0 and -inf, and it has no gradient.
    """
    clusters = row_clusters(offsets, logits.shape[1])
    columns = clusters.expand_as(logits)
    nothing = logits.new_full((logits.shape[0], len(offsets) - 1), -torch.inf)
    peak = nothing.scatter_reduce(1, columns, logits.detach(), "amax")
    peak = peak.masked_fill(peak == -torch.inf, 0)  # -inf - -inf would be NaN
    shifted = logits - peak.index_select(1, clusters)
    sums = torch.zeros_like(peak).scatter_add(1, columns, shifted.exp_())
    empty = sums == 0
    return peak, sums.masked_fill(empty, 1).log().masked_fill(empty, -torch.inf)

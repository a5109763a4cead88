"""Largest logits and sums of exponentials of all clusters of neighbouring columns at once."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.ordinary import ordinary

# A table of padded clusters is used where it has at most so many times as many places as there are classes.
MOST_PADDING = 4
# Logits that are padded at once, so that the copy stays in cache.
BLOCK_NUMBERS = 1 << 19


def padded_columns(offsets: Tensor) -> Tensor | None:  # (C + 1,) to (C, S) int32
    """The columns of each cluster, V as padding; None where sizes differ too much, or are on "meta"."""
    if offsets.is_meta:
        return None
    sizes = offsets.diff()
    num_classes, largest = int(offsets[-1]), int(sizes.max())
    if largest * len(sizes) > MOST_PADDING * num_classes:
        return None
    columns = offsets[:-1, None] + torch.arange(largest, device=offsets.device)
    return columns.masked_fill(columns >= offsets[1:, None], num_classes).int()


def row_clusters(offsets: Tensor, num_classes: int) -> Tensor:  # (C + 1,) to (V,)
    """The cluster of each row; their number is not in the offsets of a layer on "meta"."""
    sizes = offsets.diff()
    return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes, output_size=num_classes)


def cluster_sums(
    logits: Tensor,  # (N, V)
    offsets: Tensor,  # (C + 1,): cluster c holds the columns from offsets[c] up to offsets[c + 1]
    columns: Tensor | None,  # (C, S), of `padded_columns`
) -> tuple[Tensor, Tensor]:  # (N, C) each
    """The largest logit of every cluster, without a gradient, and the log of its sum of `exp(logit - largest)`.

    Separate, as their sum, the log-sum-exp, would lose what is small beside a large common logit. Of a cluster of
    -inf alone they are 0 and -inf.
    """
    if columns is None:
        return _by_scattering(logits, row_clusters(offsets, logits.shape[1]), len(offsets) - 1)
    blocks = logits.split(max(1, BLOCK_NUMBERS // columns.numel())) if ordinary(logits) else (logits,)
    found = [_by_padding(rows, columns) for rows in blocks]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def _by_padding(logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(logits, (0, 1), value=-torch.inf).index_select(1, columns.flatten()).unflatten(1, columns.shape)
    peak = _finite(padded.detach().amax(2))
    # In place: fresh memory costs more than the sums.
    return peak, _log(padded.sub_(peak[:, :, None]).exp_().sum(2))


def _by_scattering(logits: Tensor, clusters: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    nothing = logits.new_full((len(logits), num_clusters), -torch.inf)
    peak = _finite(nothing.scatter_reduce(1, clusters.expand_as(logits), logits.detach(), "amax"))
    shifted = logits - peak.index_select(1, clusters)
    return peak, _log(torch.zeros_like(peak).index_add(1, clusters, shifted.exp()))


def _finite(peak: Tensor) -> Tensor:
    """What to subtract: 0 where a cluster has no mass, as -inf - -inf is NaN."""
    return peak.masked_fill(peak == -torch.inf, 0)


def _log(sums: Tensor) -> Tensor:
    """`log(sums)`, where a sum of 0 is of a cluster without mass and has no gradient."""
    empty = sums == 0
    return sums.masked_fill(empty, 1).log().masked_fill(empty, -torch.inf)

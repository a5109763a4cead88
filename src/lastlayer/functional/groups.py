"""The rows of a batch sorted by cluster."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Targets(NamedTuple):
    """The classes of a batch in a layer of two levels, and what the gradients of its second level are to be."""

    clusters: Tensor  # (N,), the cluster of each
    slots: Tensor  # (N,), the row of each in the weight
    offsets: Tensor  # (C + 1,): cluster c holds the weight rows from offsets[c] up to offsets[c + 1]
    sparse: bool  # of the touched clusters' rows only


class Groups(NamedTuple):
    """The rows of a batch sorted by cluster; the arrays have one entry for each cluster that occurs."""

    order: Tensor  # (N,), the row at each sorted place
    rows: NDArray[np.int64]  # where each cluster's rows begin among the sorted
    counts: NDArray[np.int64]  # how many rows each cluster has
    starts: NDArray[np.int64]  # where each cluster begins in the weight
    sizes: NDArray[np.int64]  # how many classes it has

    def each(self) -> Iterator[tuple[Tensor, int, int]]:
        """For each cluster: the batch's rows that are in it, where it begins in the weight, and its size."""
        return zip(self.order.split(self.counts.tolist()), self.starts.tolist(), self.sizes.tolist(), strict=True)


def group_by_cluster(
    clusters: Tensor,  # (N,), the cluster of each row
    offsets: Tensor,  # (C + 1,): cluster c holds the weight rows from offsets[c] up to offsets[c + 1]
) -> Groups:
    """The rows of a batch by cluster. On a GPU this waits for the device."""
    ordered, order = clusters.sort(stable=True)
    ids, edges = ordered.cpu().numpy(), offsets.cpu().numpy()
    bounds = np.empty(len(ids) + 1, dtype=bool)  # whether a group begins there, or the batch ends
    bounds[0] = bounds[-1] = True
    np.not_equal(ids[1:], ids[:-1], out=bounds[1:-1])
    bounds = bounds.nonzero()[0]
    rows = bounds[:-1]
    touched = ids[rows]
    starts = edges[touched]
    return Groups(order, rows, bounds[1:] - rows, starts, edges[touched + 1] - starts)


def whole_batch(
    rows: Tensor,  # (N, d)
    num_classes: int,
) -> Groups:
    """One group: all rows over all classes; none where there are no rows."""
    order = torch.arange(len(rows), device=rows.device)
    zero, counts, classes = (np.full(min(len(rows), 1), n) for n in (0, len(rows), num_classes))
    return Groups(order, zero, counts, zero, classes)


def touched_rows(groups: Groups) -> Tensor:
    """The weight rows of the touched clusters, rising, `(R,)`."""
    before = groups.sizes.cumsum() - groups.sizes
    shift = np.repeat(groups.starts - before, groups.sizes)
    return torch.from_numpy(np.arange(len(shift)) + shift).to(groups.order.device)

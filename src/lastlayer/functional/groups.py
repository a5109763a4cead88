"""The rows of a batch sorted by cluster."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.row_sparse import GradientMemory
from lastlayer.kernels import grouped as kernels
from lastlayer.kernels.backends import grouped_softmax_backend_for


class Targets(NamedTuple):
    """The classes of a batch in a layer of two levels, and what the gradients of its second level are to be."""

    clusters: Tensor  # (N,), the cluster of each
    slots: Tensor  # (N,), the row of each in the weight
    offsets: Tensor  # (C + 1,): cluster c holds the weight rows from offsets[c] up to offsets[c + 1]
    sparse: bool  # of the touched clusters' rows only
    memory: GradientMemory | None  # for the sparse gradient of the weight


class Groups(NamedTuple):
    """The rows of a batch sorted by cluster."""

    order: Tensor  # (N,), the row at each sorted place
    # (G, 4) int64 on the CPU, of each cluster that occurs: its first row among the sorted, how many rows it has,
    # where it begins in the weight, and how many classes it has.
    table: Tensor
    num_logits: int  # the sum of counts * sizes
    num_touched: int  # the sum of sizes

    def sorted(
        self,
        rows: Tensor,  # (N, d)
    ) -> Tensor:  # (N, d)
        """The rows in this order."""
        if not _by_kernel(rows):
            return rows.index_select(0, self.order)
        return kernels.gather_rows(rows.contiguous().resolve_neg(), self.order)

    def unsorted(
        self,
        rows: Tensor,  # (N, d), sorted
        scale: Tensor,  # (N,), sorted
    ) -> Tensor:  # (N, d)
        """The rows times their scale, in the batch's own order."""
        if not _by_kernel(rows) or scale.dtype != rows.dtype:
            return torch.empty_like(rows).index_copy_(0, self.order, (rows * scale[:, None]).to(rows.dtype))
        return kernels.scaled_rows(rows, scale, self.order)

    def each(self) -> Iterator[tuple[Tensor, int, int]]:
        """For each cluster: the batch's rows that are in it, where it begins in the weight, and its size."""
        _, counts, starts, sizes = self.table.T.tolist()
        return zip(self.order.split(counts), starts, sizes, strict=True)


def group_by_cluster(
    clusters: Tensor,  # (N,), the cluster of each row
    offsets: Tensor,  # (C + 1,): cluster c holds the weight rows from offsets[c] up to offsets[c + 1]
) -> Groups:
    """The rows of a batch by cluster. On a GPU this waits for the device."""
    if grouped_softmax_backend_for(clusters.device, torch.float32, torch.float32) == "compiled":
        order, table, totals = kernels.group_by_cluster(clusters, offsets)
        return Groups(order, table, *totals)
    ordered, order = clusters.sort(stable=True)
    touched, counts = ordered.unique_consecutive(return_counts=True)
    starts = offsets[touched]
    sizes = offsets[touched + 1] - starts
    table = torch.stack([counts.cumsum(0) - counts, counts, starts, sizes], 1).cpu()
    return Groups(order, table, int((table[:, 1] * table[:, 3]).sum()), int(table[:, 3].sum()))


def whole_batch(
    rows: Tensor,  # (N, d)
    num_classes: int,
) -> Groups:
    """One group: all rows over all classes; none where there are no rows. Its order is not formed."""
    num_rows = rows.shape[0]
    group = [[0, num_rows, 0, num_classes]] if num_rows else []
    table = torch.tensor(group, dtype=torch.int64, device="cpu").view(-1, 4)
    return Groups(rows.new_empty(0), table, num_rows * num_classes, num_classes)


def touched_rows(groups: Groups) -> Tensor:
    """The weight rows of the touched clusters, rising, `(R,)`."""
    device = groups.order.device
    if grouped_softmax_backend_for(device, torch.float32, torch.float32) == "compiled":
        return kernels.touched_rows(groups.table, groups.num_touched)
    starts, sizes = groups.table[:, 2], groups.table[:, 3]
    shift = (starts - (sizes.cumsum(0) - sizes)).repeat_interleave(sizes)
    return (torch.arange(len(shift), device="cpu") + shift).to(device)


def _by_kernel(rows: Tensor) -> bool:
    return grouped_softmax_backend_for(rows.device, rows.dtype, rows.dtype) == "compiled"

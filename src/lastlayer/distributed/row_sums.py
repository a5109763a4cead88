"""Sums over processes of tensors that are sparse in their rows."""

import torch
import torch.distributed as dist
from torch import Tensor

from lastlayer.functional.row_sparse import row_sparse


def sum_rows(
    part: Tensor,  # (V, ...), sparse and coalesced
    most: int,  # rows that the process with most of them has
    group: dist.ProcessGroup,
) -> Tensor:  # (V, ...), sparse and coalesced
    """The sum of all processes' parts: each sends its rows and their ids, padded to the most that one has."""
    count = part.indices().shape[1]
    ids = part.indices().new_full((most,), -1)
    values = part.values().new_zeros(most, *part.shape[1:])
    ids[:count], values[:count] = part.indices()[0], part.values()
    all_ids, all_values = (torch.cat(gather_alike(own, group)) for own in (ids, values))
    used = all_ids >= 0
    touched, places = all_ids[used].unique(return_inverse=True)
    total = values.new_zeros(len(touched), *part.shape[1:])
    return row_sparse(touched, total.index_add_(0, places, all_values[used]), len(part))


def quotient(tensor: Tensor, divisor: int) -> Tensor:
    """`tensor / divisor`; a coalesced sparse tensor stays coalesced."""
    if not tensor.is_sparse:
        return tensor / divisor
    return row_sparse(tensor.indices()[0], tensor.values() / divisor, len(tensor))


def gather_alike(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The tensors of all processes, all of one shape."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    if tensor.numel():
        dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts

"""Sampling from two-level models: of the many clusters only those are opened that are drawn."""

from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.groups import group_by_cluster
from lastlayer.functional.sampling import sample_classes

# (rows of the batch (n,), first weight row of the cluster, its size) to log-probabilities within it, (n, size)
OpenCluster = Callable[[Tensor, int, int], Tensor]


def sample_two_level(
    head: Tensor,  # (N, C), log-probabilities of the clusters
    offsets: Tensor,  # (C + 1,)
    open_cluster: OpenCluster,
    num_samples: int,
) -> Tensor:  # (N, num_samples), slots
    """A cluster for each sample, then a class within it; every (row, cluster) pair is opened once."""
    num_rows = len(head)
    if not num_rows:
        return offsets.new_empty(0, num_samples)
    clusters = sample_classes(head, num_samples)
    of_draw = torch.arange(num_rows, device=clusters.device).repeat_interleave(num_samples)
    pairs, draws = (clusters.reshape(-1) * num_rows + of_draw).sort(stable=True)
    pairs, counts = pairs.unique_consecutive(return_counts=True)
    groups = group_by_cluster(pairs // num_rows, offsets)
    slots = torch.empty_like(draws)
    place = 0
    for own, start, size in groups.each():
        wanted = counts[own]
        most, total = int(wanted.max()), int(wanted.sum())
        drawn = sample_classes(open_cluster(pairs[own] % num_rows, start, size), most)
        used = torch.arange(most, device=drawn.device) < wanted[:, None]
        slots[draws[place : place + total]] = drawn[used] + start
        place += total
    return slots.reshape(num_rows, num_samples)

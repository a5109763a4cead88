"""Searching and sampling two-level models: of the many clusters only those are opened that matter."""

from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.groups import group_by_cluster
from lastlayer.functional.sampling import sample_classes

# (rows of the batch (n,), first weight row of the cluster, its size) to log-probabilities within it, (n, size)
OpenCluster = Callable[[Tensor, int, int], Tensor]


def best_first_topk(
    head: Tensor,  # (N, C), log-probabilities of the clusters
    offsets: Tensor,  # (C + 1,)
    open_cluster: OpenCluster,
    k: int,
) -> tuple[Tensor, Tensor]:  # log-probabilities and slots, both (N, k), best first
    """The k most probable classes, exactly: no class is more probable than its cluster.

    Each row opens its clusters by falling probability and stops when the next is no more probable than its k-th
    best class so far. Rows go together, one matrix product a cluster; the number that a row opens at a time
    doubles.
    """
    bounds, clusters = head.sort(dim=1, descending=True)
    opened_sizes = offsets.diff()[clusters].cumsum(1)
    best = head.new_full((len(head), k), -torch.inf)
    slots = offsets.new_zeros(len(head), k)
    active = torch.arange(len(head), device=head.device)
    place, width = 0, 1
    while len(active) and place < head.shape[1]:
        window = slice(place, place + width)
        few = opened_sizes[active, place - 1] < k if place else torch.ones_like(active, dtype=torch.bool)
        open_now = (bounds[active, window] > best[active, -1:]) | few[:, None]
        at, column = open_now.nonzero(as_tuple=True)
        active_bounds, active_clusters = bounds[active, window], clusters[active, window]
        found, found_slots = _open(
            active[at], active_clusters[at, column], active_bounds[at, column], offsets, k, open_cluster
        )
        rank = open_now.cumsum(1)[at, column] - 1  # of the pair among those of its row
        shape = (len(active), open_now.shape[1], found.shape[1])
        values = best.new_full(shape, -torch.inf).index_put((at, rank), found).flatten(1)
        ids = slots.new_zeros(shape).index_put((at, rank), found_slots).flatten(1)
        merged = torch.cat([best[active], values], 1).topk(k)
        best[active] = merged.values
        slots[active] = torch.cat([slots[active], ids], 1).gather(1, merged.indices)
        active = active[open_now.any(1)]
        place, width = place + width, 2 * width
    return best, slots


def _open(
    rows: Tensor,  # (P,), the row of each pair
    clusters: Tensor,  # (P,)
    bounds: Tensor,  # (P,), the cluster's log-probability
    offsets: Tensor,
    k: int,
    open_cluster: OpenCluster,
) -> tuple[Tensor, Tensor]:  # both (P, at most k)
    """The best classes of each (row, cluster) pair, -inf where a cluster has fewer."""
    groups = group_by_cluster(clusters, offsets)
    width = min(k, int(groups.sizes.max(initial=1)))
    values = bounds.new_full((len(rows), width), -torch.inf)
    slots = rows.new_zeros(len(rows), width)
    for pairs, start, size in groups.each():
        own = open_cluster(rows[pairs], start, size) + bounds[pairs, None]
        found = own.topk(min(k, size))
        values[pairs, : found.values.shape[1]] = found.values
        slots[pairs, : found.values.shape[1]] = found.indices + start
    return values, slots


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

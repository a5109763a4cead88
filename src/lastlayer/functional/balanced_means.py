"""k-means whose clusters hold no more than a given number of vectors, and none no vector."""

import torch
from torch import Tensor

NEAREST = 8  # nearest centres that a vector is tried at before it is put into any cluster with free capacity
CHUNK_NUMBERS = 1 << 24


def balanced_means(
    vectors: Tensor,  # (V, d)
    num_clusters: int,
    max_size: int,
    iterations: int,
    seed: int,
) -> Tensor:  # (V,), cluster ids
    """Lloyd's iterations with bounded sizes: where a cluster overflows, its nearest vectors stay, others move."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.randperm(len(vectors), generator=generator, device="cpu")
    centres = vectors[order[:num_clusters]].clone()
    ids = torch.zeros_like(order)
    for _ in range(iterations):
        ids = _fill_empty(_assign(vectors, centres, max_size), num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, ids, vectors)
        centres = sums / torch.bincount(ids, minlength=num_clusters)[:, None]
    return ids


def _assign(vectors: Tensor, centres: Tensor, max_size: int) -> Tensor:
    """Each vector to the nearest centre with free capacity: first choices first, and of those the nearest."""
    choices = min(NEAREST, len(centres))
    half_squares = centres.square().sum(1) / 2
    parts = [
        (half_squares - rows @ centres.T).topk(choices, largest=False)
        for rows in vectors.split(max(1, CHUNK_NUMBERS // len(centres)))
    ]
    distance, nearest = torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
    distance += vectors.square().sum(1, keepdim=True) / 2
    ids = torch.full_like(nearest[:, 0], -1)
    capacity = torch.full_like(ids[: len(centres)], max_size)
    for choice in range(choices):
        waiting = (ids < 0).nonzero()[:, 0]
        wanted = nearest[waiting, choice]
        order = distance[waiting, choice].argsort()
        order = order[wanted[order].argsort(stable=True)]  # by centre, then by distance
        counts = torch.bincount(wanted, minlength=len(centres))
        place = torch.arange(len(order), device="cpu") - (counts.cumsum(0) - counts)[wanted[order]]
        taken = order[place < capacity[wanted[order]]]
        ids[waiting[taken]] = wanted[taken]
        capacity = capacity - torch.bincount(wanted[taken], minlength=len(centres))
    left = (ids < 0).nonzero()[:, 0]
    ids[left] = torch.arange(len(centres), device="cpu").repeat_interleave(capacity)[: len(left)]
    return ids


def _fill_empty(ids: Tensor, num_clusters: int) -> Tensor:
    """Gives each empty cluster one vector of a cluster that has several."""
    sizes = torch.bincount(ids, minlength=num_clusters)
    empty = (sizes == 0).nonzero()[:, 0]
    if len(empty):
        order = ids.argsort(stable=True)
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[order[(sizes.cumsum(0) - sizes)[sizes > 0]]] = True  # one of each stays
        ids[(~first).nonzero()[: len(empty), 0]] = empty
    return ids

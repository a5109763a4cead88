"""Which classes share a cluster: assignments for the layers that decide in two steps, as `(V,)` cluster ids."""

import math

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count, check_positive

# Clusters per sqrt(V). A target costs the scores of all clusters and of its own cluster's classes, least at 1; but
# the scores of all clusters are one large matrix product, and those inside are many small ones that read fresh
# rows.
CLUSTERS_PER_ROOT = 3.0
# Times the mean size that a cluster by frequency holds at most: else all classes that never occur would share one.
LARGEST_CLUSTER = 8
NEAREST = 8  # nearest centres that a vector is tried at before it is put into any cluster with free capacity
CHUNK_NUMBERS = 1 << 24  # distances that are held at once


def default_num_clusters(num_classes: int) -> int:
    """The number of clusters with which a training step costs least: about `3 sqrt(V)`."""
    return min(num_classes, max(1, round(CLUSTERS_PER_ROOT * math.sqrt(num_classes))))


def even(
    num_classes: int,
    num_clusters: int | None = None,
) -> Tensor:  # (V,), cluster ids
    """Neighbouring ids together, sizes that differ by one at most.

    Args:
        num_classes: V.
        num_clusters: from 1 to V; none: `default_num_clusters(V)`.

    Raises:
        ValueError: a number of clusters below 1 or above V.

    Example:
        >>> even(7, 3).tolist()
        [0, 0, 0, 1, 1, 2, 2]
    """
    num_classes, num_clusters = _sizes(num_classes, num_clusters)
    return torch.arange(num_classes, device="cpu").mul_(num_clusters).div_(num_classes, rounding_mode="floor")


def by_frequency(
    counts: Tensor,  # (V,)
    num_clusters: int | None = None,
    *,
    power: float = 0.5,
) -> Tensor:  # (V,), cluster ids
    r"""Classes by falling count, cut into clusters of equal mass of `counts ** power`.

    Few frequent classes share a cluster, many rare ones do, so a target costs less on average than with even
    clusters: of Zipf counts over 10,000 classes and 100 clusters a target meets 200 scores with even clusters, 140
    with `power=0.5`. `power=1` gives equal mass of the counts themselves, which predicts no better and touches
    more rows a batch; `power=0` even clusters by count. No cluster is empty, and none holds more than 8 times the
    mean, `8 V / num_clusters + 1` classes, whatever the counts: no class weighs less than a seventh of the mean.

    Args:
        counts: how often each class occurs; zeros are allowed.
        num_clusters: from 1 to V; none: `default_num_clusters(V)`.
        power: of the counts; at least 0.

    Raises:
        TypeError: counts that are not a tensor of numbers.
        ValueError: counts that are empty, negative, not finite or not one-dimensional; a number of clusters below
            1 or above V; a negative power.

    Example:
        >>> by_frequency(torch.tensor([1, 100, 25, 4, 1]), 3).tolist()
        [2, 0, 1, 2, 2]
    """
    counts = check_counts(counts)
    num_classes, num_clusters = _sizes(len(counts), num_clusters)
    if not power >= 0:
        raise ValueError(f"power must be at least 0, got {power}")
    order = by_falling_count(counts, num_classes)
    mass = (counts.index_select(0, order) / counts.max().clamp(min=torch.finfo(counts.dtype).tiny)).pow(power)
    if not mass.any():
        mass = torch.ones_like(mass)
    # With f the least mass and m the mean, the total is at most V (m + f), a cluster's (m + f) V / C, and so a
    # cluster's classes at most (m / f + 1) V / C.
    mass.clamp_(min=float(mass.mean()) / (LARGEST_CLUSTER - 1))
    # A class that outweighs the mean of the clusters left has one alone; those share the remaining mass equally.
    rest = mass.flip(0).cumsum(0).flip(0)[:num_clusters]
    left = num_clusters - torch.arange(num_clusters, device=mass.device)
    alone = int((mass[:num_clusters] * left > rest).cumprod(0).sum())
    ids = torch.arange(num_classes, device=order.device)
    if alone < num_clusters:
        shared = mass[alone:]
        middle = shared.cumsum(0) - shared / 2  # a class belongs where the middle of its mass falls
        num_bins = num_clusters - alone
        bins = (middle * (num_bins / shared.sum())).long().clamp_(max=num_bins - 1)
        ids[alone:] = alone + _without_gaps(bins, num_bins)
    return torch.empty_like(order).index_copy_(0, order, ids)


def by_embedding(
    embedding: Tensor,  # (V, d)
    num_clusters: int | None = None,
    *,
    max_size: int | None = None,
    iterations: int = 10,
    seed: int = 0,
) -> Tensor:  # (V,), cluster ids
    """Classes with similar vectors together: k-means on trained vectors, with bounded sizes and no empty cluster.

    A cluster that overflows keeps its nearest vectors; the others take their next choice with free capacity. Costs
    `iterations V C d`.

    Args:
        embedding: a vector for each class, such as a trained layer's weight or an embedding's.
        num_clusters: from 1 to V; none: `default_num_clusters(V)`.
        max_size: classes that a cluster holds at most; none: twice the mean, rounded up.
        iterations: of Lloyd's algorithm, at least 1.
        seed: of the first centres.

    Raises:
        TypeError: an embedding that is not a floating tensor.
        ValueError: an embedding that is empty, not finite or not two-dimensional; a number of clusters below 1 or
            above V; clusters too small to hold all classes.

    Example:
        >>> vectors = torch.tensor([[0.0], [9.0], [0.1], [9.1]])
        >>> ids = by_embedding(vectors, 2)
        >>> bool(ids[0] == ids[2] != ids[1] == ids[3])
        True
    """
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        raise TypeError(f"embedding must be a floating tensor, got {getattr(embedding, 'dtype', type(embedding))}")
    if embedding.dim() != 2 or not embedding.numel():
        raise ValueError(f"embedding must have shape (num_classes, width), got {tuple(embedding.shape)}")
    vectors = embedding.detach().to("cpu", torch.float32)
    if not bool(vectors.isfinite().all()):
        raise ValueError("embedding must be finite")
    num_classes, num_clusters = _sizes(len(vectors), num_clusters)
    mean_size = -(-num_classes // num_clusters)
    max_size = 2 * mean_size if max_size is None else check_count("max_size", max_size, mean_size)
    check_positive("iterations", iterations)
    return _balanced_means(vectors, num_clusters, max_size, iterations, seed)


def by_falling_count(
    counts: Tensor,  # (V,)
    num_classes: int,
) -> Tensor:  # (V,), the class of each rank
    """The classes by falling count, equal counts by id."""
    return check_counts(counts, num_classes).argsort(descending=True, stable=True)


def positive_counts(counts: Tensor) -> Tensor:
    """`counts` with each 0 replaced by the smallest other count; where all are 0, by 1."""
    counts = check_counts(counts)
    seen = counts[counts > 0]
    return counts.clamp(min=float(seen.min())) if len(seen) else torch.ones_like(counts)


def check_counts(counts: Tensor, num_classes: int | None = None) -> Tensor:
    """`counts` as float64 on the CPU, or an error unless they are `(V,)` finite numbers of at least 0."""
    if not isinstance(counts, Tensor):
        raise TypeError(f"counts must be a Tensor with one count a class, got {type(counts).__name__}")
    if counts.is_complex() or counts.dtype == torch.bool:
        raise TypeError(f"counts must be a tensor of numbers, got {counts.dtype}")
    if counts.dim() != 1 or not len(counts) or num_classes not in (None, len(counts)):
        shape = "(num_classes,)" if num_classes is None else f"({num_classes},), one for each class"
        raise ValueError(f"counts must have shape {shape}; got {tuple(counts.shape)}")
    counts = counts.detach().to("cpu", torch.float64)
    if not bool(counts.isfinite().all()) or bool((counts < 0).any()):
        wrong = int((~counts.isfinite() | (counts < 0)).nonzero()[0])
        raise ValueError(f"counts must be finite and at least 0; counts[{wrong}] is {counts[wrong].item()}")
    return counts


def check_clusters(clusters: Tensor, num_classes: int) -> Tensor:
    """`clusters` on the CPU, or an error unless they are `(V,)` ids in which each from 0 to the highest occurs."""
    if not isinstance(clusters, Tensor):
        raise TypeError(f"clusters must be a Tensor of cluster ids, got {type(clusters).__name__}")
    if clusters.dtype != torch.int64:
        raise TypeError(f"clusters must be cluster ids of dtype torch.int64, got {clusters.dtype}")
    if clusters.shape != (num_classes,):
        raise ValueError(
            f"clusters must have one id for each of the {num_classes} classes, shape ({num_classes},); "
            f"got {tuple(clusters.shape)}"
        )
    clusters = clusters.detach().cpu()
    lowest, highest = int(clusters.min()), int(clusters.max())
    if lowest < 0:
        at = int(clusters.argmin())
        raise ValueError(f"clusters must be ids of at least 0; clusters[{at}] is {lowest}")
    if highest >= num_classes:
        raise ValueError(
            f"clusters must be ids below num_classes={num_classes}, none empty; the highest is {highest}"
        )
    sizes = torch.bincount(clusters)
    if not bool(sizes.all()):
        gap = int((sizes == 0).nonzero()[0])
        raise ValueError(
            f"clusters must use every id from 0 to the highest, {highest}; no class is in cluster {gap}. "
            "clusters.unique(return_inverse=True)[1] closes the gaps"
        )
    return clusters


def _sizes(num_classes: int, num_clusters: int | None) -> tuple[int, int]:
    num_classes = check_positive("num_classes", num_classes)
    if num_clusters is None:
        return num_classes, default_num_clusters(num_classes)
    return num_classes, check_count("num_clusters", num_clusters, 1, num_classes)


def _without_gaps(
    bins: Tensor,  # (V,), rising
    num_bins: int,
) -> Tensor:
    """Rising bin ids with as little change as leaves none of `num_bins` empty.

    Place i may hold at most bin i (each bin before it needs a place) and at least bin `num_bins - (V - i)`; within
    these bounds each id may exceed the one before it by one at most.
    """
    place = torch.arange(len(bins), device=bins.device)
    # ids[i] = min over j <= i of bins[j] + (i - j): the largest sequence below `bins` that rises by single steps.
    ids = (bins - place).cummin(0).values + place
    ids = torch.minimum(ids - ids[0], place)
    return torch.maximum(ids, place - (len(bins) - num_bins))


def _balanced_means(
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

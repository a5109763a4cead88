"""Assignments of classes to clusters."""

import pytest
import torch

from lastlayer import clusters


@pytest.mark.parametrize(("num_classes", "num_clusters"), [(1, 1), (7, 3), (7, 7), (100, 9), (100_003, 317)])
def test_even_clusters_are_even_and_in_order(num_classes, num_clusters):
    ids = clusters.even(num_classes, num_clusters)
    sizes = torch.bincount(ids)
    assert ids.shape == (num_classes,)
    assert len(sizes) == num_clusters
    assert sizes.max() - sizes.min() <= 1
    assert (ids.diff() >= 0).all()


def zipf(num_classes):
    return 1e6 / torch.arange(1, num_classes + 1, dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_clusters", [1, 10, 99, 1000])
def test_frequency_clusters_follow_counts_and_none_is_empty(power, num_clusters):
    shuffle = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    counts = zipf(1000)[shuffle]
    ids = clusters.by_frequency(counts, num_clusters, power=power)
    sizes = torch.bincount(ids, minlength=num_clusters)
    assert len(sizes) == num_clusters
    assert sizes.min() >= 1
    by_count = ids[counts.argsort(descending=True)]
    assert (by_count.diff() >= 0).all(), "a rarer class is in an earlier cluster"
    if num_clusters == 10:
        mass = torch.zeros(10, dtype=torch.float64).index_add(0, ids, counts**power)
        largest = (counts**power).max()
        assert (mass - mass.mean()).abs().max() <= largest + 1e-9


def test_root_of_count_costs_least_as_in_the_literature():
    """methods.md 3.4: Zipf, V = 10,000, 100 clusters: 140 scores a target against 200 with even clusters."""
    counts = zipf(10_000)
    share = counts / counts.sum()
    cost = {}
    for name, ids in (("root", clusters.by_frequency(counts, 100)), ("even", clusters.even(10_000, 100))):
        cost[name] = 100 + float((share * torch.bincount(ids)[ids]).sum())
    assert cost["even"] == pytest.approx(200)
    assert cost["root"] < 150


def seen(num_classes, num_seen):
    """Zipf counts of a few classes; the others never occur."""
    counts = zipf(num_classes).floor()
    counts[num_seen:] = 0
    return counts


HOSTILE = {
    "recommender": seen(30_000, 9_950),
    "few seen": seen(30_000, 100),
    "one seen": seen(30_000, 1),
    "none seen": torch.zeros(30_000),
    "one giant": torch.ones(30_000).index_fill_(0, torch.tensor([7]), 1e12),
    "flat": torch.ones(30_000),
    "zipf": zipf(30_000),
    "squared zipf": zipf(30_000) ** 2,
    "geometric": 2.0 ** -torch.arange(1_000, dtype=torch.float64),
    "overflowing": torch.full((1_000,), 1e308, dtype=torch.float64),
}


@pytest.mark.parametrize("counts", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_clusters", [None, 20])
def test_the_work_of_a_target_is_bounded_whatever_the_counts(counts, power, num_clusters):
    """A target costs the scores of all clusters and of its own cluster's classes."""
    ids = clusters.by_frequency(counts, num_clusters, power=power)
    sizes = torch.bincount(ids)
    assert sizes.min() >= 1
    assert sizes.max() <= 8 * len(counts) / len(sizes) + 1
    if num_clusters is None:
        assert sizes.max() <= 3 * len(counts) ** 0.5 + 1
    p = counts.double() / counts.double().max().clamp(min=1e-300)
    p = p / p.sum() if p.any() else torch.full_like(p, 1 / len(p))
    cost = len(sizes) + float((p * sizes[ids]).sum())
    even = len(sizes) + float((p * torch.bincount(clusters.even(len(ids), len(sizes)))[ids]).sum())
    assert cost <= 1.15 * even


@pytest.mark.parametrize("counts", [torch.zeros(6), torch.ones(6), torch.tensor([0, 0, 5, 0, 0, 0])])
def test_degenerate_counts(counts):
    ids = clusters.by_frequency(counts, 3)
    assert torch.bincount(ids, minlength=3).min() >= 1
    if len(counts.unique()) == 1:
        assert torch.bincount(ids).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clusters.even(0), ValueError, "num_classes"),
        (lambda: clusters.even(5, 6), ValueError, "num_clusters must be between 1 and 5"),
        (lambda: clusters.even(5, 0), ValueError, "num_clusters"),
        (lambda: clusters.by_frequency([1, 2]), TypeError, "counts"),
        (lambda: clusters.by_frequency(torch.tensor([])), ValueError, "counts"),
        (lambda: clusters.by_frequency(torch.tensor([1.0, -2.0])), ValueError, r"counts\[1\] is -2"),
        (lambda: clusters.by_frequency(torch.tensor([1.0, torch.nan])), ValueError, r"counts\[1\] is nan"),
        (lambda: clusters.by_frequency(torch.ones(2, 2)), ValueError, "counts"),
        (lambda: clusters.by_frequency(torch.ones(2), power=-1), ValueError, "power"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_similar_vectors_share_a_cluster():
    generator = torch.Generator().manual_seed(0)
    kind = torch.randint(6, (300,), generator=generator)
    vectors = 10 * torch.eye(6)[kind] + 0.1 * torch.randn(300, 6, generator=generator)
    ids = clusters.by_embedding(vectors, 12, max_size=80)
    pure = sum(int(torch.bincount(kind[ids == c]).max()) for c in range(12))
    assert pure >= 0.9 * 300


@pytest.mark.parametrize(
    ("num_classes", "num_clusters", "max_size"), [(50, 7, 8), (50, 50, 1), (50, 1, 50), (9, 4, 3)]
)
@pytest.mark.parametrize("same", [False, True])
def test_embedding_clusters_are_bounded_and_not_empty(num_classes, num_clusters, max_size, same):
    vectors = torch.ones(num_classes, 3) if same else torch.randn(num_classes, 3)
    sizes = torch.bincount(clusters.by_embedding(vectors, num_clusters, max_size=max_size), minlength=num_clusters)
    assert len(sizes) == num_clusters
    assert 1 <= sizes.min() <= sizes.max() <= max_size


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: clusters.by_embedding(torch.ones(4, dtype=torch.int64)), TypeError, "embedding"),
        (lambda: clusters.by_embedding(torch.ones(4)), ValueError, "embedding"),
        (lambda: clusters.by_embedding(torch.full((4, 2), torch.inf)), ValueError, "finite"),
        (lambda: clusters.by_embedding(torch.ones(4, 2), 2, max_size=1), ValueError, "max_size"),
    ],
)
def test_bad_embeddings_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()

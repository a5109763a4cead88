"""Draws have the model's frequencies at any number of classes: chi-squared, where float32 sums would fail."""

import pytest
import torch

from lastlayer import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    Int8Preview,
    MixtureOfSoftmaxes,
    ScreenedSoftmax,
)
from lastlayer.functional import sampling
from lastlayer.functional.sampling import sample_classes, uniform_doubles

BINS, DRAWS = 60, 20_000


def assert_frequencies(ids, probabilities):
    """Chi-squared of the draws `(S,)` within five standard deviations of its mean."""
    counts = torch.bincount(ids, minlength=len(probabilities))
    expected = len(ids) * probabilities.double()
    chi2 = ((counts - expected).square() / expected).sum()
    freedom = len(expected) - 1
    assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5, f"chi-squared {chi2:.1f} at {freedom} degrees of freedom"


def assert_follows(layer, hidden):
    """Samples of one row against the layer's own log-probabilities, in BINS bins of neighbouring classes."""
    torch.manual_seed(0)
    (ids,) = layer.sample(hidden, DRAWS)
    (log_prob,) = layer.log_prob(hidden)
    size = -(-len(log_prob) // BINS)
    shares = torch.stack([part.double().exp().sum() for part in log_prob.split(size)])
    assert ids.min() >= 0
    assert ids.max() < len(log_prob)
    assert_frequencies(ids // size, shares / shares.sum())


def steps(num_classes):
    """A weight `(V, 1)` of three heights: within one, float32 sums all round in the same direction."""
    return torch.nn.Parameter((torch.arange(num_classes) * 3 // num_classes)[:, None] * 0.35)


def full(num_classes):
    layer = FullSoftmax(1, num_classes, bias=False)
    layer.weight = steps(num_classes)
    return layer


def mixture(num_classes):
    layer = MixtureOfSoftmaxes(1, num_classes, 2, bias=False)
    layer.weight = steps(num_classes)
    return layer


def one_cluster(num_classes):
    clusters = torch.zeros(num_classes, dtype=torch.int64)
    layer = HierarchicalSoftmax(1, num_classes, clusters=clusters, bias=False)
    layer.weight = steps(num_classes)
    return layer


def one_tail(num_classes):
    layer = AdaptiveSoftmax(1, num_classes, [1000], div_value=1.0)
    project, classes = layer.tail[0]
    torch.nn.init.ones_(project.weight)
    layer.head.weight.data[-1] = 5.0  # nearly all draws are from the tail
    classes.weight = steps(num_classes - 1000)
    return layer


LARGE = {
    "full-2^23": lambda: full(1 << 23),
    "full-2^24+1": lambda: full((1 << 24) + 1),
    "mixture": lambda: mixture(1 << 23),
    "hierarchical": lambda: one_cluster(1 << 23),
    "adaptive": lambda: one_tail(1 << 23),
}


@pytest.mark.parametrize("name", LARGE)
def test_very_many_classes(name):
    torch.manual_seed(0)
    assert_follows(LARGE[name](), torch.tensor([[2.0]]))


@pytest.mark.parametrize("make", [full, mixture])
def test_screens_draw_by_the_same_function(make):
    """A screen of so many classes takes long to prepare: its draws are those of its log-probabilities."""
    screen = ScreenedSoftmax.from_layer(make(600), preview=Int8Preview(), candidates=20)
    hidden = torch.tensor([[2.0], [-1.0]])
    torch.manual_seed(3)
    ids = screen.sample(hidden, 50)
    torch.manual_seed(3)
    assert torch.equal(ids, sample_classes(screen.log_prob(hidden), 50))


@pytest.mark.parametrize("block", [1, 7, 24, 1 << 20])
def test_every_block_size_draws_the_same(monkeypatch, block):
    """Blocks of classes are a matter of memory only; rows of different peaks, a class that is barred."""
    logits = torch.randn(3, 23, dtype=torch.float64) + torch.tensor([[0.0], [500.0], [-500.0]])
    logits[:, 5] = -torch.inf
    torch.manual_seed(1)
    whole = sample_classes(logits, 2000)
    monkeypatch.setattr(sampling, "BLOCK_NUMBERS", block)
    torch.manual_seed(1)
    assert torch.equal(sample_classes(logits, 2000), whole)
    possible = torch.arange(23) != 5
    for row, own in zip(whole, logits, strict=True):
        assert not (row == 5).any()
        assert_frequencies(row - (row > 5).long(), own.softmax(0)[possible])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_first_and_last_place_never_draw_an_impossible_class(monkeypatch, dtype):
    logits = torch.full((2, 9), -torch.inf, dtype=dtype)
    logits[0, 4], logits[1, 2:4] = 1.0, -3.0
    for uniform in (0.0, 0.5, 1 - 2.0**-53):
        monkeypatch.setattr(
            sampling, "uniform_doubles", lambda shape, *_, u=uniform: torch.full(shape, u, dtype=torch.float64)
        )
        for block in (2, 1 << 20):
            monkeypatch.setattr(sampling, "BLOCK_NUMBERS", block)
            ids = sample_classes(logits, 2)
            assert ids[0].tolist() == [4, 4]
            assert ids[1].tolist() == ([2, 2] if uniform == 0 else [3, 3])


def test_no_rows_and_bad_rows():
    assert sample_classes(torch.empty(0, 5), 3).shape == (0, 3)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="hidden must give finite logits"):
            sample_classes(torch.full((2, 5), wrong), 3)


def test_a_generator_of_ones_own():
    logits = torch.randn(2, 50)
    one, other = (sample_classes(logits, 9, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)


def test_logits_stay_as_they_are():
    logits = torch.randn(2, 50, dtype=torch.float64)
    before = logits.clone()
    sample_classes(logits, 9)
    assert torch.equal(logits, before)


def test_uniform_doubles_are_pytorchs():
    found, expected = [], torch.Generator().manual_seed(0)
    for generator in (torch.Generator().manual_seed(0), None):
        torch.manual_seed(0)
        found.append(uniform_doubles((3, 5), torch.device("cpu"), generator))
    assert torch.equal(found[0], torch.rand(3, 5, dtype=torch.float64, generator=expected))
    assert torch.equal(*found)

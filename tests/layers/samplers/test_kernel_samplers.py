"""QuadraticKernel and RandomFourier: draws follow the stated distribution, which is the kernel's."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from lastlayer import Mixed, QuadraticKernel, RandomFourier, Uniform

D = 4


def quadratic(hidden, weight, bias=None):
    """alpha * logit ** 2 + 1, normalised."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    kernel = 100 * logits.square() + 1
    return kernel / kernel.sum(-1, keepdim=True)


def layer_of(num_classes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_classes, D, generator=generator, dtype=torch.float64)
    bias = torch.randn(num_classes, generator=generator, dtype=torch.float64)
    hidden = torch.randn(3, D, generator=generator, dtype=torch.float64)
    return weight.to(dtype), bias.to(dtype), hidden.to(dtype)


def all_log_probs(sampler, hidden):
    return sampler.log_prob(torch.arange(sampler.num_classes).expand(len(hidden), -1), hidden)


@pytest.mark.parametrize("num_classes", [1, 2, 7, 16, 17, 100])
@pytest.mark.parametrize("leaf_size", [1, 5, 16])
def test_leaf_probabilities_are_the_kernel(num_classes, leaf_size):
    weight, bias, hidden = layer_of(num_classes)
    sampler = QuadraticKernel(num_classes, D, leaf_size=leaf_size, centred=False)
    for own_bias in (None, bias):
        sampler.update(weight, own_bias)
        found = all_log_probs(sampler, hidden).exp()
        assert torch.allclose(found, quadratic(hidden, weight, own_bias), rtol=1e-10, atol=0)


@pytest.mark.parametrize("leaf_size", [3, 16])
def test_centred_logits_are_those_a_softmax_cannot_tell_apart(leaf_size):
    weight, bias, hidden = layer_of(50)
    sampler = QuadraticKernel(50, D, leaf_size=leaf_size)
    sampler.update(weight, bias)
    expected = quadratic(hidden, weight - weight.mean(0), bias - bias.mean())
    assert torch.allclose(all_log_probs(sampler, hidden).exp(), expected, rtol=1e-10)
    assert_draws(sampler, hidden)
    sampler.update(weight + 1, bias + 7)
    assert torch.allclose(all_log_probs(sampler, hidden).exp(), expected, rtol=1e-10)


def test_a_centre_that_moved_is_found_after_enough_updates():
    weight, bias, hidden = layer_of(64)
    sampler = QuadraticKernel(64, D, leaf_size=4)
    sampler.update(weight, bias)
    weight += 3
    for start in range(0, 80, 16):
        sampler.update(weight, bias, torch.arange(start, start + 16) % 64)
    expected = quadratic(hidden, weight - weight.mean(0), bias - bias.mean())
    assert torch.allclose(all_log_probs(sampler, hidden).exp(), expected, rtol=1e-10)


def test_many_walks_and_few_nodes_are_the_same_masses():
    """Gathered for each walk, or multiplied for all nodes of a level."""
    weight, bias, hidden = layer_of(300)
    sampler = QuadraticKernel(300, D, leaf_size=2, centred=False)
    sampler.update(weight, bias)
    ids = torch.arange(299, 0, -37).expand(3, -1)
    one_by_one = torch.cat([sampler.log_prob(ids[:, i : i + 1], hidden) for i in range(ids.shape[1])], 1)
    assert torch.allclose(one_by_one, sampler.log_prob(ids, hidden), rtol=1e-12)
    assert torch.allclose(one_by_one, all_log_probs(sampler, hidden).gather(1, ids), rtol=1e-12)


def test_sums_do_not_drift_under_updates():
    weight, bias, hidden = layer_of(60)
    sampler = QuadraticKernel(60, D, leaf_size=4, centred=False)
    sampler.update(weight, bias)
    generator = torch.Generator().manual_seed(2)
    for _ in range(1000):
        ids = torch.randint(60, (3,), generator=generator)
        weight[ids] += torch.randn(3, D, generator=generator, dtype=torch.float64)
        bias[ids] -= 0.1
        sampler.update(weight, bias, ids)
    assert torch.allclose(all_log_probs(sampler, hidden).exp(), quadratic(hidden, weight, bias), rtol=1e-10)


def test_stale_sums_are_still_what_is_drawn_from():
    """A weight that moved without a word: probabilities are of the walk, and sum to one."""
    weight, bias, hidden = layer_of(40)
    sampler = QuadraticKernel(40, D, leaf_size=4, centred=False)
    sampler.update(weight, bias)
    weight.mul_(-1.5).add_(0.3)
    found = all_log_probs(sampler, hidden).exp()
    assert torch.allclose(found.sum(1), torch.ones(3).double())
    assert not torch.allclose(found, quadratic(hidden, weight, bias), rtol=1e-2)
    assert_draws(sampler, hidden)


def assert_draws(sampler, hidden, draws=60_000):
    """Chi-squared of each row's draws within five standard deviations, and the counts that they come with."""
    torch.manual_seed(0)
    prob = all_log_probs(sampler, hidden).double().exp()
    ids, log_counts = sampler.sample(draws, hidden)
    assert torch.allclose(log_counts.double(), (draws * prob).log().gather(1, ids), atol=1e-4)
    for row, own in zip(ids, prob, strict=True):
        expected = draws * own
        found = torch.bincount(row, minlength=len(own))
        common = expected >= 5
        chi2 = ((found - expected)[common].square() / expected[common]).sum()
        freedom = max(int(common.sum()) - 1, 1)
        assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_follow_the_kernel(dtype):
    weight, bias, hidden = layer_of(100, dtype)
    sampler = QuadraticKernel(100, D, leaf_size=8, centred=False)
    sampler.update(weight, bias)
    assert torch.allclose(all_log_probs(sampler, hidden).exp(), quadratic(hidden, weight, bias), rtol=1e-3)
    assert_draws(sampler, hidden)


def random_fourier(sampler, hidden, weight):
    """The clamped tree of feature sums, one class at a time, from the definition."""
    t, size = sampler.temperature, sampler.leaf_size

    def phi(u):
        angles = F.normalize(u, dim=-1) @ sampler.frequencies.to(u.dtype)
        return torch.cat([angles.cos(), angles.sin()], -1) / sampler.frequencies.shape[1] ** 0.5

    def mass(h, first, last):
        classes = weight[first:last]
        return torch.clamp((phi(classes) @ phi(h)).sum(), min=len(classes) * math.exp(-2 * t))

    def of(h, i):
        prob, first, last = 1.0, 0, size * sampler.num_leaves
        while last - first > size:
            middle = (first + last) // 2
            left, right = mass(h, first, middle), mass(h, middle, last)
            prob *= float((left if i < middle else right) / (left + right))
            first, last = (first, middle) if i < middle else (middle, last)
        cosines = F.cosine_similarity(weight[first:last], h, dim=-1)
        return prob * float((t * cosines).softmax(0)[i - first])

    return torch.tensor([[of(h, i) for i in range(len(weight))] for h in hidden], dtype=torch.float64)


@pytest.mark.parametrize("frequencies", [8, 512])
def test_random_fourier_is_its_clamped_tree(frequencies):
    torch.manual_seed(3)
    weight, _, hidden = layer_of(50)
    sampler = RandomFourier(50, D, temperature=3.0, num_frequencies=frequencies, leaf_size=4)
    sampler.update(weight)
    found = all_log_probs(sampler, hidden).exp()
    assert torch.allclose(found, random_fourier(sampler, hidden, weight), rtol=1e-9)
    assert torch.allclose(found.sum(1), torch.ones(3).double())
    assert_draws(sampler, hidden)
    softmax = (3 * F.normalize(hidden, dim=1) @ F.normalize(weight, dim=1).T).softmax(1)
    if frequencies == 512:
        assert float((found - softmax).abs().sum(1).max()) < 0.3


@pytest.mark.parametrize("make", [QuadraticKernel, RandomFourier])
def test_a_barred_class_is_never_drawn(make):
    weight, bias, hidden = layer_of(20)
    bias[[0, 7, 19]] = -math.inf
    sampler = make(20, D, leaf_size=3)
    sampler.update(weight, bias)
    found = all_log_probs(sampler, hidden)
    assert bool((found[:, [0, 7, 19]] == -math.inf).all())
    assert torch.allclose(found.exp().sum(1), torch.ones(3).double())
    assert not set(sampler.sample(2000, hidden).ids.unique().tolist()) & {0, 7, 19}


def test_shapes_copies_and_a_mixture():
    weight, bias, hidden = layer_of(30)
    sampler = QuadraticKernel(30, D, centred=False)
    sampler.update(weight, bias)
    assert sampler.sample(5, hidden[:, None].expand(3, 2, D)).ids.shape == (3, 2, 5)
    assert sampler.sample(5, hidden[:0]).ids.shape == (0, 5)
    assert sampler.log_prob(torch.zeros(0, 2, dtype=torch.int64), hidden[:0]).shape == (0, 2)
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        with pytest.raises(RuntimeError, match="call update"):
            twin.sample(3, hidden)
        twin.update(weight, bias)
        assert torch.equal(all_log_probs(twin, hidden), all_log_probs(sampler, hidden))
    mixed = Mixed(sampler, Uniform(30), 0.5)
    mixed.update(weight, bias)
    ids, log_counts = mixed.sample(10, hidden)
    expected = 5 * quadratic(hidden, weight, bias).gather(1, ids) + 5 / 30
    assert torch.allclose(log_counts.double().exp(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "hidden must be given", lambda s: s.sample(3)),
        (ValueError, r"hidden must have shape \(..., 4\)", lambda s: s.sample(3, torch.zeros(2, 3))),
        (ValueError, "num_samples must be", lambda s: s.sample(0, torch.zeros(2, D))),
        (ValueError, r"weight must have shape \(9, 4\)", lambda s: s.update(torch.zeros(8, D))),
        (ValueError, "alpha", lambda s: QuadraticKernel(9, D, alpha=-1.0)),
        (ValueError, "leaf_size", lambda s: QuadraticKernel(9, D, leaf_size=0)),
        (ValueError, "temperature", lambda s: RandomFourier(9, D, temperature=0.0)),
        (ValueError, "num_frequencies", lambda s: RandomFourier(9, D, num_frequencies=0)),
    ],
)
def test_bad_input_is_refused(error, message, call):
    sampler = QuadraticKernel(9, D)
    sampler.update(torch.ones(9, D))
    with pytest.raises(error, match=message):
        call(sampler)

"""The limits of the losses: the full softmax's gradient, or a minimum at the truth."""

import itertools

import pytest
import torch
from given_sampler import Given, distribution
from torch.nn import functional as F

from lastlayer import LogUniform, Mixed, NegativeSampling, NoiseContrastive, SampledSoftmax, Uniform, Unigram

V, D = 40, 3
COUNTS = 1 / torch.arange(1.0, V + 1)
SAMPLERS = {
    "uniform": lambda **options: Uniform(V, **options),
    "log-uniform": lambda **options: LogUniform(V, **options),
    "unigram": lambda **options: Unigram(COUNTS, **options),
    "mixed": lambda **options: Mixed(Uniform(V, **options), LogUniform(V, **options), 0.5),
}


REPEATS = 20
HIDDEN = torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1, 2, 9, 30])


def make_layer(sampler, num_samples, correction):
    torch.manual_seed(0)
    return SampledSoftmax(
        D, V, sampler, num_samples, correction=correction, bias=False, dtype=torch.float64, sparse=True
    )


def exact_gradient(layer):
    residual = ((HIDDEN @ layer.weight.T).softmax(1) - F.one_hot(TARGETS, V)) / 5
    return torch.cat([(residual @ layer.weight).flatten(), (residual.T @ HIDDEN).flatten()]).detach()


def mean_gradient(layer):
    """The mean over 400 samples, 20 at once as each row has a set of its own, and its standard error."""
    drawn = []
    for _ in range(20):
        layer.zero_grad()
        leaf = HIDDEN.repeat(REPEATS, 1).requires_grad_()
        layer(leaf, TARGETS.repeat(REPEATS)).backward()
        of_hidden = leaf.grad.view(REPEATS, 5, D).sum(0)
        drawn.append(torch.cat([of_hidden.flatten(), layer.weight.grad.to_dense().flatten()]))
    drawn = torch.stack(drawn)
    return drawn.mean(0), float(drawn.std(0).norm()) / 20**0.5


@pytest.mark.parametrize("correction", ["all", "negatives"])
@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_mean_gradient_tends_to_the_exact_one(name, replacement, correction):
    """The bias falls with the samples, below its standard error and a small share of the gradient."""
    sizes = (4, 256) if replacement else (4, 36)
    if name == "mixed" and not replacement:
        sizes = (8, 76)  # each part draws half of them
    biases = []
    for num_samples in sizes:
        sampler = SAMPLERS[name](replacement=replacement, shared=False)
        layer = make_layer(sampler, num_samples, correction)
        exact = exact_gradient(layer)
        mean, error = mean_gradient(layer)
        biases.append(float((mean - exact).norm()))
    assert biases[1] < 0.5 * biases[0]
    assert biases[1] < 0.005 * float(exact.norm()) + 3 * error


def test_without_correction_it_does_not():
    """The same test tells a wrong loss: the uncorrected one stays far from the exact gradient."""
    layer = make_layer(Unigram(COUNTS, shared=False), 256, "none")
    exact = exact_gradient(layer)
    mean, _ = mean_gradient(layer)
    assert float((mean - exact).norm()) > 0.2 * float(exact.norm())


def all_sets(num_classes, num_samples):
    return torch.tensor(list(itertools.product(range(num_classes), repeat=num_samples)))


@pytest.mark.parametrize("num_samples", [1, 2, 4])
def test_negatives_corrected_estimates_the_sum_without_bias(num_samples):
    """E[sum of exponentials] over all possible sets is that over all classes."""
    prob = distribution(3)
    logits = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target, mean = 1, 0.0
    for ids in all_sets(3, num_samples):
        layer = SampledSoftmax(1, 3, Given(ids, prob), num_samples, correction="negatives", dtype=torch.float64)
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.copy_(logits)
            loss = layer(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([target]))
        mean += prob[ids].prod() * (loss + logits[target]).exp()
    assert torch.allclose(mean, logits.exp().sum(), rtol=1e-12)


def expected_gradient(make, truth, bias):
    """The mean gradient of the bias over all targets and all possible sets of two."""
    prob, total = distribution(3), torch.zeros(3, dtype=torch.float64)
    for ids in all_sets(3, 2):
        for target in range(3):
            layer = make(1, 3, Given(ids, prob), 2, dtype=torch.float64)
            with torch.no_grad():
                layer.weight.zero_()
                layer.bias.copy_(bias)
            layer(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([target])).backward()
            total += truth[target] * prob[ids].prod() * layer.bias.grad
    return total


def ranking(*args, **options):
    return SampledSoftmax(*args, remove_hits=False, **options)


def negatives_with_hits(*args, **options):
    return NegativeSampling(*args, remove_hits=False, **options)


def test_minima_are_at_the_truth():
    truth, prob = distribution(3, seed=8), distribution(3)
    zero = torch.zeros(3, dtype=torch.float64)
    for make, bias in (
        (ranking, truth.log() + 0.7),
        (NoiseContrastive, truth.log()),
        (negatives_with_hits, truth.log() - (2 * prob).log()),
    ):
        assert torch.allclose(expected_gradient(make, truth, bias), zero, atol=1e-12)
        moved = bias + torch.tensor([0.1, 0, 0], dtype=torch.float64)
        assert float(expected_gradient(make, truth, moved).abs().max()) > 1e-3

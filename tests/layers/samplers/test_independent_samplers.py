"""Uniform, LogUniform and Unigram: draws against stated expected counts, with and without replacement."""

import copy
import math
import pickle

import pytest
import torch

from lastlayer import LogUniform, Mixed, Uniform, Unigram
from lastlayer.layers.samplers.unigram import alias_table

V = 50
COUNTS = torch.arange(V, dtype=torch.float64).square().flip(0) + 1
SHUFFLE = torch.randperm(V, generator=torch.Generator().manual_seed(1))


def zipf(ranks):
    """P(k) = ln((k + 2) / (k + 1)) / ln(V + 1)."""
    return ((ranks + 2) / (ranks + 1)).log() / math.log(V + 1)


MADE = {
    "uniform": (lambda **options: Uniform(V, **options), torch.full((V,), 1 / V, dtype=torch.float64)),
    "log-uniform": (lambda **options: LogUniform(V, **options), zipf(torch.arange(V).double())),
    "log-uniform of counts": (
        lambda **options: LogUniform(V, counts=COUNTS[SHUFFLE], **options),
        zipf(SHUFFLE.double()),
    ),
    "unigram": (lambda **options: Unigram(COUNTS, **options), COUNTS / COUNTS.sum()),
    "unigram to a power": (
        lambda **options: Unigram(COUNTS, power=0.4, **options),
        COUNTS.pow(0.4) / COUNTS.pow(0.4).sum(),
    ),
}
SAMPLERS = pytest.mark.parametrize("name", MADE)


def assert_drawn_from(ids, prob):
    """Chi-squared within five standard deviations of its mean."""
    expected = prob.double() * ids.numel()
    found = torch.bincount(ids.reshape(-1), minlength=len(prob)).double()
    common = expected >= 5
    chi2 = ((found - expected)[common].square() / expected[common]).sum()
    freedom = int(common.sum()) - 1
    assert chi2 <= freedom + 5 * (2 * freedom) ** 0.5, f"chi-squared {chi2:.1f} at {freedom} degrees of freedom"
    rare = expected[~common].sum()
    assert abs(found[~common].sum() - rare) <= 5 * rare.sqrt() + 5


@SAMPLERS
def test_draws_follow_the_stated_distribution(name):
    make, prob = MADE[name]
    torch.manual_seed(0)
    sampler = make()
    ids, log_counts = sampler.sample(1_000_000)
    assert_drawn_from(ids, prob)
    assert torch.allclose(sampler.log_prob(torch.arange(V)).double().exp(), prob, rtol=1e-6)
    assert torch.allclose(log_counts.double(), (1_000_000 * prob)[ids].log(), atol=1e-5)
    assert float(sampler.log_prob(torch.arange(V)).double().exp().sum()) == pytest.approx(1, abs=1e-6)


@SAMPLERS
def test_seeds_reproduce(name):
    sampler = MADE[name][0]()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(sampler.sample(20).ids)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], sampler.sample(20).ids)


@SAMPLERS
@pytest.mark.parametrize("num_samples", [3, 20, V - 1, V])
def test_without_replacement_each_class_comes_once_as_often_as_expected(name, num_samples):
    make, _ = MADE[name]
    torch.manual_seed(0)
    sampler = make(replacement=False, shared=False)
    sets = 4000
    ids, log_counts = sampler.sample(num_samples, torch.zeros(sets, 1))
    assert ids.shape == log_counts.shape == (sets, num_samples)
    assert all(len(set(row)) == num_samples for row in ids[:100].tolist())
    everything = torch.arange(V)
    expected = sampler.log_expected_counts(everything, num_samples).double().exp()
    assert float(expected.sum()) == pytest.approx(num_samples, rel=1e-6)
    found = torch.bincount(ids.reshape(-1), minlength=V) / sets
    # Sampling error, and 0.022 for the approximation of inclusion probabilities.
    assert float((found - expected).abs().max()) < 0.022 + 4 * (0.25 / sets) ** 0.5
    assert torch.equal(sampler.log_inclusion(everything, num_samples).double().exp(), expected)


def test_uniform_inclusion_is_exact():
    assert torch.allclose(
        Uniform(V, replacement=False).log_expected_counts(torch.arange(V), 7).exp(), torch.full((V,), 7 / V)
    )


def test_inclusion_with_replacement():
    sampler = Unigram(COUNTS)
    prob = COUNTS / COUNTS.sum()
    expected = 1 - (1 - prob) ** 9
    assert torch.allclose(sampler.log_inclusion(torch.arange(V), 9).double().exp(), expected, rtol=1e-5)


@SAMPLERS
def test_one_set_a_row(name):
    make, prob = MADE[name]
    torch.manual_seed(0)
    ids, log_counts = make(shared=False).sample(2000, torch.zeros(5, 20, 3))
    assert ids.shape == log_counts.shape == (5, 20, 2000)
    assert_drawn_from(ids, prob)
    with pytest.raises(ValueError, match="hidden must be given"):
        make(shared=False).sample(3)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 1000])
@pytest.mark.parametrize("kind", ["random", "skewed", "equal", "zeros", "one"])
def test_alias_table_is_the_distribution(num_classes, kind):
    generator = torch.Generator().manual_seed(num_classes)
    noise = torch.rand(num_classes, generator=generator, dtype=torch.float64)
    prob = {
        "random": noise,
        "skewed": noise**20 + 1e-12,
        "equal": torch.ones_like(noise),
        "zeros": torch.where(noise < 0.5, 0, noise) + (noise == noise.max()),
        "one": (noise == noise.max()).double(),
    }[kind]
    prob = prob / prob.sum()
    threshold, alias = alias_table(prob)
    mass = threshold.clone().index_add_(0, alias, 1 - threshold) / num_classes
    assert torch.allclose(mass, prob, rtol=1e-9, atol=1e-13)
    assert bool(((threshold >= 0) & (threshold <= 1)).all())


def test_a_class_of_count_0_is_never_drawn():
    torch.manual_seed(0)
    sampler = Unigram(torch.tensor([0.0, 3.0, 0.0, 5.0]))
    assert set(sampler.sample(10_000).ids.tolist()) == {1, 3}
    assert sampler.log_expected_counts(torch.tensor([0, 1]), 8).tolist() == pytest.approx([-math.inf, math.log(3)])
    distinct = Unigram(torch.tensor([0.0, 3.0, 0.0, 5.0]), replacement=False)
    assert sorted(distinct.sample(2).ids.tolist()) == [1, 3]
    assert distinct.log_expected_counts(torch.arange(4), 2).tolist() == [-math.inf, 0, -math.inf, 0]
    with pytest.raises(ValueError, match="at most the 2 classes of positive probability"):
        distinct.sample(3)


def test_a_million_classes_are_told_apart():
    """Neighbours among the last of many classes differ by less than float32 can say."""
    torch.manual_seed(0)
    many = 1_000_000
    ids = LogUniform(many).sample(4_000_000).ids
    last = ids[ids >= many - 100_000]
    expected = 4_000_000 * math.log((many + 1) / (many - 99_999)) / math.log(many + 1)
    assert abs(len(last) - expected) < 5 * expected**0.5
    odd = int((last % 2).sum())
    assert abs(odd - len(last) / 2) < 5 * (len(last) / 4) ** 0.5
    assert len(last.unique()) > 0.25 * len(last)


def test_mixed_draws_from_both():
    torch.manual_seed(0)
    prob = MADE["unigram"][1]
    sampler = Mixed(Uniform(V), Unigram(COUNTS), 0.3)
    ids, log_counts = sampler.sample(1_000_000)
    assert_drawn_from(ids, 0.3 / V + 0.7 * prob)
    expected = 300_000 / V + 700_000 * prob
    assert torch.allclose(log_counts.double(), expected[ids].log(), atol=1e-5)
    assert torch.allclose(sampler.log_prob(torch.arange(V)).double().exp(), 0.3 / V + 0.7 * prob, rtol=1e-5)
    inclusion = 1 - (1 - 1 / V) ** 3 * (1 - prob) ** 7
    assert torch.allclose(sampler.log_inclusion(torch.arange(V), 10).double().exp(), inclusion, rtol=1e-5)


def test_mixed_of_a_shared_set_and_one_a_row():
    ids, log_counts = Mixed(Uniform(V, shared=False), LogUniform(V), 0.5).sample(6, torch.zeros(4, 2))
    assert ids.shape == log_counts.shape == (4, 6)
    assert len({tuple(row) for row in ids[:, 3:].tolist()}) == 1


def test_tables_keep_their_precision():
    for make, _ in MADE.values():
        sampler = make()
        expected = sampler.log_prob(torch.arange(V))
        assert torch.equal(sampler.to(torch.bfloat16).log_prob(torch.arange(V)), expected)
        for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
            assert torch.equal(twin.log_prob(torch.arange(V)), expected)


def test_log_uniform_tells_when_ids_are_not_sorted():
    torch.manual_seed(0)
    many = 1000
    sorted_ids = LogUniform(many).sample(5000).ids
    shuffle = torch.randperm(many)
    LogUniform(many).observe(sorted_ids)
    with pytest.warns(UserWarning, match="pass counts="):
        LogUniform(many).observe(shuffle[sorted_ids])
    counts = torch.bincount(shuffle[sorted_ids], minlength=many)
    LogUniform(many, counts=counts).observe(shuffle[sorted_ids])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "num_classes must be at least 1, got 0", lambda: Uniform(0)),
        (ValueError, "num_samples must be at least 1, got 0", lambda: Uniform(3).sample(0)),
        (TypeError, "num_samples must be a whole number", lambda: Uniform(3).sample(1.5)),
        (ValueError, "at most num_classes=3 without", lambda: Uniform(3, replacement=False).sample(4)),
        (ValueError, r"counts\[1\] is -1", lambda: Unigram(torch.tensor([1.0, -1.0]))),
        (ValueError, r"counts\[0\] is nan", lambda: Unigram(torch.tensor([math.nan, 1.0]))),
        (ValueError, r"counts\[1\] is inf", lambda: Unigram(torch.tensor([1.0, math.inf]))),
        (ValueError, r"counts\[0\] is -2", lambda: LogUniform(2, counts=torch.tensor([-2, 1]))),
        (ValueError, "positive count", lambda: Unigram(torch.zeros(3))),
        (ValueError, "overflows", lambda: Unigram(torch.full((2,), 1e308, dtype=torch.float64))),
        (ValueError, "overflows", lambda: Unigram(torch.tensor([1e300, 2.0], dtype=torch.float64), power=2.0)),
        (ValueError, "power must be", lambda: Unigram(torch.ones(3), power=-1.0)),
        (TypeError, "counts must be", lambda: Unigram([1, 2])),
        (ValueError, r"counts must have shape \(3,\)", lambda: LogUniform(3, counts=torch.ones(2))),
        (TypeError, "first must be a Sampler", lambda: Mixed(3, Uniform(3))),
        (ValueError, "same classes", lambda: Mixed(Uniform(3), Uniform(4))),
        (ValueError, "share must be", lambda: Mixed(Uniform(3), Uniform(3), 1.0)),
        (ValueError, "num_samples must be at least 2", lambda: Mixed(Uniform(3), Uniform(3)).sample(1)),
    ],
)
def test_bad_input_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()

"""Every other layer over 1, 2 and 3 ranks equals the layer of one process."""

import copy

import pytest
import torch
from same_answers import batch, check_calls, check_equal, check_indices, gradients, make_sharded, queries

from lastlayer import (
    PLIF,
    AdaptiveSoftmax,
    HierarchicalSoftmax,
    LogUniform,
    MixtureOfSoftmaxes,
    OneVsAll,
    QuadraticKernel,
    SampledSoftmax,
    Uniform,
)
from lastlayer.distributed import shard
from lastlayer.testing.cases import spread_parameters

COUNTS = torch.tensor([3.0, 0, 9, 1, 5, 5, 2, 8, 0, 7, 4, 6, 1])
CLUSTERS = torch.tensor([2, 0, 1, 1, 0, 1, 3, 1, 1, 0, 1, 3, 1])
WEIGHTS = torch.linspace(0.2, 2.0, 13, dtype=torch.float64)

MAKES = {
    "adaptive": lambda **kwargs: AdaptiveSoftmax(6, 13, [4, 9], div_value=2.0, **kwargs),
    "adaptive with counts": lambda **kwargs: AdaptiveSoftmax(
        6, 13, [3, 8], div_value=2.0, head_bias=True, counts=COUNTS, **kwargs
    ),
    "adaptive of small parts": lambda **kwargs: AdaptiveSoftmax(6, 4, [1, 2], div_value=2.0, **kwargs),
    "hierarchical": lambda **kwargs: HierarchicalSoftmax(5, 23, **kwargs),
    "hierarchical, ragged": lambda **kwargs: HierarchicalSoftmax(5, 13, clusters=CLUSTERS, **kwargs),
    "hierarchical, one cluster": lambda **kwargs: HierarchicalSoftmax(
        5, 9, clusters=torch.zeros(9, dtype=torch.int64), bias=False, **kwargs
    ),
    "hierarchical, one class": lambda **kwargs: HierarchicalSoftmax(5, 1, **kwargs),
    "mixture": lambda **kwargs: MixtureOfSoftmaxes(5, 13, 3, latent_features=4, **kwargs),
    "mixture with a map": lambda **kwargs: MixtureOfSoftmaxes(
        5, 4, 2, logit_map=PLIF(6, 2.0, init_std=1.0), context_prior=False, **kwargs
    ),
}
SLOW_QUERIES = {
    "adaptive",
    "hierarchical, ragged",
    "hierarchical",
    "mixture with a map",
    "hierarchical, one class",
}


def likelihoods_are_equal(group, name):
    for reduction in ("mean", "sum", "none"):
        torch.manual_seed(1)
        layer = MAKES[name](reduction=reduction, dtype=torch.float64)
        spread_parameters(layer)
        sharded = make_sharded(layer, group)
        for rows in (7, 0):
            hidden, targets = batch(layer, rows)
            some = targets.clone()
            some[::2] = -100
            every = {"some": some}
            if reduction == "mean" and rows:
                every |= {"targets": targets, "on one rank": targets * 0, "ignored": targets * 0 - 100}
            calls = {kind: lambda layer, h, ids=ids: layer(h, ids) for kind, ids in every.items()}
            check_calls(layer, sharded, hidden, targets, calls, f"{name}, {rows} rows, {reduction}")
    if name in SLOW_QUERIES:
        for rows in (7, 0):
            hidden, targets = batch(layer, rows)
            check_calls(layer, sharded, hidden, targets, queries(layer, hidden, targets), name)


@pytest.mark.parametrize("name", MAKES)
def test_likelihoods(pool, name):
    pool.run(likelihoods_are_equal, 3, name)


@pytest.mark.parametrize("name", ["adaptive with counts", "hierarchical, ragged", "mixture with a map"])
def test_fewer_ranks_likelihoods(pool, name):
    for ranks in (1, 2):
        pool.run(likelihoods_are_equal, ranks, name)


def classes_are_barred(group, name):
    """All classes of a rank, of a cluster, and some of a cluster that two ranks share."""
    for barred in ([0, 1, 2, 3, 4], [2, 3, 5, 7, 8, 10], [12]):
        torch.manual_seed(1)
        layer = MAKES[name](dtype=torch.float64)
        spread_parameters(layer)
        with torch.no_grad():
            layer.bias[torch.tensor(barred)] = -torch.inf
        hidden, _ = batch(layer, 8)
        targets = layer.log_prob(hidden).topk(3).indices[:, 1]
        calls = {"loss": lambda layer, h, ids=targets: layer(h, ids), **queries(layer, hidden, targets)}
        check_calls(layer, make_sharded(layer, group), hidden, targets, calls, f"{name}, {barred} barred")


def test_barred_classes(pool):
    for ranks, name in ((2, "hierarchical, ragged"), (3, "hierarchical, ragged"), (3, "mixture")):
        pool.run(classes_are_barred, ranks, name)


def draws_follow_the_model(group, name):
    layer = MAKES[name](dtype=torch.float64)
    spread_parameters(layer)
    sharded = make_sharded(layer, group)
    hidden, _ = batch(layer, 2)
    draws = sharded.sample(hidden, 20_000)
    for row, log_prob in zip(draws, layer.log_prob(hidden), strict=True):
        share = torch.bincount(row, minlength=layer.num_classes) / 20_000
        assert (share - log_prob.exp()).abs().max() < 5 * (0.25 / 20_000) ** 0.5


def test_draws(pool):
    for name in ("adaptive with counts", "hierarchical, ragged", "mixture"):
        pool.run(draws_follow_the_model, 3, name)


def second_derivatives(group, name):
    layer = MAKES[name](dtype=torch.float64)
    spread_parameters(layer)
    hidden, targets = batch(layer, 4)

    def twice(layer, h):
        (slope,) = torch.autograd.grad(layer(h, targets), h, create_graph=True)
        return slope.square()

    check_calls(layer, make_sharded(layer, group), hidden, targets, {"second derivatives": twice}, name)


def test_second_derivatives(pool):
    for name in ("adaptive", "hierarchical, ragged", "mixture with a map"):
        pool.run(second_derivatives, 3, name)


# Losses of their own.


def one_vs_all_is_equal(group, sampled, V):
    several = torch.tensor([[0, 2, -100], [V - 1, 0, 0], [-100, -100, -100], [1, 2, 3]]) % V
    several[2] = -100
    several[0, 2] = -100
    for reduction in ("mean", "none"):
        torch.manual_seed(1)
        options = {"sampler": Uniform(V), "num_samples": 4} if sampled else {"positive_weight": WEIGHTS[:V]}
        layer = OneVsAll(5, V, reduction=reduction, dtype=torch.float64, **options)
        spread_parameters(layer)
        sharded = make_sharded(layer, group)
        for rows in (4, 0):
            hidden, _ = batch(layer, rows)

            def loss(layer, h, targets=several[:rows]):
                torch.manual_seed(0)
                return layer(h, targets)

            calls = {
                "loss": loss,
                "scores": lambda layer, h: layer.scores(h),
                "score": lambda layer, h: layer.score(h, several[: len(h)]),
                "topk": lambda layer, h: layer.topk(h, 2, exclude=several[: len(h)]).scores,
            }
            check_calls(layer, sharded, hidden, None, calls, f"one against all, V={V}, {rows} rows, {reduction}")
    for call in (sharded.log_prob, sharded.sample):
        with pytest.raises(TypeError, match="scores"):
            call(hidden)


def test_one_vs_all(pool):
    for ranks in (1, 3):
        pool.run(one_vs_all_is_equal, ranks, False, 11)
        pool.run(one_vs_all_is_equal, ranks, True, 11)
    pool.run(one_vs_all_is_equal, 3, False, 4)
    pool.run(one_vs_all_is_equal, 3, True, 4)


SAMPLED = {
    "all": {},
    "negatives": {"correction": "negatives", "class_weights": WEIGHTS},
    "none": {"correction": "none"},
    "hits": {"remove_hits": False},
    "weights": {"class_weights": WEIGHTS},
}


def sampled_is_equal(group, option, shared):
    V = 13
    several = torch.tensor([[0, 2, -100], [12, 0, 0], [-100, -100, -100], [1, 2, 3]])
    for reduction in ("mean", "none"):
        torch.manual_seed(1)
        sampler = LogUniform(V, replacement=False) if shared else Uniform(V, shared=False)
        layer = SampledSoftmax(5, V, sampler, 6, reduction=reduction, dtype=torch.float64, **SAMPLED[option])
        spread_parameters(layer)
        sharded = make_sharded(layer, group)
        for targets in (several, several[:, 0], several[:0], torch.full((3,), -100)):
            hidden, _ = batch(layer, len(targets))

            def loss(layer, h, targets=targets):
                torch.manual_seed(0)
                return layer(h, targets)

            check_calls(layer, sharded, hidden, None, {"loss": loss}, f"sampled, {option}, {reduction}")
    if option == "weights":
        hidden, targets = batch(layer, 5)
        check_calls(layer, sharded, hidden, targets, queries(layer, hidden, targets), "sampled")
        check_indices(layer, sharded, hidden, "sampled")


def test_sampled_softmax(pool):
    pool.run(sampled_is_equal, 1, "weights", True)
    for option in SAMPLED:
        pool.run(sampled_is_equal, 3, option, True)
    pool.run(sampled_is_equal, 3, "all", False)


def dropout_is_the_same(group):
    """With equal generators, which go on as in one process, and with others, which go on as they were."""
    layer = MixtureOfSoftmaxes(5, 13, 3, dropout=0.5, dtype=torch.float64)
    sharded = make_sharded(layer, group)
    hidden, targets = batch(layer, 6)
    torch.manual_seed(7)
    expected, after = gradients(layer, hidden, lambda layer, h: layer(h, targets)), torch.rand(3)
    for others in (0, 1):
        torch.manual_seed(7 + others * group.rank())
        found = gradients(sharded, hidden, lambda layer, h: layer(h, targets))
        for name, value in expected.items():
            check_equal(found[name], value, name)
        drawn = torch.rand(3)
        if others and group.rank():
            torch.manual_seed(7 + group.rank())
            assert torch.equal(drawn, torch.rand(3))
        else:
            assert torch.equal(drawn, after)


def test_dropout(pool):
    pool.run(dropout_is_the_same, 3)


def some_are_refused(group):
    for make, message in [
        (lambda: SampledSoftmax(5, 13, QuadraticKernel(13, 5), 3), "does not follow the weight"),
        (lambda: AdaptiveSoftmax(6, 13, [4], weight=torch.nn.Embedding(13, 6).weight), "tied"),
    ]:
        torch.manual_seed(1)
        layer = make()
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=message):
            shard(layer, group)
        assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_what_cannot_be_sharded(pool):
    pool.run(some_are_refused, 2)

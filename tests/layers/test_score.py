"""Log-probabilities of given candidates: sparse gradients, bounded work, large common logits."""

import pytest
import torch

from lastlayer import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    MixtureOfSoftmaxes,
    TreeSoftmax,
    clusters,
)
from lastlayer.layers import adaptive

V, WIDTH = 3000, 8
ZIPF = 1e6 / torch.arange(1, V + 1)
LAYERS = {
    "full": lambda **options: FullSoftmax(WIDTH, V),
    "mixture": lambda **options: MixtureOfSoftmaxes(WIDTH, V, 3, latent_features=5),
    "even": lambda **options: HierarchicalSoftmax(WIDTH, V, **options),
    "by_frequency": lambda **options: HierarchicalSoftmax(
        WIDTH, V, clusters=clusters.by_frequency(ZIPF, 30), **options
    ),
    "tree": lambda **options: TreeSoftmax(WIDTH, V, counts=ZIPF, **options),
    "adaptive": lambda **options: AdaptiveSoftmax(WIDTH, V, div_value=2.0, counts=ZIPF.flip(0)),
}


def make(name, **options):
    torch.manual_seed(0)
    layer = LAYERS[name](**options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer, torch.randn(5, WIDTH, dtype=torch.float64), torch.randint(V, (5, 20))


def gradients(layer, values):
    weights = torch.linspace(-1, 2, values.numel(), dtype=torch.float64).view(values.shape)
    found = torch.autograd.grad((values * weights).sum(), list(layer.parameters()), materialize_grads=True)
    return {name: grad for (name, _), grad in zip(layer.named_parameters(), found, strict=True)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("count", [1, 20, 2 * V])
def test_it_is_gathered_and_so_are_its_gradients(name, count):
    layer, hidden, _ = make(name)
    ids = torch.randint(V, (5, count))
    ids[:, 1::3] = ids[:, :1]  # repeated
    found, expected = layer.score(hidden, ids), layer.log_prob(hidden).gather(1, ids)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(layer, found), gradients(layer, expected))


@pytest.mark.parametrize("name", ["even", "by_frequency", "tree"])
@pytest.mark.parametrize("count", [20, V])
def test_sparse_layers_have_sparse_gradients(name, count):
    layer, hidden, ids = make(name, sparse=True)
    ids = ids[:, :count] if count == 20 else torch.arange(V).expand(5, V)
    found, expected = layer.score(hidden, ids), layer.log_prob(hidden).gather(1, ids)
    found, expected = gradients(layer, found), gradients(layer, expected)
    sparse = {name for name, p in layer.named_parameters() if any(p is q for q in layer.sparse_parameters())}
    assert sparse
    for key, gradient in found.items():
        assert gradient.is_sparse == (key in sparse)
        torch.testing.assert_close(gradient.to_dense(), expected[key].to_dense())


@torch.no_grad()
def test_few_candidates_are_scored_without_the_other_classes(monkeypatch):
    layer, hidden, ids = make("even")
    expected = layer.log_prob(hidden).gather(1, ids)
    monkeypatch.setattr(layer, "_log_prob", None)
    torch.testing.assert_close(layer.score(hidden, ids), expected)


@torch.no_grad()
def test_candidates_in_one_giant_cluster_cost_no_more_than_all_classes(monkeypatch):
    layer = HierarchicalSoftmax(WIDTH, V, clusters=(torch.arange(V) < 9).long())
    monkeypatch.setattr(layer, "_with_inner", None)
    layer.score(torch.randn(5, WIDTH), torch.arange(10, 30).expand(5, -1))


@torch.no_grad()
def test_tails_without_a_candidate_are_not_computed(monkeypatch):
    layer, hidden, _ = make("adaptive")
    sizes = []
    plain = adaptive.linear_score
    monkeypatch.setattr(
        adaptive, "linear_score", lambda h, w, *a, **o: sizes.append(len(h) * len(w)) or plain(h, w, *a, **o)
    )
    layer.score(hidden, layer.order[: layer.cutoffs[0]].expand(5, -1))
    assert sizes == [5 * (layer.cutoffs[0] + len(layer.cutoffs))]
    ids = layer.order[torch.tensor([[0, 1], [V - 1, 1], [1, 2], [2, 0], [V - 2, 1]])]
    layer.score(hidden, ids)
    assert sizes[1:] == [sizes[0], 2 * (V - layer.cutoffs[-1])]


@torch.no_grad()
def test_a_large_common_logit_rounds_nothing_away():
    layer = HierarchicalSoftmax(1, 64, clusters=clusters.even(64, 4), bias=False)
    for parameter in layer.parameters():
        parameter.fill_(4096.0)
    ids = torch.tensor([[0, 1, 63]])
    expected = torch.full((1, 3), 1 / 64).log()
    torch.testing.assert_close(layer.score(torch.tensor([[4096.0]]), ids), expected)


def test_padding_may_be_any_id():
    layer, hidden, ids = make("even")
    layer.ignore_index = 7
    ids[2, 3] = 7
    assert layer.score(hidden, ids)[2, 3] == 0


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_no_rows_and_no_candidates_have_gradients_of_zero(name, count, rows):
    layer, _, _ = make(name)
    hidden = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
    values = layer.score(hidden, torch.randint(V, (rows, count)))
    assert values.shape == (rows, count)
    values.sum().backward()
    assert count or not hidden.grad.any()

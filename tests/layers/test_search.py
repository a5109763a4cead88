"""The exact searches of the layers that have one: the laws with the search forced, and a bound on their work."""

import pytest
import torch

from lastlayer import AdaptiveSoftmax, HierarchicalSoftmax, TreeSoftmax, clusters
from lastlayer.functional import best_classes, tree_search, two_level_queries
from lastlayer.layers import base, search
from lastlayer.testing.handling import law_any_shape
from lastlayer.testing.probabilities import law_topk_is_sorted, law_topk_of_a_selection
from law_table import CASES

SEARCHING = [case for case in CASES if case.name.startswith(("hierarchical", "adaptive", "tree"))]
V, WIDTH, K = 40_000, 8, 5
ZIPF = 1e6 / torch.arange(1, V + 1, dtype=torch.float64)


@pytest.fixture
def always(monkeypatch):
    """Small problems are searched too, and no search gives up."""
    monkeypatch.setattr(search, "worth_searching", lambda cost, rows, classes, width, k: classes > 1)
    monkeypatch.setattr(two_level_queries, "LARGEST_SHARE", 1)
    monkeypatch.setattr(tree_search, "LARGEST_SHARE", 1e9)
    monkeypatch.setattr(tree_search, "FIRST_WIDTH", 2)


@pytest.mark.parametrize("law", [law_topk_is_sorted, law_topk_of_a_selection, law_any_shape])
@pytest.mark.parametrize("case", SEARCHING, ids=str)
@pytest.mark.usefixtures("always")
def test_laws_hold_where_the_search_is_forced(case, law):
    law(case)


def make(name):
    return {
        "even": lambda: HierarchicalSoftmax(WIDTH, V),
        "by_frequency": lambda: HierarchicalSoftmax(WIDTH, V, clusters=clusters.by_frequency(ZIPF)),
        "one giant": lambda: HierarchicalSoftmax(WIDTH, V, clusters=(torch.arange(V) - V + 200).clamp(min=0)),
        "balanced": lambda: TreeSoftmax(WIDTH, V),
        "huffman": lambda: TreeSoftmax(WIDTH, V, counts=ZIPF),
        "chain": lambda: TreeSoftmax(WIDTH, V, counts=2.0 ** -torch.arange(V, dtype=torch.float64).clamp(max=300)),
        "adaptive": lambda: AdaptiveSoftmax(WIDTH, V, div_value=2.0),
    }[name]()


LAYERS = ["even", "by_frequency", "one giant", "balanced", "huffman", "chain", "adaptive"]


@pytest.fixture
def work(monkeypatch):
    """How many classes or nodes each search has looked at one by one, and how many rows were answered densely."""
    counts = {"looked": 0, "dense": 0}
    plain, all_of_them = best_classes.gathered_scores, base.OutputLayer._dense_topk

    def looked(hidden, weight, places):
        counts["looked"] += places.numel()
        return plain(hidden, weight, places)

    def dense(self, scores_of, hidden, *arguments):
        counts["dense"] += len(hidden)
        return all_of_them(self, scores_of, hidden, *arguments)

    monkeypatch.setattr(two_level_queries, "gathered_scores", looked)
    monkeypatch.setattr(tree_search, "gathered_scores", looked)
    monkeypatch.setattr(base.OutputLayer, "_dense_topk", dense)
    return counts


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 6.0])
@pytest.mark.parametrize("excluding", [False, True])
@torch.no_grad()
def test_the_work_of_a_search_is_bounded(name, scale, excluding, work):
    """Whatever the distribution, a row looks at few classes one by one beside those of all log-probabilities."""
    torch.manual_seed(1)
    layer = make(name)
    for parameter in layer.parameters():
        parameter.normal_()
    hidden = scale * torch.randn(70, WIDTH)
    log_prob = layer.log_prob(hidden)
    exclude = log_prob.topk(40).indices if excluding else None
    allowed = torch.arange(0, V, 3) if excluding else None
    if excluding:
        barred = torch.ones(V, dtype=torch.bool).index_fill_(0, allowed, False)
        log_prob = log_prob.scatter(1, exclude, -torch.inf).masked_fill(barred, -torch.inf)
    expected = log_prob.topk(K)
    found = layer.topk(hidden, K, exclude=exclude, allowed=allowed)
    torch.testing.assert_close(found.log_prob, expected.values, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(log_prob.gather(1, found.indices), found.log_prob, rtol=1e-5, atol=2e-5)
    assert work["looked"] <= 70 * (V / 8 + getattr(layer, "num_clusters", 0))
    assert work["dense"] <= 70
    if scale == 0.0 and name in ("even", "by_frequency", "balanced"):
        assert work["dense"] == 70, "a flat distribution is not searched"


@pytest.mark.parametrize("name", ["even", "by_frequency", "huffman"])
@torch.no_grad()
def test_a_peaked_distribution_is_searched(name, work):
    torch.manual_seed(0)
    layer = make(name)
    for parameter in layer.parameters():
        parameter.normal_(std=3.0)
    layer.topk(torch.randn(70, WIDTH), 1)
    assert work["dense"] < 20
    assert work["looked"] <= 70 * V / 40


@pytest.mark.parametrize("name", LAYERS)
def test_small_problems_are_not_searched(name, work):
    layer = make(name)
    layer.topk(torch.randn(1, WIDTH), K)
    assert work == {"looked": 0, "dense": 1}
    layer.topk(torch.randn(70, WIDTH), V // 4)
    assert work == {"looked": 0, "dense": 71}, "most classes are wanted"


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_rows_that_are_not_finite_are_as_dense(name):
    torch.manual_seed(0)
    layer = make(name)
    hidden = torch.randn(70, WIDTH)
    hidden[3], hidden[5, 0] = torch.nan, torch.inf
    found, expected = layer.topk(hidden, 3), layer.log_prob(hidden).topk(3)
    finite = torch.ones(70, dtype=torch.bool)
    finite[[3, 5]] = False
    torch.testing.assert_close(found.log_prob[finite], expected.values[finite], rtol=1e-5, atol=1e-5)
    assert found.log_prob[3].isnan().all()


@pytest.mark.parametrize("name", LAYERS)
def test_the_answer_of_a_search_has_the_gradient_of_all_log_probabilities(name, monkeypatch):
    monkeypatch.setattr(search, "worth_searching", lambda *sizes: True)
    torch.manual_seed(0)
    layer = make(name).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    hidden = torch.randn(3, WIDTH, dtype=torch.float64)
    slopes = []
    for best in (layer.topk(hidden, 4).log_prob, layer.log_prob(hidden).topk(4).values):
        grads = torch.autograd.grad(
            (best * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum(), list(layer.parameters()), materialize_grads=True
        )
        slopes.append([grad.to_dense() for grad in grads])
    torch.testing.assert_close(*slopes)

"""What layers cost: each figure belongs to the layer that it names, and measuring changes nothing."""

import copy

import torch

from lastlayer import AugmentReduce, FactoredOutput, FullSoftmax, HierarchicalSoftmax, Uniform
from lastlayer.study.measuring import cost
from lastlayer.study.measuring.cost import measure_costs, one_by_one, screen_of


def test_costs_of_layers(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 2)
    monkeypatch.setattr(cost, "QUERY_ROUNDS", 2)
    layers = {"full": FullSoftmax(16, 5000), "hierarchical": HierarchicalSoftmax(16, 5000, sparse=True)}
    layers["factored"] = FactoredOutput(16, 5000)
    layers["augment-reduce"] = AugmentReduce(16, 5000, Uniform(5000), 10, num_examples=100, sparse=True)
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    samples = {name: (torch.randn(64, 16), torch.randint(5000, (64,))) for name in layers}
    costs = measure_costs(layers, samples, 10)
    assert list(costs) == list(layers)
    assert all(record[field] > 0 for record in costs.values() for field in ("output_layer_ms", "query_ms"))
    assert costs["factored"]["parameters"] == 16 * 5000
    full, hierarchical = costs["full"], costs["hierarchical"]
    assert full["screened_query_ms"] > 0
    assert full["screened_agreement"] == 1  # proved
    assert (hierarchical["screened_query_ms"], hierarchical["screened_agreement"]) == (None, None)
    for name, layer in layers.items():
        assert all(torch.equal(value, before[name][key]) for key, value in layer.state_dict().items())
        assert all(p.grad is None for p in layer.parameters())


def test_small_layers_are_not_screened():
    assert screen_of(FullSoftmax(4, 100)) is None


def test_queries_go_through_the_rows():
    asked = []
    query = one_by_one(lambda row, k: asked.append((row.item(), k)), torch.arange(3.0)[:, None], 7)
    for _ in range(4):
        query()
    assert asked == [(0.0, 7), (1.0, 7), (2.0, 7), (0.0, 7)]

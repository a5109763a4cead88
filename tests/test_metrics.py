"""Ranking metrics against their definitions, a row at a time."""

import math

import pytest
import torch

from lastlayer import metrics

INDICES = torch.tensor([[4, 2, 9, 0], [7, 5, 1, 3], [1, 2, -1, -1], [6, 5, 4, 3], [8, 9, 0, 1]])
TARGETS = torch.tensor([[2, 0, 8], [6, -100, -100], [2, 2, -100], [-100, -100, -100], [8, 9, 0]])
ROWS = [([4, 2, 9, 0], {2, 0, 8}), ([7, 5, 1, 3], {6}), ([1, 2], {2}), ([8, 9, 0, 1], {8, 9, 0})]


def mean(of_row):
    return sum(of_row(best, right) for best, right in ROWS) / len(ROWS)


def gain(best, right):
    return sum(1 / math.log2(place + 2) for place, c in enumerate(best) if c in right)


def test_metrics_are_their_definitions():
    expected = {
        metrics.recall: mean(lambda best, right: len(right & set(best)) / len(right)),
        metrics.precision: mean(lambda best, right: len(right & set(best)) / 4),
        metrics.reciprocal_rank: mean(
            lambda best, right: max((1 / (place + 1) for place, c in enumerate(best) if c in right), default=0)
        ),
        metrics.ndcg: mean(
            lambda best, right: gain(best, right) / sum(1 / math.log2(p + 2) for p in range(min(4, len(right))))
        ),
    }
    for metric, value in expected.items():
        assert metric(INDICES, TARGETS).item() == pytest.approx(value)
        assert metric(INDICES[None], TARGETS[None]).item() == pytest.approx(value)


def test_propensity_scored_precision():
    counts = torch.tensor([50, 1, 3, 0, 9, 2, 7, 4, 30, 1])
    propensity = metrics.propensities(counts, 1000)
    c = (math.log(1000) - 1) * 2.5**0.55
    assert propensity[4].item() == pytest.approx(1 / (1 + c * math.exp(-0.55 * math.log(9 + 1.5))))
    weight = {c: 1 / p for c, p in enumerate(propensity.tolist())}
    for k in (1, 2, 4):
        reached = sum(weight[c] for best, right in ROWS for c in best[:k] if c in right)
        best = sum(w for _, right in ROWS for w in sorted((weight[c] for c in right), reverse=True)[:k])
        found = metrics.propensity_scored_precision(INDICES[:, :k], TARGETS, propensity)
        assert found.item() == pytest.approx(reached / best)


def test_one_target_a_row():
    best = torch.tensor([[4, 2], [7, 5]])
    assert metrics.recall(best, torch.tensor([2, 9])).item() == 0.5
    assert metrics.recall(best, torch.tensor([2, -100])).item() == 1
    assert metrics.recall(best, torch.tensor([-100, -100])).isnan()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="rows of indices"):
        metrics.recall(INDICES, TARGETS[:2])
    with pytest.raises(ValueError, match="num_rows"):
        metrics.propensities(torch.ones(3), 1)
    with pytest.raises(ValueError, match="counts"):
        metrics.propensities(-torch.ones(3), 10)

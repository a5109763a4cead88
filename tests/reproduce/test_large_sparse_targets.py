"""The study of large sparse targets, at small sizes: every part runs and reports what it should."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lastlayer.cli.app import app
from lastlayer.functional.spherical import SquaredError
from lastlayer.reproduce.large_sparse_targets.classifiers import LOSSES as CLASSIFIER_LOSSES
from lastlayer.reproduce.large_sparse_targets.classifiers import measure_classifiers, misspellings
from lastlayer.reproduce.large_sparse_targets.exactness import measure_exactness, measure_repairs
from lastlayer.reproduce.large_sparse_targets.speed import (
    LOSSES,
    dense_step,
    fused_step,
    measure_scaling,
    measure_speed,
)
from lastlayer.reproduce.large_sparse_targets.words import METHODS, examples, train_words
from lastlayer.study.errors import StudyError
from lastlayer.study.training.trainer import Budget
from texts import corpus_of


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Steps whose times do not matter."""
    monkeypatch.setattr("lastlayer.reproduce.large_sparse_targets.speed.STEPS_A_RUN", 1)


def test_speed_has_every_peer():
    records = measure_speed(400, 6, 4, rounds=1)
    names = {record["name"] for record in records}
    assert {f"FactoredOutput, {loss}" for loss in LOSSES} < names
    for record in records:
        assert record["ms"] > 0
        assert record["mean_ms"] > 0
        assert (record["times_faster_than_plain"] is None) == record["name"].startswith("Hierarchical")
    deep = {r["name"]: r for r in measure_speed(400, 6, 4, 1, losses=("squared error",), deep=True)}
    assert {"nn.Linear, squared error, SGD", "HierarchicalSoftmax, SGD", "FactoredOutput, squared error"} < set(
        deep
    )
    assert {record["case"] for record in deep.values()} == {"whole model"}
    assert all(record["times_faster_than_plain"] > 0 for record in deep.values())
    sizes = {(r["num_classes"], r["in_features"]) for r in measure_scaling([50, 100], [4, 8], 4, rounds=1)}
    assert sizes == {(50, 8), (100, 8), (50, 4)}


def test_repairs_are_counted():
    """At a rate that calls for some; of hidden states that are alike, fewer directions shrink."""
    records = measure_repairs(200, 16, 8, steps=200, rate=0.02)
    assert [record["name"] for record in records] == ["one batch", "16 batches in turn", "a spectrum that decays"]
    for record in records:
        assert 0 < record["repairs"] < 100
        assert 0 < record["stabilizing_share"] < 1
        assert record["low_ms"] <= record["ms"] <= record["high_ms"] < 10 * record["mean_ms"]


def test_peers_take_the_same_step():
    """The hand-fused update is the plain one."""
    hidden, targets = torch.randn(5, 6), torch.randint(40, (3, 5))
    weights = []
    for make in (lambda linear: dense_step(linear, hidden, targets, SquaredError(), torch.nn.Identity()), None):
        torch.manual_seed(0)
        linear = torch.nn.Linear(6, 40, bias=False)
        step = fused_step(linear, hidden, targets) if make is None else make(linear)
        for _ in range(3):
            step()
        weights.append(linear.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])


def test_exactness_tells_what_the_repairs_are_for():
    records = measure_exactness(250, num_classes=200, in_features=8, rate=2e-3)
    last = {(r["dtype"], r["stabilized"]): r for r in records if r["step"] == 250}
    assert last["float32", True]["weight_error"] < 1e-4
    assert last["float64", True]["weight_error"] < 1e-10
    for dtype in ("float32", "float64"):
        alone = last[dtype, False]
        assert alone["diverged"] or alone["weight_error"] > 10 * last[dtype, True]["weight_error"]


@pytest.fixture(scope="module")
def corpus():
    lines = [f"the {a} {b} sees the {c} of {a}" for a in "abcdef" for b in "ghij" for c in "klmn"]
    return corpus_of(lines, min_count=1)


def test_words_learn(corpus):
    for deep in (False, True):
        records = train_words(corpus, tuple(METHODS), Budget(steps=60), deep=deep, seed=0)
        assert [record["name"] for record in records] == list(METHODS)
        for record in records:
            assert record["steps"] == 60
            assert record["top10_accuracy"] > 10 / corpus.num_classes, record["name"]
            if record["perplexity"] is not None:
                assert record["perplexity"] < corpus.num_classes, record["name"]


WORDS = ["monday", "tuesday", "winter", "summer", "garden", "window"]


def test_misspellings_are_never_shared():
    parts = misspellings(WORDS, seed=0)
    rows = [tuple(row[row > 0].tolist()) for pieces, _ in parts for row in pieces]
    assert len(rows) > 100
    seen = [{tuple(row[row > 0].tolist()) for row in pieces} for pieces, _ in parts]
    assert not (seen[0] & seen[2])
    assert set(parts[2][1].tolist()) == set(range(len(WORDS)))


def test_classifiers_learn():
    text = corpus_of([f"{a} before {b} and after" for a in WORDS for b in WORDS for _ in range(3)])
    records = measure_classifiers(text, steps=40, sizes=(4,))
    assert [record["name"] for record in records] == list(CLASSIFIER_LOSSES)
    for record in records:
        assert record["num_classes"] == 4
        assert record["error"] < 0.5, record
    with pytest.raises(StudyError, match="too few words"):
        measure_classifiers(corpus_of(["a b c d"] * 100), steps=1)


def test_contexts():
    contexts, targets = examples(torch.arange(7), deep=False)
    assert contexts[0].tolist() == [0, 1, 3, 4]
    assert targets.tolist() == [2, 3, 4]
    contexts, targets = examples(torch.arange(7), deep=True)
    assert contexts[0].tolist() == [0, 1, 2, 3]
    assert targets.tolist() == [4, 5, 6]


def test_reproduce_verb(tmp_path):
    path = tmp_path / "records.json"
    options = ["--parts", "exactness,speed,scaling", "--steps", "20", "--num-classes", "400", "--in-features", "4"]
    arguments = ["reproduce", "large-sparse-targets", *options, "--rounds", "1", "--json", str(path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "as remembered" in done.output
    records = json.loads(path.read_text())
    assert {record["case"] for record in records} == {"exactness", "output layer", "whole model", "scaling"}
    refused = CliRunner().invoke(app, ["reproduce", "large-sparse-targets", "--parts", "magic"])
    assert refused.exit_code == 2

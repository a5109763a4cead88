"""`lastlayer compare` of layers without a perplexity, and of those that keep a number for each example."""

import json
import sys

import pytest
from typer.testing import CliRunner

from lastlayer.cli.app import app

OPTIONS = ["--width", 8, "--batch", 4, "--window", 5, "--threads", 1]
SCORES = {"one-vs-all", "one-vs-sampled"}
SPARSE = {"sparsemax", "topk-softmax"}
SOFTMAXES = {"full", "augment-reduce"}


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)])


def strict_json(path):
    """The content of a file that holds neither NaN nor Infinity."""
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def test_layers_with_and_without_a_perplexity(tmp_path, story):
    out, names = tmp_path / "out", sorted(SOFTMAXES | SPARSE | SCORES)
    result = run("--text", story, *OPTIONS, "--layers", ",".join(names), "--steps", 25, "--out", out)
    assert result.exit_code == 0, result.output
    results = strict_json(out / "results.json")
    records = {record["layer"]: record for record in results["records"]}
    assert set(records) == set(names)
    for name, record in records.items():
        share = record["zero_probability_share"]
        assert (share is None) == (name in SCORES)
        assert (record["perplexity"] is None) == (share != 0)
        assert 0 < record["top10_accuracy"] <= 1
        assert record["perplexity"] is None or 1 < record["perplexity"] < 30
    assert all(records[name]["zero_probability_share"] == 0 for name in SOFTMAXES)
    assert records["topk-softmax"]["zero_probability_share"] > 0
    accuracies = [record["top10_accuracy"] for record in results["records"]]
    assert accuracies == sorted(accuracies, reverse=True)  # what all of them have

    assert "one-vs-all: top-10 accuracy" in result.output
    assert "topk-softmax has no perplexity" in result.output
    page = (out / "index.html").read_text()
    assert "one-vs-all has no perplexity: its scores are no probabilities" in page
    assert "among its ten best most often" in page
    assert not {"nan", "inf", "None"} & set(page.replace("<", " ").replace(">", " ").split())


def test_scores_of_items(tmp_path):
    """Where none has a perplexity there is no picture of it."""
    items, out = tmp_path / "sessions.txt", tmp_path / "out"
    items.write_text("\n".join(" ".join(f"i{(s + i) % 10}" for i in range(3 + s % 4)) for s in range(400)))
    result = run("--items", items, *OPTIONS, "--layers", "one-vs-all", "--steps", 60, "--out", out)
    assert result.exit_code == 0, result.output
    for record in strict_json(out / "results.json")["records"]:
        assert record["perplexity"] is None
        assert record["mrr10"] > 0.5  # the next item follows from the last
    assert "<figure" not in (out / "index.html").read_text()


def test_a_missing_package_is_said_before_anything_is_trained(tmp_path, story, monkeypatch):
    monkeypatch.setitem(sys.modules, "entmax", None)
    result = run("--text", story, *OPTIONS, "--layers", "full,sparsemax", "--out", tmp_path / "out")
    assert result.exit_code == 1
    said = "sparsemax needs the entmax package: pip install 'lastlayer[entmax]'"
    assert result.stderr == f"lastlayer: {said}\n"
    assert not (tmp_path / "out").exists()

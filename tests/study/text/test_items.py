"""Sequences of items: what is predicted from what, the vocabulary, what is held out, and bad files."""

import gzip
import json
import math

import pytest
import torch
from typer.testing import CliRunner

from lastlayer import FullSoftmax
from lastlayer.cli.app import app
from lastlayer.study.errors import StudyError
from lastlayer.study.text.batches import NO_TARGET, Sequences
from lastlayer.study.text.items import load_items, make_items
from lastlayer.study.training.evaluation import evaluate, rank_held_out
from lastlayer.study.training.language_model import LanguageModel

CPU = torch.device("cpu")
IDS = torch.arange(30)
LENGTHS = torch.tensor([2, 7, 3, 12, 6])
OPTIONS = ["--width", "8", "--batch", "8", "--layers", "full,sampled", "--threads", "1", "--steps", "25"]


def lines(num=120):
    """Lines that count upwards from somewhere, ten items in a circle."""
    return [[f"item{(start + i) % 10}" for i in range(3 + start % 4)] for start in range(num)]


def write(path, sequences):
    path.write_text("\n".join(" ".join(sequence) for sequence in sequences), encoding="utf-8")
    return path


@pytest.mark.parametrize(("batch", "window"), [(1, 3), (2, 4), (3, 100), (50, 5)])
def test_every_item_but_the_first_is_a_target_once(batch, window):
    batches = Sequences(IDS, LENGTHS, batch, window, CPU)
    firsts = set((LENGTHS.cumsum(0) - LENGTHS).tolist())
    seen = []
    for number in range(batches.windows):
        inputs, targets = batches[number]
        assert batches.starts_anew(number)
        assert inputs.shape == targets.shape
        assert inputs.shape[0] <= batch
        assert inputs.shape[1] <= window
        kept = targets != NO_TARGET
        assert torch.equal(targets[kept], inputs[kept] + 1), "a target follows an item of another sequence"
        seen += targets[kept].tolist()
    assert sorted(seen) == sorted(set(range(30)) - firsts)
    assert batches.tokens == len(seen)
    for number in range(batches.windows):
        targets, examples = batches[number][1], batches.examples(number)
        assert torch.equal(examples, targets.clamp(min=0)), "ids of this text are their places"
    assert [batches[0][0].tolist(), batches[0][1].tolist()] == [part.tolist() for part in batches[0]]


def test_held_out_perplexity_and_ranks_are_those_of_each_sequence_alone():
    """Neither padding nor the sequences beside it, before it or after it change what a prediction is made from."""
    torch.manual_seed(0)
    model = LanguageModel(30, FullSoftmax(8, 30)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    total, ranks = 0.0, []
    for sequence in IDS.split(LENGTHS.tolist()):
        log_prob = model.output.log_prob(model.encode(sequence[None, :-1], None)[0])[0]
        own = log_prob.gather(1, sequence[1:, None])
        total -= float(own.detach().sum())
        ranks += (1 + (log_prob > own).sum(1)).tolist()
    for batch in (1, 2, 5):
        batches = Sequences(IDS, LENGTHS, batch, 20, CPU)
        quality = evaluate(model, batches, 1000)
        assert quality.tokens == 25
        assert math.isclose(quality.perplexity, math.exp(total / 25), rel_tol=1e-5)
        found = rank_held_out(model, batches, 10, 1000)
        assert found.tokens == 25
        assert math.isclose(found.recall, sum(rank <= 10 for rank in ranks) / 25, rel_tol=1e-5)
        assert math.isclose(found.reciprocal_rank, sum(1 / r for r in ranks if r <= 10) / 25, rel_tol=1e-5)
        assert math.isclose(found.ndcg, sum(1 / math.log2(1 + r) for r in ranks if r <= 10) / 25, rel_tol=1e-5)


def test_vocabulary_and_what_is_held_out(tmp_path):
    corpus = load_items([write(tmp_path / "sessions.txt", [*lines(), ["alone"], ["rare", "item1", "item2"]])])
    assert (corpus.name, corpus.unit, len(corpus.lengths[0])) == ("sessions.txt", "items", 115)
    assert len(corpus.lengths[1]) == 6
    assert set(corpus.words) == {f"item{i}" for i in range(10)} | {"rare"}  # no <unk>, no <eos>
    assert corpus.counts.tolist() == sorted(corpus.counts.tolist(), reverse=True)
    assert torch.equal(corpus.counts, torch.bincount(corpus.train, minlength=11))
    first = [corpus.words[i] for i in corpus.train[: corpus.lengths[0][0]].tolist()]
    assert first == lines()[0]
    held_out = [corpus.words[i] for i in corpus.held_out[: corpus.lengths[1][0]].tolist()]
    assert held_out == lines()[19]
    assert corpus.words[corpus.train[-3]] == "rare"
    fewer = load_items([tmp_path / "sessions.txt"], min_count=2)
    assert "rare" not in fewer.words
    assert fewer.lengths[0][-1] == 2
    assert fewer.fingerprint() != corpus.fingerprint()


def test_two_parts_and_other_forms(tmp_path):
    with gzip.open(tmp_path / "s.train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"items": [7, "b", 7 + i % 3]}) + "\n" for i in range(60))
    (tmp_path / "s.valid.jsonl").write_text(json.dumps({"items": "7 b new 8"}) + "\n")
    corpus = load_items([tmp_path], field="items")
    assert set(corpus.words) == {"7", "b", "8", "9"}
    assert [corpus.words[i] for i in corpus.held_out.tolist()] == ["7", "b", "8"]
    assert "1 held-out items left out" in corpus.notes[-1]


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ([], [], "0 sequences of two items or more"),
        ([["a", "b"]] * 5, [["a", "b"]], "needs at least 20"),
        ([["a"]] * 100, [["a", "b"]], "0 sequences of two"),
        ([["a", "a"]] * 100, [["a", "a"]], "one kind of item"),
        ([["a", "b"]] * 100, [["x", "y"]], "0 to hold out"),
    ],
)
def test_too_little_to_compare(train, held_out, message):
    with pytest.raises(StudyError, match=message):
        make_items("it", train, held_out)


def test_a_line_that_is_no_sequence(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": ["a", "b"]}\n{"text": [1.5]}\n')
    with pytest.raises(StudyError, match=r"line 2: '1\.5' is no sequence of ids or names"):
        load_items([tmp_path / "s.jsonl"])


def test_compare_items(tmp_path):
    items, out = write(tmp_path / "sessions.txt", lines(400)), tmp_path / "out"
    result = CliRunner().invoke(app, ["compare", "--items", str(items), *OPTIONS, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "recall" in result.output
    assert "NDCG" in result.output
    assert "380 sequences to train on, 20 held out" in " ".join(result.output.split())
    results = json.loads((out / "results.json").read_text())
    assert results["text"]["unit"] == "items"
    for record in results["records"]:
        assert 1 < record["perplexity"] < 9
        assert 0.9 < record["top10_accuracy"] <= 1
        assert 0.3 < record["mrr10"] <= record["ndcg10"] <= record["top10_accuracy"]
        assert record["num_classes"] == 10
    page = (out / "index.html").read_text()
    for said in ("Recall@10", "NDCG@10", "MRR@10", "380 sequences", "batches of 8 sequences, shuffled"):
        assert said in page
    again = CliRunner().invoke(app, ["compare", "--items", str(items), *OPTIONS, "--out", str(out), "--resume"])
    assert again.output.count("already trained") == 2


@pytest.mark.parametrize("wrong", [["--text", "x.txt"], ["--characters"], ["--ids"]])
def test_items_and_text_are_not_both_given(tmp_path, wrong):
    items = write(tmp_path / "sessions.txt", lines())
    result = CliRunner().invoke(app, ["compare", "--items", str(items), *wrong])
    assert (result.exit_code, f"give --items or {wrong[0]}, not both" in result.stderr) == (2, True)

"""`reproduce softmax-bottleneck` at small sizes: its three parts, resuming, bad usage."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lastlayer.cli.app import app
from lastlayer.reproduce.cells import Cells
from lastlayer.reproduce.softmax_bottleneck import study as bottleneck
from lastlayer.reproduce.softmax_bottleneck.language import PUBLISHED, wide
from lastlayer.reproduce.softmax_bottleneck.synthetic import MODELS, dirichlet, fit
from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.training.trainer import Trainer

TINY = bottleneck.Size((12,), (2, 3), 2, 6, 2, 3, 2, (40,), (1, 2), 200, 1.0, synthetic_steps=3)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The command at a size of seconds, on a text of its own."""
    monkeypatch.setitem(bottleneck.SIZES, "minutes", TINY)
    text = tmp_path / "text.txt"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "it"]
    text.write_text("".join(" ".join(words[i % 12] for i in range(n, n + 9)) + " .\n" for n in range(300)))

    def run(*options):
        arguments = ["reproduce", "softmax-bottleneck", "--text", str(text), "--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*arguments, *options])

    return run


def test_all_parts_and_resume(tiny, tmp_path, monkeypatch):
    result = tiny("--json", str(tmp_path / "records.json"))
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "records.json").read_text())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["records"] == records
    parts = [record["part"] for record in records]
    assert parts.count("a") == len(MODELS) * 2 * 2
    assert parts.count("b") == len(PUBLISHED) * 2
    assert parts.count("b time") == len(PUBLISHED)
    assert parts.count("c") == 5
    language = {r["layer"]: r for r in records if r["part"] == "b"}
    assert language["softmax"]["published_perplexity"] == 64.63
    assert abs(language["wide softmax"]["parameters"] / language["mixture"]["parameters"] - 1) < 0.1
    assert (tmp_path / "out" / "synthetic.png").stat().st_size > 1000

    again = tiny()
    assert again.exit_code == 2, "results were overwritten"
    assert "--resume" in again.output

    # A kill after the first cells: the others are worked out, those are kept.
    kept = records[:4]
    kept[0]["kl_nats"] = 123.0
    (tmp_path / "out" / "results.json").write_text(json.dumps({"records": kept}))
    resumed = tiny("--resume", "--parts", "a", "--json", str(tmp_path / "records.json"))
    assert resumed.exit_code == 0, resumed.output
    after = json.loads((tmp_path / "records.json").read_text())
    assert after[0]["kl_nats"] == 123.0
    assert after[4:] == records[4 : len(after)], "a resumed run differs from one that was not interrupted"


def test_a_kill_in_training(tiny, tmp_path, monkeypatch):
    """Killed in the middle of a model, it goes on from that model's checkpoint, to the same perplexities."""
    monkeypatch.setitem(bottleneck.SIZES, "minutes", replace(TINY, steps=8, seeds=1))
    whole = tiny("--parts", "b", "--out", str(tmp_path / "whole"), "--json", str(tmp_path / "whole.json"))
    assert whole.exit_code == 0, whole.output

    steps, step = [], Trainer.step

    def killed(trainer):
        steps.append(1)
        if len(steps) == 13:
            raise KeyboardInterrupt
        step(trainer)

    monkeypatch.setattr(Trainer, "step", killed)
    assert tiny("--parts", "b").exit_code != 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["records"]) == 1
    steps.clear()
    steps.extend([1] * 13)
    resumed = tiny("--parts", "b", "--resume", "--json", str(tmp_path / "resumed.json"))
    assert resumed.exit_code == 0, resumed.output
    trained = len(steps) - 13 - 9 * len(PUBLISHED)  # 9: the rounds that time a step
    assert trained == 8 * (len(PUBLISHED) - 1) - 4, "the second model did not go on from its checkpoint"
    perplexities = [
        {r["layer"]: r["perplexity"] for r in json.loads((tmp_path / name).read_text()) if r["part"] == "b"}
        for name in ("whole.json", "resumed.json")
    ]
    assert perplexities[0] == perplexities[1]


@pytest.mark.parametrize("budget", ["hour", "day"])
def test_larger_budgets_begin(tiny, monkeypatch, budget):
    """Every cell of the larger sizes can be asked for; the heavy work itself is stood in for."""
    size = bottleneck.SIZES[budget]
    asked = []
    monkeypatch.setattr(
        bottleneck, "fit", lambda *a, **k: asked.append(a) or {"mode_matched_percent": 1, "kl_nats": 1}
    )
    result = tiny("--budget", budget, "--parts", "a")
    assert result.exit_code == 0, result.output
    assert "two cores" in result.output
    assert len(asked) == len(MODELS) * len(size.contexts) * len(size.widths) * size.synthetic_seeds
    assert {a[3] for a in asked} == set(size.widths)


@pytest.mark.parametrize(
    ("options", "says"), [(("--budget", "week"), "minutes, hour, day"), (("--parts", "x"), "letters of 'abc'")]
)
def test_bad_usage(tiny, options, says):
    result = tiny(*options)
    assert result.exit_code == 2
    assert says in result.output


def test_damaged_results(tmp_path):
    for content in ('[{"part": ', "[]", '{"records": [1]}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(StudyError, match="cannot read"):
            Cells(tmp_path, True, Console())
    with pytest.raises(UsageError, match="--resume"):
        Cells(tmp_path, False, Console())


def test_dirichlet():
    state = torch.get_rng_state()
    target = dirichlet(50, 40, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(target.sum(1), torch.ones(50, dtype=torch.float64))
    assert target.amax(1).mean() > 0.6, "the mass is on a few words"
    assert torch.equal(target, dirichlet(50, 40, seed=1))


@pytest.mark.parametrize("name", MODELS)
def test_fit_learns(name):
    few, more = (fit(name, 10, 8, 3, 0, steps=steps) for steps in (1, 60))
    assert more["kl_nats"] < 0.8 * few["kl_nats"]
    assert 0 <= more["mode_matched_percent"] <= 100


def test_width_of_equal_parameters():
    assert wide(64, 10_000, 1) > 64
    assert wide(400, 33_278, 15) == pytest.approx(435, abs=10)

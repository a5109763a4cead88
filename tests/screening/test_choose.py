"""choose_screen: what it tries, what it measures, and what it chooses."""

import pytest
import torch

from lastlayer import choose_screen
from lastlayer.screening import choose
from lastlayer.screening.trials import query_times

FIELDS = {
    "preview", "window", "candidates", "agreement_top1", "agreement_topk", "kl",
    "bytes_read_fraction", "ms", "full_ms", "ratio", "certified_fraction", "dropped", "chosen",
}  # fmt: skip


@pytest.fixture
def all_worth_it(monkeypatch):
    """Nothing is dropped for being slow, as it might be on a head of test size."""
    monkeypatch.setattr(choose, "HOPELESS", float("inf"))


def head(num_classes=3000, width=32, rows=400):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(num_classes, width, generator=generator)
    hidden = torch.randn(rows, width, generator=generator) * torch.logspace(0.5, -1.5, width)
    return weight, torch.randn(num_classes, generator=generator), hidden


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.usefixtures("all_worth_it")
def test_chosen_agrees_on_held_out_rows(k):
    weight, bias, hidden = head()
    screen, table = choose_screen(weight, bias, hidden, agreement=0.98, k=k)
    assert all(record.keys() == FIELDS for record in table)
    (chosen,) = (record for record in table if record["chosen"])
    assert chosen["agreement_topk"] >= 0.98
    assert all(r["ms"] >= chosen["ms"] for r in table if (r["agreement_topk"] or 0) >= 0.98)
    assert chosen["candidates"] == screen.candidates
    fresh = head(rows=500)[2][400:]
    found = torch.cat([screen.topk(row, k).indices for row in fresh.split(1)])
    truth = (fresh @ weight.T + bias).topk(k).indices
    assert (found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-2).float().mean() > 0.9


@pytest.mark.usefixtures("all_worth_it")
def test_calibration_shows_in_the_table():
    weight, bias, hidden = head()
    _, table = choose_screen(weight, bias, hidden, agreement=0.98)
    by = {(r["preview"], r["window"]): r for r in table}
    plain, calibrated = by["SVD, plain", 4], by["SVD, calibrated, float32", 4]
    assert calibrated["candidates"] < plain["candidates"] or calibrated["kl"] < plain["kl"]
    assert by["int8, certified", None]["certified_fraction"] == 1.0
    assert by["int8, certified", None]["agreement_top1"] == 1.0


@pytest.mark.usefixtures("all_worth_it")
def test_certified_when_none_agrees_by_itself(monkeypatch):
    monkeypatch.setattr("lastlayer.screening.choose.tuned_screen", few_candidates)
    weight, bias, hidden = head()
    screen, table = choose_screen(weight, bias, hidden, agreement=1.0, k=3)
    assert screen.exact
    chosen = next(r for r in table if r["chosen"])["preview"]
    assert chosen in {"int8, certified", "int4, calibrated, certified"}


def slow_screens(queries, hidden, rounds, warmup):
    """Each query's time as if every screen took twice what the full layer takes."""
    times = query_times(queries, hidden, rounds, warmup)
    if rounds == choose.FEW:
        return [2.0, 1.0]
    return [1.0, *(2.0 for _ in times[1:])]


def test_slow_screens_are_dropped_after_a_few_queries(monkeypatch):
    measured = []
    real = choose.quality
    monkeypatch.setattr(choose, "query_times", slow_screens)
    monkeypatch.setattr(
        choose, "quality", lambda s, truth, *more: measured.append(len(truth.hidden)) or real(s, truth, *more)
    )
    weight, bias, hidden = head()
    screen, table = choose_screen(weight, bias, hidden, k=3)
    assert measured == [choose.FALLBACK_ROWS]  # of one screen, few rows
    assert {"2.0 times as slow as the full layer"} <= {r["dropped"] for r in table}
    assert all(r["dropped"] for r in table)
    (chosen,) = (r for r in table if r["chosen"])
    assert screen.exact
    assert (chosen["preview"], chosen["ratio"], chosen["agreement_topk"]) == ("int8, certified", 0.5, 1.0)


@pytest.mark.usefixtures("all_worth_it")
def test_a_preview_that_tells_nothing_apart_is_dropped():
    """Hidden states outside the window: the scores of an SVD preview are all alike."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(3000, 32, generator=generator), torch.randn(400, 32, generator=generator)
    _, table = choose_screen(weight, None, hidden, agreement=1.0, k=5)
    dropped = [r for r in table if r["dropped"]]
    assert dropped
    assert all(r["candidates"] > 1500 and "of 3,000 classes as candidates" in r["dropped"] for r in dropped)
    assert not any(r["chosen"] for r in dropped)
    assert all(r["agreement_topk"] is None for r in dropped)


def test_time_that_runs_out_leaves_previews_untried():
    weight, bias, hidden = head()
    steps = []
    screen, table = choose_screen(weight, bias, hidden, seconds=1e-9, on_progress=steps.append)
    untried = [r for r in table if r["dropped"] == "no time was left to try it"]
    assert len(untried) == len(table) - 1
    assert all(r["ms"] is None for r in untried)
    assert sum(r["chosen"] for r in table) == 1
    assert screen.exact
    assert [step.doing for step in steps] == [
        "querying the full layer",
        "trying int8, certified",
        "comparing their times",
    ]
    with pytest.raises(ValueError, match="seconds must be above 0, got 0"):
        choose_screen(weight, bias, hidden, seconds=0)


def test_progress_is_told_with_an_estimate():
    steps = []
    weight, bias, hidden = head()
    _, table = choose_screen(weight, bias, hidden, on_progress=steps.append)
    assert [step.done for step in steps] == list(range(len(table) + 2))
    assert steps[0].seconds_left is None
    assert all(step.seconds_left >= 0 and step.total == len(table) + 1 for step in steps[1:])


def few_candidates(make, preview, tuning, agreement, k):
    return make(preview=preview, candidates=k)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("agreement must be above 0", {"agreement": 0.0}),
        ("agreement must be above 0", {"agreement": 1.5}),
        ("k must be between 1 and 3000", {"k": 3001}),
        ("at least 16 hidden states, got 15", {"hidden": torch.randn(15, 32)}),
        ("hidden must be finite", {"hidden": torch.full((20, 32), float("nan"))}),
        ("hidden must have shape", {"hidden": torch.randn(20, 31)}),
    ],
)
def test_bad_input(message, change):
    weight, bias, hidden = head()
    settings = {"hidden": hidden, **change}
    with pytest.raises(ValueError, match=message):
        choose_screen(weight, bias, settings.pop("hidden"), **settings)


@pytest.mark.parametrize(
    ("error", "message", "weight", "bias"),
    [
        (TypeError, "weight must be a dense floating-point tensor .* got list", [[1.0]], None),
        (ValueError, "weight must have shape", torch.randn(32), None),
        (ValueError, "weight must have shape", torch.randn(0, 32), None),
        (ValueError, "bias must have shape", torch.randn(90, 32), torch.randn(3)),
        (ValueError, "weight must be finite", torch.full((90, 32), float("inf")), None),
    ],
)
def test_bad_layer(error, message, weight, bias):
    with pytest.raises(error, match=message):
        choose_screen(weight, bias, torch.randn(40, 32))

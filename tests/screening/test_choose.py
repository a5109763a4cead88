"""choose_screen: what it tries, what it measures, and which it takes."""

import pytest
import torch

from lastlayer import choose_screen

FIELDS = {
    "preview", "window", "candidates", "agreement_top1", "agreement_topk", "kl",
    "bytes_read_fraction", "ms", "full_ms", "ratio", "certified_fraction", "chosen",
}  # fmt: skip


def head(num_classes=3000, width=32, rows=400):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(num_classes, width, generator=generator)
    hidden = torch.randn(rows, width, generator=generator) * torch.logspace(0.5, -1.5, width)
    return weight, torch.randn(num_classes, generator=generator), hidden


@pytest.mark.parametrize("k", [1, 5])
def test_chosen_agrees_on_held_out_rows(k):
    weight, bias, hidden = head()
    screen, table = choose_screen(weight, bias, hidden, agreement=0.98, k=k)
    assert all(record.keys() == FIELDS for record in table)
    (chosen,) = (record for record in table if record["chosen"])
    assert chosen["agreement_topk"] >= 0.98
    assert all(r["ms"] >= chosen["ms"] for r in table if r["agreement_topk"] >= 0.98)
    assert chosen["candidates"] == screen.candidates
    fresh = head(rows=500)[2][400:]
    found = torch.cat([screen.topk(row, k).indices for row in fresh.split(1)])
    truth = (fresh @ weight.T + bias).topk(k).indices
    assert (found.unsqueeze(-1) == truth.unsqueeze(-2)).any(-2).float().mean() > 0.9


def test_calibration_shows_in_the_table():
    weight, bias, hidden = head()
    _, table = choose_screen(weight, bias, hidden, agreement=0.98)
    by = {(r["preview"], r["window"]): r for r in table}
    plain, calibrated = by["SVD, plain", 4], by["SVD, calibrated, float32", 4]
    assert calibrated["candidates"] < plain["candidates"] or calibrated["kl"] < plain["kl"]
    assert by["int8, certified", None]["certified_fraction"] == 1.0
    assert by["int8, certified", None]["agreement_top1"] == 1.0


def test_certified_when_none_agrees_by_itself(monkeypatch):
    monkeypatch.setattr("lastlayer.screening.choose._tuned", few_candidates)
    weight, bias, hidden = head()
    screen, table = choose_screen(weight, bias, hidden, agreement=1.0, k=3)
    assert screen.exact
    chosen = next(r for r in table if r["chosen"])["preview"]
    assert chosen in {"int8, certified", "int4, calibrated, certified"}


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

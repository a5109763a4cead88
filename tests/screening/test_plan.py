"""Whether screen or full layer runs: the plan, a user's choice, rows that the screen cannot certify."""

import time
import warnings

import pytest
import torch

from lastlayer import Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.screening import screen_rows
from lastlayer.screening.plan import BATCHES, Plan, Planned, Tally, backend_for, measure_plan

WEIGHT = torch.zeros(1000, 64)


def plan(screen_ms, full_ms):
    return Plan(
        tuple(Planned(b, screen_ms, full_ms, "screen" if screen_ms <= full_ms else "full") for b in BATCHES)
    )


def head(num_classes=3000, width=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_classes, width, generator=generator), torch.randn(8, width, generator=generator)


@pytest.mark.parametrize(
    ("change", "backend"),
    [
        ({}, "compiled"),
        ({"compiled": False}, "plain"),
        ({"weight": WEIGHT.double()}, "plain"),
        ({"weight": WEIGHT.to("meta")}, "plain"),
        ({"weight": torch.zeros(64, 1000).T}, "plain"),
        ({"weight": torch.zeros(1000, 10_000)}, "plain"),
        ({"rows": 100}, "full"),
        ({"full_is_faster": True}, "full"),
        ({"full_is_faster": True, "compiled": False}, "full"),
    ],
)
def test_backend_for(change, backend):
    query = {"weight": WEIGHT, "rows": 1, "candidates": 10, "compiled": True, "full_is_faster": False}
    assert backend_for(**query | change) == backend


@pytest.mark.parametrize("faster", ["screen", "full"])
def test_the_faster_answers(monkeypatch, faster):
    """An SVD screen of one coordinate is often wrong; the full layer never is, and certifies."""
    times = plan(1.0, 2.0) if faster == "screen" else plan(2.0, 1.0)
    monkeypatch.setattr(screen_rows, "measure_plan", lambda *_: times)
    weight, hidden = head()
    truth = (hidden @ weight.T).topk(5).indices
    for use in ("fastest", "screen", "full"):
        layer = ScreenedSoftmax(weight, preview=SVDPreview(1), candidates=20, use=use)
        answers = faster if use == "fastest" else use
        answer = layer.topk(hidden, 5)
        assert torch.equal(answer.indices, truth) == (answers == "full")
        assert bool(answer.certified.all()) == (answers == "full")
        exact = torch.allclose(layer.log_prob(hidden), (hidden @ weight.T).log_softmax(-1), atol=1e-5)
        assert exact == (answers == "full")


@pytest.mark.parametrize(("setting", "value"), [("candidates", 300), ("exact", True)])
def test_a_changed_setting_is_measured_anew(monkeypatch, setting, value):
    monkeypatch.setattr(screen_rows, "measure_plan", lambda *_: plan(1.0, 2.0))
    weight, hidden = head()
    layer = ScreenedSoftmax(weight, preview=SVDPreview(1), candidates=20)
    monkeypatch.setattr(screen_rows, "measure_plan", lambda *_: plan(2.0, 1.0))
    assert layer.plan() == plan(1.0, 2.0)
    setattr(layer, setting, value)
    assert layer.plan() == plan(2.0, 1.0)
    with pytest.warns(RuntimeWarning, match="the full layer is faster"):
        assert bool(layer.topk(hidden, 5).certified.all())


@pytest.mark.parametrize(("candidates", "error"), [(0, ValueError), (3001, ValueError), (2.5, TypeError)])
def test_bad_candidates_change_nothing(candidates, error):
    layer = ScreenedSoftmax(head()[0], preview=Int8Preview(), candidates=20)
    with pytest.raises(error, match="candidates"):
        layer.candidates = candidates
    assert layer.candidates == 20


def test_batches_between_those_measured():
    rows = tuple(Planned(batch, 1.0, 2.0, "screen") for batch in BATCHES)
    found = [Plan(rows).of(batch).batch for batch in (1, 2, 3, 8, 22, 23, 64, 1000)]
    assert found == [1, 1, 8, 8, 8, 64, 64, 64]


@pytest.mark.measured_plan
def test_a_measured_plan():
    weight, hidden = head()
    layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=20, exact=True)
    assert [row.batch for row in layer.plan()] == list(BATCHES)
    for row in layer.plan():
        assert row.screen_ms > 0
        assert row.answers == ("screen" if row.screen_ms <= row.full_ms else "full")
    assert str(layer.plan()).count("\n") == 3
    assert torch.equal(layer.topk(hidden, 5).indices, (hidden @ weight.T).topk(5).indices)


def test_a_slow_first_call_does_not_decide():
    seconds = iter([0.2, *[0.0] * 100])
    found = measure_plan(lambda rows: time.sleep(next(seconds)), lambda rows: time.sleep(0.01), torch.randn(64, 2))
    assert [row.answers for row in found] == ["screen"] * len(BATCHES)


def test_measuring_takes_the_shortest_of_a_few_calls():
    calls = []
    found = measure_plan(lambda rows: calls.append(len(rows)), lambda rows: None, torch.randn(64, 2))
    assert [row.batch for row in found] == list(BATCHES)
    assert sorted(set(calls)) == list(BATCHES)
    assert len(calls) <= 9


def test_rows_that_need_the_full_layer_all_the_same():
    """A screen that proves nothing of flat rows costs the full layer and itself: it is left, and tried again."""
    tally, planned = Tally(), Planned(1, 1.0, 4.0, "screen")
    assert not tally.full_is_faster(planned)
    tally.add(1, 0)
    for _ in range(40):
        tally.add(1, 1)
    assert tally.full_is_faster(planned)
    for _ in range(40):
        tally.forget()
    assert not tally.full_is_faster(planned)
    tally.add(0, 0)


@pytest.mark.parametrize("rows", [1, 4])
def test_flat_rows_leave_the_screen(monkeypatch, rows):
    monkeypatch.setattr(screen_rows, "measure_plan", lambda *_: plan(1.0, 2.0))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2000, 32, generator=generator)
    layer = ScreenedSoftmax(weight, preview=SVDPreview(1), candidates=5, exact=True)
    if layer._engine() is None:
        pytest.skip("no compiled engine")
    backends = []
    for _ in range(60):
        backends.append(layer._backend(rows, "fastest"))
        layer.topk(torch.randn(rows, 32, generator=generator), 1)
    assert backends[0] == "compiled"
    assert "full" in backends


@pytest.mark.parametrize("use", ["auto", None, 3])
def test_bad_use(use):
    with pytest.raises(ValueError, match="use must be one of 'fastest', 'screen', 'full'"):
        ScreenedSoftmax(head()[0], preview=Int8Preview(), candidates=20, use=use)


def test_one_warning_where_the_screen_never_gains(monkeypatch):
    monkeypatch.setattr(screen_rows, "measure_plan", lambda *_: plan(2.0, 1.0))
    weight, hidden = head()
    layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=20)
    with pytest.warns(RuntimeWarning, match="the full layer is faster than this screen"):
        layer.topk(hidden, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.topk(hidden, 5)


def test_no_warning_where_it_gains_or_was_not_asked(monkeypatch, recwarn):
    weight, hidden = head()
    for times, use in ((plan(1.0, 2.0), "fastest"), (plan(2.0, 1.0), "full"), (plan(2.0, 1.0), "screen")):
        monkeypatch.setattr(screen_rows, "measure_plan", lambda *_, times=times: times)
        layer = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=20, use=use)
        layer.topk(hidden, 5)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]

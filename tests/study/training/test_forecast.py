"""The forecast of a run is the sum of its parts, each at its measured rate."""

from collections import Counter

import pytest
import torch

from lastlayer import FullSoftmax
from lastlayer.study.measuring import cost
from lastlayer.study.measuring.cost import Sample, measure_costs, rehearse_costs
from lastlayer.study.text.batches import Streams
from lastlayer.study.training.forecast import Rehearsal, forecast
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import CURVE_AT, CURVE_TOKENS, Budget, Trainer

NOTHING = Rehearsal(0, 0, 0, 0, 0, 0)
PLENTY = 10**9


@pytest.mark.parametrize(
    ("part", "budget", "times"),
    [
        ("build", Budget(seconds=7), 1),
        ("measure", Budget(seconds=7), 1),
        ("step", Budget(steps=400), 400),
        ("step", Budget(seconds=7), 0),  # the time itself is the budget
        ("save", Budget(seconds=60), 11),  # one a point of the curve, and the last
        ("save", Budget(seconds=300), 11 + 8),  # and one in each of the eight stretches of 24 to 39 s
        ("evaluate", Budget(seconds=7), 10 * 4_000 + 30_000),
        ("accuracy", Budget(seconds=7), 2_000),
    ],
)
def test_each_part_counts_as_often_as_it_is_done(part, budget, times):
    rehearsal = NOTHING._replace(**{part: 1.0})
    assert forecast(rehearsal, budget, PLENTY, 30_000, 2_000) == pytest.approx((budget.seconds or 0) + times)


def test_short_held_out_text_is_read_as_often_but_not_longer():
    evaluated = forecast(NOTHING._replace(evaluate=1.0), Budget(steps=1), 500, 30_000, 2_000)
    assert evaluated == 10 * 500 + 500
    assert forecast(NOTHING._replace(accuracy=1.0), Budget(steps=1), 500, 30_000, 2_000) == 500


def test_training_does_what_the_forecast_counts(monkeypatch, tmp_path):
    done = Counter()

    def counting(name):
        plain = getattr(Trainer, name)
        monkeypatch.setattr(Trainer, name, lambda self: done.update([name]) or plain(self))

    for name in ("_step", "_add_point", "save"):
        counting(name)
    torch.manual_seed(0)
    words = torch.randint(20, (400,))
    streams = [Streams(words, rows, 5, torch.device("cpu")) for rows in (4, 2)]
    model = LanguageModel(20, FullSoftmax(8, 20))
    Trainer(model, *streams, Budget(steps=40), learning_rate=0.1, path=tmp_path / "c.safetensors").run()
    assert done == {"_step": 40, "_add_point": len(CURVE_AT), "save": len(CURVE_AT)}
    assert CURVE_TOKENS == 4_000


def test_rehearsing_the_measuring_counts_its_calls(monkeypatch):
    """With a clock that ticks once for each call of the layer, the forecast is what is then done."""
    ticks = Counter()
    layer = FullSoftmax(8, 50)
    plain_loss, plain_topk = layer.forward, layer.topk
    monkeypatch.setattr(layer, "forward", lambda *a: ticks.update(["clock"]) or plain_loss(*a))
    monkeypatch.setattr(layer, "topk", lambda *a: ticks.update(["clock"]) or plain_topk(*a))

    def seconds_of(call):
        before = ticks["clock"]
        call()
        return ticks["clock"] - before

    monkeypatch.setattr(cost, "seconds_of", seconds_of)
    sample = Sample(torch.randn(6, 8), torch.randint(50, (6,)))
    expected = rehearse_costs(layer, sample, 3)
    ticks.clear()
    measure_costs({"full": layer}, {"full": sample}, 3)
    assert expected == ticks["clock"]

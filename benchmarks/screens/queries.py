"""SmolLM2's head: top-10 at batch 1, 8 and 64, agreement on 4,096 held-out queries, preparation, memory."""

import time
from collections.abc import Callable
from statistics import mean

import torch.nn.functional as F
from torch import Tensor

from lastlayer import ScreenedSoftmax
from lastlayer.study.measuring.measure import peak_bytes
from screens.common import (
    HELD_OUT,
    K,
    Record,
    Truth,
    agreement,
    exact_screen,
    exact_screen_in_four,
    full_layers,
    measured,
    real_head,
    svd_screen,
)

PROVED = 128  # queries whose proof is looked at
EXACT, FOUR = "int8, exact", "int4, exact"
ROUNDS = {(1, 5): 41, (1, 60): 15, (8, 1): 21, (64, 1): 11}  # by batch and calls in a row


def queries(num_queries: int = HELD_OUT) -> list[Record]:
    """The must-reach table's first rows; agreement of the first `num_queries` of the held-out queries."""
    weight, calibration, held_out = real_head()
    width = weight.shape[-1]
    makers: dict[str, Callable[[], ScreenedSoftmax]] = {
        EXACT: lambda: exact_screen(weight),
        FOUR: lambda: exact_screen_in_four(weight, calibration),
        "SVD d/8, 1,024 candidates, calibrated": lambda: svd_screen(
            weight, width // 8, 1024, calibration=calibration
        ),
        "SVD d/8, 1,024 candidates, plain": lambda: svd_screen(weight, width // 8, 1024),
    }
    screens, records = {}, []
    truth = Truth.of(weight, held_out[:num_queries])
    for name, make in makers.items():
        start = time.perf_counter()
        screens[name] = make()  # a calibrated one sums up its calibration data here
        records.append({"case": "prepare", "name": name, "seconds": time.perf_counter() - start})
        start = time.perf_counter()
        screens[name].topk(held_out[:1], K)
        records.append({"case": "first query", "name": name, "ms": 1e3 * (time.perf_counter() - start)})
        records += [{"case": "plan", "name": name, **row._asdict()} for row in screens[name].plan()]
        records.append({"name": name, **agreement(screens[name], truth)})
    records += [{"name": name, **proof(screens[name], truth)} for name in (EXACT, FOUR)]
    records += [{"name": name, **memory(screens[name], held_out[:1])} for name in (EXACT, FOUR)]
    del screens["SVD d/8, 1,024 candidates, plain"]  # takes the time of the calibrated one
    peers = full_layers(weight) | {
        name: lambda hidden, screen=screen: screen.topk(hidden, 10) for name, screen in screens.items()
    }
    previews = {name: screen._prepared.bytes_read for name, screen in screens.items()}
    for (batch, in_a_row), rounds in ROUNDS.items():
        records += measured(peers, held_out, batch, rounds, previews, in_a_row)
    return records


def proof(screen: ScreenedSoftmax, truth: Truth) -> Record:
    """Classes that the bound leaves in play for the top 10; errors of log-probabilities, real and proved."""
    in_play, real, proved = [], [], []
    for row, values in zip(truth.hidden[:PROVED].split(1), truth.values, strict=False):
        upper = screen.preview_scores(row) + screen._prepared.error(row).all()
        in_play.append(int((upper >= values[-1]).sum()))
        result, full = screen.topk(row, K), F.linear(row, truth.weight).log_softmax(-1)
        real.append(float((result.log_prob - full.gather(-1, result.indices)).abs().max()))
        proved.append(float(screen.log_normalizer_error(row)))
    means = {"classes_in_play": mean(in_play), "log_prob_error": mean(real), "log_prob_error_proved": mean(proved)}
    return {"case": "proof", "queries": len(real), **means, "log_prob_error_at_most": max(real)}


def memory(screen: ScreenedSoftmax, row: Tensor) -> Record:
    """What one query holds beyond the screen itself."""
    screen.topk(row, 10)
    most = max(peak_bytes(lambda: screen.topk(row, 10)) for _ in range(5))
    return {"case": "memory", "peak_bytes": most, "float32_numbers_a_class": most / 4 / screen.out_features}

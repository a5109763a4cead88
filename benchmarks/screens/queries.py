"""SmolLM2's head: top-10 at batch 1, 8 and 64, agreement on 4,096 held-out queries, preparation, memory."""

import time
from collections.abc import Callable

from torch import Tensor

from lastlayer import ScreenedSoftmax
from lastlayer.study.measure import peak_bytes
from screens.common import (
    HELD_OUT,
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

EXACT, FOUR = "int8, exact", "int4, exact"
ROUNDS = {(1, 5): 41, (1, 60): 15, (8, 1): 21, (64, 1): 11}  # by batch and calls in a row


def queries(asked: int = HELD_OUT) -> list[Record]:
    """The must-reach table's first rows; agreement of the first `asked` of the held-out queries."""
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
    for name in (EXACT, FOUR):  # kernels are compiled, or read from numba's cache
        makers[name]().topk(held_out[:1], 10)
    screens, records = {}, []
    truth = Truth.of(weight, held_out[:asked])
    for name, make in makers.items():
        start = time.perf_counter()
        screens[name] = make()  # a calibrated one sums up its calibration data here
        records.append({"case": "prepare", "name": name, "seconds": time.perf_counter() - start})
        records.append({"name": name, **agreement(screens[name], truth)})
    records += [{"name": name, **memory(screens[name], held_out[:1])} for name in (EXACT, FOUR)]
    del screens["SVD d/8, 1,024 candidates, plain"]  # takes the time of the calibrated one
    peers = full_layers(weight) | {
        name: lambda hidden, screen=screen: screen.topk(hidden, 10) for name, screen in screens.items()
    }
    previews = {name: screen._prepared.bytes_read for name, screen in screens.items()}
    for (batch, in_a_row), rounds in ROUNDS.items():
        records += measured(peers, held_out, batch, rounds, previews, in_a_row)
    return records


def memory(screen: ScreenedSoftmax, row: Tensor) -> Record:
    """What one query holds beyond the screen itself."""
    screen.topk(row, 10)
    most = max(peak_bytes(lambda: screen.topk(row, 10)) for _ in range(5))
    return {"case": "memory", "peak_bytes": most, "float32_numbers_a_class": most / 4 / screen.out_features}

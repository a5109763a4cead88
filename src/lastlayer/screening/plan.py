"""The plan of a screen: its time and the full layer's, measured when it is prepared, and which of them is used."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lastlayer.kernels.screening import NUMBER_TYPES
from lastlayer.screening.calibration import SecondMoment

Backend = Literal["full", "compiled", "plain"]
Use = Literal["fastest", "screen", "full"]
USES = ("fastest", "screen", "full")

BATCHES = (1, 8, 64)
ENDS = (2, 22)  # the largest batches that the first two of them stand for, in equal ratios
ROUNDS = 3
LONG = 0.05  # seconds; what takes longer is measured twice: the first call also fills caches and starts threads
REMEMBERED = 32  # rows over which the share of rows that needed the full layer is averaged
FORGOTTEN = 0.98  # of that share, with every row that the full layer computed instead
MOST_WIDTH = 8192  # up to which no 32-bit sum of products of a hidden state's whole numbers overflows


class Planned(NamedTuple):
    """What was measured for one batch size."""

    batch: int
    screen_ms: float
    full_ms: float
    answers: str  # "screen" or "full"


@dataclass(frozen=True)
class Plan:
    """Which of the two is used, by batch size; printed, a table."""

    rows: tuple[Planned, ...]

    def of(self, batch: int) -> Planned:
        """What was measured for the batch size nearest to `batch`."""
        return self.rows[sum(batch > end for end in ENDS)]

    @property
    def gains(self) -> bool:
        """Whether the screen is the faster one for any batch size."""
        return any(row.answers == "screen" for row in self.rows)

    def __iter__(self) -> Iterator[Planned]:
        return iter(self.rows)

    def __str__(self) -> str:
        lines = [f"{'batch':>5} {'screen ms':>10} {'full ms':>10}  answers"]
        lines += [
            f"{row.batch:>5} {row.screen_ms:>10.3f} {row.full_ms:>10.3f}  {row.answers}" for row in self.rows
        ]
        return "\n".join(lines)


def measure_plan(
    screen: Callable[[Tensor], object],
    full: Callable[[Tensor], object],
    states: Tensor,  # (n, d), n >= the largest batch
) -> Plan:
    """Times both for every batch size, in turn; the shortest of a few calls each, on other hidden states each."""
    rows = []
    for batch in BATCHES:
        seconds = [float("inf"), float("inf")]
        for turn in range(ROUNDS):
            start = turn * batch % (len(states) - batch + 1)
            some = states[start : start + batch]
            seconds = [min(best, _seconds(call, some)) for best, call in zip(seconds, (screen, full), strict=True)]
            if turn and max(seconds) > LONG:
                break
        of_screen, of_full = (1e3 * best for best in seconds)
        rows.append(Planned(batch, of_screen, of_full, "screen" if of_screen <= of_full else "full"))
    return Plan(tuple(rows))


def _seconds(call: Callable[[Tensor], object], states: Tensor) -> float:
    start = time.perf_counter()
    call(states)
    if states.is_cuda:
        torch.cuda.synchronize(states.device)
    return time.perf_counter() - start


def likely_states(
    weight: Tensor,  # (V, d)
    moment: SecondMoment | None,
) -> Tensor:  # (64, d), in the weight's dtype
    """Hidden states to measure with: with the calibration's second moment, or without one, rows of the weight."""
    count, generator = BATCHES[-1], torch.Generator("cpu").manual_seed(0)
    if moment is None:
        at = torch.randint(len(weight), (count,), generator=generator, device="cpu")
        return weight[at.to(weight.device)].detach().clone()
    values, vectors = torch.linalg.eigh(moment.moment.double().cpu())
    normal = torch.randn(count, len(values), generator=generator, dtype=torch.float64, device="cpu")
    return ((normal * values.clamp(min=0).sqrt()) @ vectors.T).to(weight.dtype).to(weight.device)


class Tally:
    """The share of recent rows that the screen could not settle, so that the full layer ran after it."""

    def __init__(self) -> None:
        self._share, self._rows = 0.0, 0

    def add(self, rows: int, unsettled: int) -> None:
        """Counts the rows of a query that the screen computed."""
        if not rows:
            return
        self._rows = min(REMEMBERED, self._rows + rows)
        self._share += (unsettled / rows - self._share) * min(1.0, rows / self._rows)

    def forget(self) -> None:
        """Counts a query that the full layer computed, so that the screen is tried again later."""
        self._share *= FORGOTTEN

    def full_is_faster(self, planned: Planned) -> bool:
        """Whether the screen, and the full layer after it for that share of rows, take longer than it alone."""
        return planned.screen_ms + self._share * planned.full_ms > planned.full_ms


def backend_for(
    weight: Tensor,  # (V, d)
    *,
    rows: int,
    candidates: int,
    compiled: bool,
    full_is_faster: bool,
) -> Backend:
    """What computes the results: the full layer, the screen by the compiled engine, or it in plain PyTorch.

    Args:
        weight: of the layer that is screened.
        rows: hidden states in the query.
        candidates: of the screen.
        compiled: whether the compiled engine is there, and knows the preview.
        full_is_faster: what the screen's plan says for so many rows.

    >>> import torch
    >>> screen = {"candidates": 32, "compiled": True, "full_is_faster": False}
    >>> backend_for(torch.zeros(50_000, 64), rows=1, **screen)
    'compiled'
    >>> backend_for(torch.zeros(50_000, 64), rows=2000, **screen)  # the candidates' rows are more than all rows
    'full'
    """
    if full_is_faster or rows * candidates >= len(weight):
        return "full"
    return "compiled" if compiled and engine_takes(weight) else "plain"


def engine_takes(weight: Tensor) -> bool:
    """Whether the compiled engine takes a weight: float32 or shorter, on a CPU, rows one after another."""
    as_it_is = weight.is_cpu and weight.is_contiguous() and not weight.is_neg()
    return as_it_is and weight.dtype in NUMBER_TYPES and weight.shape[1] <= MOST_WIDTH

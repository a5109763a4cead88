"""What `exclude` costs a screened query: 100 ids a row, the very best or any, against none; and how many classes
get exact logits.

python benchmarks/exclusions.py [--seconds 5]
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.kernels.screening import Query
from lastlayer.screening.compiled import EngineScreen
from lastlayer.screening.preview import Preview
from lastlayer.screening.screen import Head, Limits
from lastlayer.study.measuring.measure import Timing, write_records

RESULTS = Path(__file__).parent / "results" / "exclusions.json"
CLASSES, IN_FEATURES, EXCLUDED, K, CANDIDATES = 100_000, 256, 100, 10, 256
ROWS = (1, 8, 64)
LEAST_ROUNDS = 5
NOTES = (
    f"top {K} with {CANDIDATES} candidates; processor time of one thread; rescored: classes a row that got exact "
    f"logits. 'none, k + {EXCLUDED}' is the query for the best {K + EXCLUDED}, from which a caller would take the "
    "excluded ids"
)


class Case(NamedTuple):
    """One kind of query."""

    k: int
    exclude: Tensor | None  # (N, EXCLUDED)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description="What exclude costs a screened query.")
    parser.add_argument("--seconds", type=float, default=5.0, help="for one preview and number of rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spectrum = torch.arange(1, IN_FEATURES + 1) ** -0.5  # as of trained weights, for the preview by SVD
    weight = torch.randn(CLASSES, IN_FEATURES) * spectrum
    states = torch.randn(4096, IN_FEATURES) * spectrum
    previews: dict[str, Preview] = {
        "Int8Preview": Int8Preview(),
        "Int4Preview": Int4Preview(calibration=states),
        "SVDPreview(64)": SVDPreview(64, calibration=states),
    }
    records = []
    for name, preview in previews.items():
        screen = ScreenedSoftmax(weight, preview=preview, candidates=CANDIDATES, use="screen")
        counter = Counter(weight, preview)
        for exact in (True, False):
            for rows in ROWS:
                measured = cases(weight, states[:rows])
                timings = interleaved(screen, states[:rows], exact, measured, arguments.seconds)
                rescored = {kind: counter.rescored(states[:rows], exact, case) for kind, case in measured.items()}
                records += as_records({"preview": name, "exact": exact, "batch": rows}, timings, rescored)
    write_records(RESULTS, records, notes=NOTES)


def cases(weight: Tensor, hidden: Tensor) -> dict[str, Case]:
    """Nothing excluded, any ids, the best ones; and the query that would find the same without `exclude`."""
    best = (hidden @ weight.T).topk(EXCLUDED).indices
    return {
        "none": Case(K, None),
        "any": Case(K, torch.randint(CLASSES, best.shape)),
        "the best": Case(K, best),
        f"none, k + {EXCLUDED}": Case(K + EXCLUDED, None),
    }


def interleaved(
    screen: ScreenedSoftmax, hidden: Tensor, exact: bool, measured: dict[str, Case], seconds: float
) -> dict[str, Timing]:
    """Processor time of the queries in turn, in an order that changes, until `seconds` have passed."""
    took: dict[str, list[float]] = {kind: [] for kind in measured}
    end, turn, kinds = time.perf_counter() + seconds, 0, list(measured)
    while turn <= LEAST_ROUNDS or time.perf_counter() < end:
        first = turn % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            k, exclude = measured[kind]
            start = time.process_time()
            screen.topk(hidden, k, exact, exclude=exclude)
            if turn:  # the first one fills caches
                took[kind].append(time.process_time() - start)
        turn += 1
    return {kind: Timing.of(times) for kind, times in took.items()}


class Counter:
    """Counts the classes whose score was replaced by an exact logit."""

    def __init__(self, weight: Tensor, preview: Preview) -> None:
        head, prepared = Head(weight, None), preview.prepare(weight, None)
        self.engine = EngineScreen(head, prepared, Limits.of(head, prepared))

    def rescored(self, hidden: Tensor, exact: bool, case: Case) -> float:
        """Of a row, on average."""
        found, _ = self.engine.query(hidden, Query(case.k, CANDIDATES, exact, case.exclude))
        return (found.logits != self.engine.scores(hidden)).sum(-1).double().mean().item()


def as_records(
    common: dict[str, Any], timings: dict[str, Timing], rescored: dict[str, float]
) -> list[dict[str, Any]]:
    """Printed as well."""
    records = []
    for kind, timing in timings.items():
        ratio = timing.ms / timings["none"].ms
        exact = "exact, " if common["exact"] else ""
        print(
            f"{common['preview']}, {exact}{common['batch']} rows, {kind}: {timing.ms:.3f} ms, {ratio:.3f}, "
            f"{rescored[kind]:.0f} rescored",
            flush=True,
        )
        records.append(
            {
                **common,
                "excluded": kind,
                "num_classes": CLASSES,
                "in_features": IN_FEATURES,
                "ms": round(timing.ms, 3),
                "low_ms": round(timing.low_ms, 3),
                "high_ms": round(timing.high_ms, 3),
                "ratio_to_none": round(ratio, 3),
                "rescored": round(rescored[kind]),
            }
        )
    return records


if __name__ == "__main__":
    main()

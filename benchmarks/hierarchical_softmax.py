"""A whole training step (forward, backward, SGD) of HierarchicalSoftmax(sparse=True) against all logits.

python benchmarks/hierarchical_softmax.py [--rounds 9] [--results PATH]

Three cases: the Keras thread's own (V=100,000, N=1000, d=500, uniform targets), a grid of small sizes, and the
growth with V up to a million at small N. The gradient of the hidden states is formed too, as under a network.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer import HierarchicalSoftmax
from lastlayer.study.measuring.measure import interleaved, peak_bytes, write_records

RESULTS = Path(__file__).parent / "results" / "hierarchical_softmax.json"
IN_FEATURES = 500
FULL, TWO_LEVEL = "nn.Linear + F.cross_entropy", "HierarchicalSoftmax(sparse=True)"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rounds = arguments.rounds
    torch.manual_seed(0)
    records = compare("Keras thread", 100_000, 1000, rounds, memory=True)
    for num_classes in (1000, 4000, 16_000):
        for rows in (1, 16, 128, 1024):
            quick = num_classes * rows <= 1_000_000
            records += compare(
                "small sizes", num_classes, rows, 5 * rounds if quick else rounds, repeats=8 if quick else 1
            )
    for rows in (1, 16):
        for num_classes in (1000, 10_000, 100_000, 1_000_000):
            peers = {TWO_LEVEL: two_level_step(num_classes, rows)}
            timing = interleaved(peers, rounds=5 * rounds, repeats=4)[TWO_LEVEL]
            records.append(
                record("growth with V", TWO_LEVEL, num_classes, rows, timing.ms, timing.low_ms, timing.high_ms)
            )
    for line in records:
        print("  ".join(f"{key}={value}" for key, value in line.items()))
    write_records(arguments.results, records, notes="forward + backward + torch.optim.SGD step, uniform targets")


def compare(
    case: str, num_classes: int, rows: int, rounds: int, repeats: int = 1, memory: bool = False
) -> list[dict[str, Any]]:
    """Both peers, interleaved."""
    peers = {FULL: full_step(num_classes, rows), TWO_LEVEL: two_level_step(num_classes, rows)}
    timings = interleaved(peers, rounds=rounds, repeats=repeats)
    records = []
    for name, timing in timings.items():
        line = record(case, name, num_classes, rows, timing.ms, timing.low_ms, timing.high_ms)
        line["times_faster"] = round(timings[FULL].ms / timing.ms, 2)
        if memory:
            line["peak_bytes"] = peak_bytes(peers[name])
        records.append(line)
    return records


def record(
    case: str, name: str, num_classes: int, rows: int, ms: float, low: float, high: float
) -> dict[str, Any]:
    """One flat record."""
    sizes = {"num_classes": num_classes, "in_features": IN_FEATURES, "batch": rows}
    return {"case": case, "name": name, **sizes, "ms": ms, "low_ms": low, "high_ms": high}


def full_step(num_classes: int, rows: int) -> Callable[[], None]:
    """The peer: all logits."""
    linear = nn.Linear(IN_FEATURES, num_classes)
    return step_of(linear, lambda hidden, targets: F.cross_entropy(linear(hidden), targets), num_classes, rows)


def two_level_step(num_classes: int, rows: int) -> Callable[[], None]:
    """Two levels, gradients of the touched rows only."""
    layer = HierarchicalSoftmax(IN_FEATURES, num_classes, sparse=True)
    return step_of(layer, layer, num_classes, rows)


def step_of(
    module: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], num_classes: int, rows: int
) -> Callable[[], None]:
    """One training step on random rows."""
    hidden = torch.randn(rows, IN_FEATURES, requires_grad=True)
    targets = torch.randint(num_classes, (rows,))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    def step() -> None:
        hidden.grad = None
        optimizer.zero_grad()
        loss(hidden, targets).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()

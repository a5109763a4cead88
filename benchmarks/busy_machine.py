"""A training step on one thread and on two, with nothing beside it and with a spinning process for each processor.

python benchmarks/busy_machine.py [--num-classes V] [--seconds S] [--layers NAME ...] [--results PATH]

Every layer and number of threads runs in turn for a fraction of a second, so that a disturbance meets all alike.
A pass is forward and backward; a step is these and SGD, whose operations are PyTorch's.
"PyTorch" is `nn.Linear` and `F.cross_entropy`, for comparison.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lastlayer import (
    AdaptiveSoftmax,
    FactoredOutput,
    FactoredSGD,
    HierarchicalSoftmax,
    SampledSoftmax,
    SquaredError,
    TreeSoftmax,
    Uniform,
)
from lastlayer.study.measuring.measure import Timing, write_records

RESULTS = Path(__file__).parent / "results" / "busy_machine.json"
IN_FEATURES, BATCH, BATCHES, RATE = 300, 128, 16, 1e-3
TURN_SECONDS = 0.3
SPIN = "while True: pass"

Step = Callable[[], float]
Times = dict[tuple[str, int], list[tuple[float, float]]]  # of layer and threads: seconds of passes and of steps


def steps(num_classes: int) -> dict[str, Callable[[], tuple[nn.Module, torch.optim.Optimizer]]]:
    """How to make each layer, with its optimizer."""

    def sgd(layer: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        return layer, torch.optim.SGD(layer.parameters(), lr=RATE)

    def factored() -> tuple[nn.Module, torch.optim.Optimizer]:
        layer = FactoredOutput(IN_FEATURES, num_classes, loss=SquaredError())
        return layer, FactoredSGD(layer, RATE)

    sampler = Uniform(num_classes)
    return {
        "FactoredOutput": factored,
        "HierarchicalSoftmax": lambda: sgd(HierarchicalSoftmax(IN_FEATURES, num_classes, sparse=True)),
        "TreeSoftmax": lambda: sgd(TreeSoftmax(IN_FEATURES, num_classes, sparse=True)),
        "AdaptiveSoftmax": lambda: sgd(AdaptiveSoftmax(IN_FEATURES, num_classes)),
        "SampledSoftmax": lambda: sgd(SampledSoftmax(IN_FEATURES, num_classes, sampler, 1000, sparse=True)),
        "PyTorch": lambda: sgd(nn.Linear(IN_FEATURES, num_classes)),
    }


def step_of(layer: nn.Module, optimizer: torch.optim.Optimizer, num_classes: int) -> Step:
    """One step, on other targets each time; it returns the seconds of its pass."""
    targets = torch.randint(num_classes, (BATCHES, BATCH))
    hidden = torch.randn(BATCH, IN_FEATURES).requires_grad_()
    turn = iter(range(10**9))

    def step() -> float:
        start = time.perf_counter()
        own = targets[next(turn) % BATCHES]
        hidden.grad = None
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(hidden), own) if isinstance(layer, nn.Linear) else layer(hidden, own)
        loss.backward()
        seconds = time.perf_counter() - start
        optimizer.step()
        return seconds

    return step


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """So many processes that do nothing but use their processor."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(calls: dict[str, Step], seconds: float) -> Times:
    """The times of each layer on one thread and on two, in turns."""
    found: Times = {(name, threads): [] for name in calls for threads in (1, 2)}
    end = time.perf_counter() + seconds * len(found)
    while time.perf_counter() < end:
        for (name, threads), times in found.items():
            torch.set_num_threads(threads)
            calls[name]()  # not counted: the threads start
            until = time.perf_counter() + TURN_SECONDS
            while time.perf_counter() < until:
                start = time.perf_counter()
                of_pass = calls[name]()
                times.append((of_pass, time.perf_counter() - start))
    return found


def records_of(case: str, found: Times, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """A record of each layer and number of threads; those `of_one_thread` compare the means."""
    means = {key: [statistics.fmean(part) for part in zip(*times, strict=True)] for key, times in found.items()}
    records = []
    for (name, threads), times in found.items():
        of_pass, of_step = means[name, threads]
        timing = Timing.of([step for _, step in times])
        records.append(
            {
                "case": case,
                "name": name,
                "threads": threads,
                **sizes,
                "ms": timing.ms,
                "low_ms": timing.low_ms,
                "high_ms": timing.high_ms,
                "mean_ms": 1e3 * of_step,
                "mean_pass_ms": 1e3 * of_pass,
                "most_ms": 1e3 * max(step for _, step in times),
                "steps": timing.runs,
                "step_of_one_thread": of_step / means[name, 1][1],
                "pass_of_one_thread": of_pass / means[name, 1][0],
            }
        )
    return records


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--num-classes", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each layer, number of threads and case")
    parser.add_argument("--layers", nargs="*", default=None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.manual_seed(0)
    made = steps(given.num_classes)
    names = given.layers or list(made)
    calls = {name: step_of(*made[name](), given.num_classes) for name in names}
    sizes = {"num_classes": given.num_classes, "in_features": IN_FEATURES, "batch": BATCH}
    records = records_of("quiet", measure(calls, given.seconds), sizes)
    processors = len(os.sched_getaffinity(0))
    with spinning(processors):
        records += records_of("busy", measure(calls, given.seconds), sizes)
    for record in records:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
    notes = (
        f"busy: {processors} spinning processes beside it; of_one_thread: the means against those on one thread"
    )
    write_records(given.results, records, notes=notes)


if __name__ == "__main__":
    main()

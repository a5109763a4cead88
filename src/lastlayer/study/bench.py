"""One run of every layer and of PyTorch's own, interleaved: training steps and top-k queries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lastlayer.functional.sampling import sample_classes
from lastlayer.study.choices import CHOICES, build_layer
from lastlayer.study.errors import UsageError
from lastlayer.study.measuring.measure import interleaved, peak_bytes, seconds_of
from lastlayer.study.measuring.memory import require_memory
from lastlayer.study.measuring.peers import (
    QUERY_BASELINE,
    TRAINING_BASELINE,
    Call,
    query_peers,
    training_peers,
    zipf_counts,
)
from lastlayer.study.report.tables import show

MIN_ROUNDS, MAX_ROUNDS = 3, 25
FIELDS = ("name", "ms", "low_ms", "high_ms", "ratio_to_full", "peak_bytes", "num_classes", "in_features", "batch")


@dataclass(frozen=True)
class Sizes:
    """The sizes at which every peer is measured."""

    num_classes: int  # V
    in_features: int  # d
    batch: int  # N
    k: int  # classes a query returns


@dataclass(frozen=True)
class Case:
    """Peers that do the same job; `baseline` is what their ratios are taken to."""

    name: str
    meaning: str
    baseline: str
    batch: int
    peers: dict[str, Call]


def run_bench(
    sizes: Sizes, layers: list[str], seconds: float, seed: int, device: torch.device
) -> list[dict[str, Any]]:
    """Measures every case for about `seconds`, prints a table of each, and returns the records.

    Args:
        sizes: V, d, N and k.
        layers: names of `study.choices`.
        seconds: about how long each of the three cases may take.
        seed: of weights, hidden states and targets.
        device: where to compute.

    Raises:
        UsageError: `k` is above V; all of it would need more memory than is free.
    """
    if sizes.k > sizes.num_classes:
        raise UsageError(f"--k must be at most --num-classes {sizes.num_classes}, got {sizes.k}")
    console = Console()
    _check_memory(sizes, layers, device)
    console.print(f"three cases, about {seconds:g} s each at the least", highlight=False)
    torch.manual_seed(seed)
    records = []
    for case in _cases(sizes, layers, device):
        with console.status(f"{case.name}: {case.meaning}"):
            rows = _measure(case, sizes, seconds)
        show(console, case.meaning, rows, FIELDS)
        records += rows
    return records


def _check_memory(sizes: Sizes, layers: list[str], device: torch.device) -> None:
    """Refuses sizes that do not fit, before anything is made: all layers are held at once."""
    weight = 4 * sizes.num_classes * sizes.in_features
    weights = 1 + 1 + sum(0.2 if name == "adaptive" else 1 for name in layers)  # the plain layer, and a gradient
    screens = 0.5 * weight  # in 8 bits, and an eighth of the width twice
    held = max(3, *(CHOICES[name].logits for name in layers))  # logits, their softmax and gradient at the least
    logits = held * 4 * sizes.batch * sizes.num_classes
    needed = round(weights * weight + screens + logits + 40 * sizes.num_classes)  # counts, targets, orders
    sides = f"V={sizes.num_classes:,} d={sizes.in_features:,} N={sizes.batch:,}"
    require_memory(needed, device, sides, "fewer --layers or --num-classes")


def _cases(sizes: Sizes, layers: list[str], device: torch.device) -> Iterator[Case]:
    """Each made when it is its turn, so that what one case holds is free before the next."""
    hidden = torch.randn(sizes.batch, sizes.in_features, device=device)
    counts = zipf_counts(sizes.num_classes)
    targets = sample_classes(counts.double().log()[None], sizes.batch)[0].to(device)
    linear = nn.Linear(sizes.in_features, sizes.num_classes, device=device)
    made = {name: build_layer(name, sizes.in_features, counts, sizes.batch).to(device) for name in layers}
    yield Case(
        "training",
        "forward, backward and SGD step",
        TRAINING_BASELINE,
        sizes.batch,
        training_peers(linear, made, hidden, targets),
    )
    for name, rows in (("query", hidden), ("single query", hidden[:1])):
        meaning = f"the {sizes.k} best classes of every row"
        yield Case(name, meaning, QUERY_BASELINE, len(rows), query_peers(linear, made, rows, sizes.k))


def _measure(case: Case, sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    """Records of one case, quickest first."""

    def all_once() -> None:
        for call in case.peers.values():
            call()

    all_once()
    once = seconds_of(all_once)
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / once)))
    timings = interleaved(case.peers, rounds=rounds, warmup=0)
    full_ms = timings[case.baseline].ms
    records = [
        {
            "case": case.name,
            "name": name,
            "num_classes": sizes.num_classes,
            "in_features": sizes.in_features,
            "batch": case.batch,
            "ms": timing.ms,
            "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
            "rounds": timing.runs,
            "ratio_to_full": timing.ms / full_ms,
            "peak_bytes": peak_bytes(case.peers[name]),
        }
        for name, timing in timings.items()
    ]
    return sorted(records, key=lambda record: record["ms"])

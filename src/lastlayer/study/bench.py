"""One run of every layer and of PyTorch's own, interleaved: training steps and top-k queries."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.study.errors import UsageError
from lastlayer.study.measure import Timing, interleaved, peak_bytes, synchronise

MIN_ROUNDS, MAX_ROUNDS = 3, 25

Call = Callable[[], object]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is asked of every peer."""

    num_classes: int  # V
    in_features: int  # d
    batch: int  # N
    k: int  # classes a query asks for


@dataclass(frozen=True)
class Case:
    """Peers that do the same job; `baseline` is what their ratios are taken to."""

    name: str
    meaning: str
    baseline: str
    peers: dict[str, Call]


def run_bench(sizes: Sizes, seconds: float, seed: int, device: torch.device) -> list[dict[str, Any]]:
    """Measures every case for about `seconds`, prints a table of each, and returns the records."""
    if sizes.k > sizes.num_classes:
        raise UsageError(f"--k must be at most --num-classes {sizes.num_classes}, got {sizes.k}")
    console = Console()
    torch.manual_seed(seed)
    hidden = torch.randn(sizes.batch, sizes.in_features, device=device)
    targets = zipf_targets(sizes.num_classes, sizes.batch).to(device)
    records = []
    for case in (_training(sizes, hidden, targets), _query(sizes, hidden)):
        with console.status(f"{case.name}: {case.meaning}"):
            rows = _measure(case, sizes, seconds)
        console.print(_table(case, sizes, rows))
        records += [record for record, _ in rows]
    return records


def zipf_targets(num_classes: int, count: int) -> Tensor:  # (count,)
    """Class ids drawn as words are: id `i` with probability proportional to `1 / (i + 1)`."""
    weights = 1.0 / torch.arange(1, num_classes + 1, dtype=torch.float64)
    return torch.multinomial(weights, count, replacement=True)


def _training(sizes: Sizes, hidden: Tensor, targets: Tensor) -> Case:
    """Forward, backward and an SGD step of every layer."""
    d, V = sizes.in_features, sizes.num_classes
    linear = nn.Linear(d, V, device=hidden.device)
    losses: dict[str, tuple[nn.Module, Loss]] = {
        "F.linear + F.cross_entropy": (linear, lambda h, t: F.cross_entropy(linear(h), t))
    }
    for name, options in _linear_cross_entropy_settings():

        def loss(h: Tensor, t: Tensor, options: Any = options) -> Tensor:
            return F.linear_cross_entropy(h, linear.weight, t, linear_bias=linear.bias, options=options)

        losses[name] = (linear, loss)
    cutoffs = sorted({c for c in (V // 20, V // 4) if 0 < c < V})
    if cutoffs:
        adaptive = nn.AdaptiveLogSoftmaxWithLoss(d, V, cutoffs, device=hidden.device)
        losses["nn.AdaptiveLogSoftmaxWithLoss"] = (adaptive, lambda h, t: adaptive(h, t).loss)
    peers = {name: _step(module, loss, hidden, targets) for name, (module, loss) in losses.items()}
    return Case("training", "forward, backward and an SGD step", "F.linear + F.cross_entropy", peers)


def _linear_cross_entropy_settings() -> list[tuple[str, Any]]:
    """PyTorch's fused loss with and without chunking, where this PyTorch has it."""
    if not hasattr(F, "linear_cross_entropy"):
        return []
    chunked = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512)
    return [("F.linear_cross_entropy", None), ("F.linear_cross_entropy, batches of 512", chunked)]


def _step(module: nn.Module, loss: Loss, hidden: Tensor, targets: Tensor) -> Call:
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    inputs = hidden.clone().requires_grad_()  # the rest of a network wants its gradient

    def step() -> None:
        inputs.grad = None
        optimizer.zero_grad()
        loss(inputs, targets).backward()
        optimizer.step()

    return step


def _query(sizes: Sizes, hidden: Tensor) -> Case:
    """The `k` best classes of every row."""
    linear = nn.Linear(sizes.in_features, sizes.num_classes, device=hidden.device)
    peers = {"F.linear + topk": torch.no_grad()(lambda: linear(hidden).topk(sizes.k))}
    return Case("query", f"top-{sizes.k} classes of every row", "F.linear + topk", peers)


def _measure(case: Case, sizes: Sizes, seconds: float) -> list[tuple[dict[str, Any], Timing]]:
    """Records of one case, with their spread, quickest first."""
    synchronise()
    start = time.perf_counter()
    for call in case.peers.values():
        call()
    synchronise()
    once = time.perf_counter() - start
    rounds = int(min(MAX_ROUNDS, max(MIN_ROUNDS, seconds / once)))
    timings = interleaved(case.peers, rounds=rounds, warmup=1)
    full_ms = timings[case.baseline].ms
    rows = []
    for name, timing in timings.items():
        record = {
            "case": case.name,
            "name": name,
            "num_classes": sizes.num_classes,
            "in_features": sizes.in_features,
            "batch": sizes.batch,
            "ms": timing.ms,
            "low_ms": timing.low_ms,
            "high_ms": timing.high_ms,
            "rounds": timing.runs,
            "ratio_to_full": timing.ms / full_ms,
            "peak_bytes": peak_bytes(case.peers[name]),
        }
        rows.append((record, timing))
    return sorted(rows, key=lambda row: row[1].ms)


def _table(case: Case, sizes: Sizes, rows: list[tuple[dict[str, Any], Timing]]) -> Table:
    title = f"{case.meaning}: V={sizes.num_classes:,} d={sizes.in_features} N={sizes.batch}"
    table = Table(title=title, title_justify="left")
    for heading in ("", "ms", "middle half", "ratio", "peak MB"):
        table.add_column(heading, justify="left" if not heading else "right")
    for record, timing in rows:
        table.add_row(
            record["name"],
            f"{timing.ms:.2f}",
            f"{timing.low_ms:.2f}-{timing.high_ms:.2f}",
            f"{record['ratio_to_full']:.2f}",
            f"{record['peak_bytes'] / 1e6:.1f}",
        )
    return table

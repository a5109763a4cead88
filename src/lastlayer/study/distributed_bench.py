"""What a training step of every layer costs when its classes are divided among processes: time, bytes, memory."""

from typing import Any

import torch
from rich.console import Console

from lastlayer.study import processes
from lastlayer.study.bench import Sizes
from lastlayer.study.choices import build_layer
from lastlayer.study.measuring.cost import trained_parts, training_step
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.measuring.peers import zipf_counts
from lastlayer.study.report.tables import show

ROUNDS = 5
FIELDS = ("name", "ms", "sent_bytes", "parameter_bytes", "peak_bytes", "num_classes", "in_features", "batch")
SHARDABLE = (
    "full",
    "hierarchical",
    "sigsoftmax",
    "plif",
    "mixture",
    "adaptive",
    "sampled",
    "one-vs-all",
    "one-vs-sampled",
    "factored",
)


def run_distributed_bench(
    sizes: Sizes, layers: list[str], seed: int, device: torch.device
) -> list[dict[str, Any]]:
    """Measures every layer over all processes of torchrun, prints a table, and returns the first one's records.

    A record has the time of a step, the bytes that each process sends in it (by the ring algorithms, as
    `lastlayer.distributed.count_bytes` counts), the bytes of this process's parameters, and the most memory that a
    step holds beyond them, their gradients and the optimizer's state.

    Raises:
        UsageError: a layer that cannot be divided.
    """
    from torch.distributed.tensor import DTensor

    from lastlayer.distributed import count_bytes

    counts = zipf_counts(sizes.num_classes)
    torch.manual_seed(seed)
    hidden = torch.randn(sizes.batch, sizes.in_features, device=device)
    targets = torch.multinomial(counts.double(), sizes.batch, replacement=True).to(device)
    records = []
    for name in layers:
        torch.manual_seed(seed)
        layer = processes.sharded(name, build_layer(name, sizes.in_features, counts).to(device))
        optimizer = layer.own_optimizer(1e-3) or torch.optim.SGD(layer.parameters(), lr=1e-3)
        step = training_step(layer, optimizer, hidden, targets)
        step()
        with count_bytes() as sent:
            step()
        own = [part.to_local() if isinstance(part, DTensor) else part for part in trained_parts(layer)]
        timing = interleaved({name: step}, rounds=ROUNDS, warmup=1)[name]
        records.append(
            {
                "case": "training, distributed",
                "name": name,
                "num_classes": sizes.num_classes,
                "in_features": sizes.in_features,
                "batch": sizes.batch,
                "ranks": processes.count(),
                "ms": timing.ms,
                "low_ms": timing.low_ms,
                "high_ms": timing.high_ms,
                "sent_bytes": sent.total(),
                "parameter_bytes": sum(part.nbytes for part in own),
                "peak_bytes": peak_bytes(step),
            }
        )
        del layer, step, own
    if processes.is_first():
        show(Console(), f"training step over {processes.count()} processes", records, FIELDS)
    return records

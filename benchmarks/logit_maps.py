"""FullSoftmax under each logit map against the plain one, forward + backward, with the fused kernel and without.

python benchmarks/logit_maps.py [--rows 1024] [--rounds 5]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lastlayer import PLIF, FullSoftmax, LogitMap, MonotoneNetwork, Sigsoftmax, SoftCap
from lastlayer.kernels import softmax_rows
from lastlayer.study.measure import Timing, interleaved, peak_bytes, write_records

RESULTS = Path(__file__).parent / "results" / "logit_maps.json"
IN_FEATURES = 512
MAPS: dict[str, Callable[[], LogitMap | None]] = {
    "none": lambda: None,
    "Sigsoftmax": Sigsoftmax,
    "SoftCap(30)": lambda: SoftCap(30.0),
    "PLIF": PLIF,
    "PLIF, frozen, std 1": lambda: PLIF(init_std=1.0, frozen=True),
}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    for num_classes in (33_278, 128_000):
        torch.manual_seed(0)
        few = num_classes > 100_000
        found = race(arguments.rows, num_classes, max(1, arguments.rounds - 2 * few), network=not few)
        for record in found:
            print("  ".join(f"{key}={value}" for key, value in record.items()), flush=True)
        records += found
    write_records(RESULTS, records, notes="forward + backward; memory beyond the parameters and their gradients")


def race(rows: int, num_classes: int, rounds: int, network: bool) -> list[dict[str, Any]]:
    """One record a map and way to compute it; `network`: the slow MonotoneNetwork too, once."""
    hidden = torch.randn(rows, IN_FEATURES)
    targets = torch.randint(num_classes, (rows,))
    peers: dict[Any, Callable[[], None]] = {}
    gradients: dict[Any, int] = {}
    for name, make in MAPS.items():
        for way in ("fused", "plain"):
            if name.startswith("PLIF, ") and way == "plain":
                continue
            peers[name, way], gradients[name, way] = step_of(make(), hidden, targets, num_classes, way)
    slow: dict[Any, Callable[[], None]] = {}
    if network:
        key = "MonotoneNetwork(100)", "plain"
        slow[key], gradients[key] = step_of(MonotoneNetwork(100), hidden, targets, num_classes, "plain")
    memory = {}
    for key, step in (peers | slow).items():
        step()
        memory[key] = peak_bytes(step) - gradients[key]
    timings: dict[Any, Timing] = {**interleaved(peers, rounds=rounds, warmup=0)}
    timings |= interleaved(slow, rounds=1, warmup=0) if slow else {}
    return [
        {
            "case": f"V={num_classes}",
            "name": name,
            "way": way,
            "num_classes": num_classes,
            "in_features": IN_FEATURES,
            "batch": rows,
            "ms": round(timing.ms, 1),
            "low_ms": round(timing.low_ms, 1),
            "high_ms": round(timing.high_ms, 1),
            "runs": timing.runs,
            "ratio_to_full": round(timing.ms / timings["none", "fused"].ms, 3),
            "peak_bytes": memory[name, way],
            "memory_ratio": round(memory[name, way] / memory["none", "fused"], 3),
        }
        for (name, way), timing in timings.items()
    ]


def step_of(
    logit_map: LogitMap | None, hidden: Tensor, targets: Tensor, num_classes: int, way: str
) -> tuple[Callable[[], None], int]:
    """A training step without an optimizer, and the bytes of its gradients."""
    layer = FullSoftmax(IN_FEATURES, num_classes, logit_map=logit_map)
    leaf = hidden.clone().requires_grad_()
    leaves = [leaf, *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> None:
        softmax_rows.LEAST_LOGITS = 1 << 20 if way == "fused" else 1 << 60
        for part in leaves:
            part.grad = None
        layer(leaf, targets).backward()
        for part in leaves:
            part.grad = None

    return step, sum(part.numel() * part.element_size() for part in leaves)


if __name__ == "__main__":
    main()

"""FullSoftmax under each logit map against the plain one, forward + backward, compiled and in plain PyTorch.

python benchmarks/logit_maps.py [--num-classes 33278] [--rows 1024] [--rounds 5] [--maps PLIF Sigsoftmax ...]
python benchmarks/logit_maps.py --maps "MonotoneNetwork(100)" --rounds 1     # minutes: 48 times a plain step
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lastlayer import PLIF, FullSoftmax, LogitMap, MonotoneNetwork, Sigsoftmax, SoftCap
from lastlayer.kernels import engine
from lastlayer.study.measuring.measure import Timing, interleaved, peak_bytes, write_records

RESULTS = Path(__file__).parent / "results"
IN_FEATURES = 512
MAPS: dict[str, Callable[[], LogitMap | None]] = {
    "none": lambda: None,
    "Sigsoftmax": Sigsoftmax,
    "SoftCap(30)": lambda: SoftCap(30.0),
    "PLIF": PLIF,
    "PLIF, frozen, std 1": lambda: PLIF(init_std=1.0, frozen=True),
    "MonotoneNetwork(100)": lambda: MonotoneNetwork(100),
}
SLOW = "MonotoneNetwork(100)"  # only where it is selected
WAYS = {"PLIF, frozen, std 1": ("compiled",), SLOW: ("plain",)}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-classes", type=int, default=33_278)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--maps", nargs="*", choices=[*MAPS][1:], default=[*MAPS][1:-1])
    parser.add_argument("--results", type=Path, help="none: by the number of classes")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    records = race(arguments.rows, arguments.num_classes, arguments.rounds, arguments.maps)
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()), flush=True)
    which = "_network" if arguments.maps == [SLOW] else ""
    notes = "forward + backward; memory beyond the parameters and their gradients"
    path = arguments.results or RESULTS / f"logit_maps_{arguments.num_classes}{which}.json"
    write_records(path, records, notes=notes)


def race(rows: int, num_classes: int, rounds: int, maps: list[str]) -> list[dict[str, Any]]:
    """One record a map and way to compute it."""
    hidden = torch.randn(rows, IN_FEATURES)
    targets = torch.randint(num_classes, (rows,))
    peers: dict[Any, Callable[[], None]] = {}
    gradients: dict[Any, int] = {}
    for name in ["none", *maps]:
        for way in WAYS.get(name, ("compiled", "plain")):
            peers[name, way], gradients[name, way] = step_of(MAPS[name](), hidden, targets, num_classes, way)
    memory = {}
    for key, step in peers.items():
        if key[0] != SLOW:
            step()  # a first run fills what is kept for the next
        memory[key] = peak_bytes(step) - gradients[key]
    timings: dict[Any, Timing] = {**interleaved(peers, rounds=rounds, warmup=0)}
    return [
        {
            "case": f"V={num_classes}",
            "name": name,
            "way": way,
            "num_classes": num_classes,
            "in_features": IN_FEATURES,
            "batch": rows,
            **timing.rounded(),
            "ratio_to_full": round(timing.ms / timings["none", "compiled"].ms, 3),
            "peak_bytes": memory[name, way],
            "memory_ratio": round(memory[name, way] / memory["none", "compiled"], 3),
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
        for part in leaves:
            part.grad = None
        with nullcontext() if way == "compiled" else engine.forced(None):
            layer(leaf, targets).backward()
        for part in leaves:
            part.grad = None

    return step, sum(part.numel() * part.element_size() for part in leaves)


if __name__ == "__main__":
    main()

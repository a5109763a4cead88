"""FullSoftmax against PyTorch's own, forward + backward: time, memory, and distance from float64.

python benchmarks/full_softmax.py [--rows 4096] [--num-classes 128000] [--rounds 6] [--results PATH]

A round takes some 35 s at the default sizes, the whole about five minutes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer import FullSoftmax
from lastlayer.study.measuring.measure import interleaved, peak_bytes, write_records

RESULTS = Path(__file__).parent / "results" / "full_softmax.json"
IN_FEATURES = 512
PLAIN, CHUNKED = "F.linear + F.cross_entropy", "F.linear_cross_entropy, chunks of 512"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--num-classes", type=int, default=128_000)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layer = FullSoftmax(IN_FEATURES, arguments.num_classes)
    records = time_and_memory(layer, arguments.rows, arguments.rounds)
    records += distances(layer, arguments.rows // 2)
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()))
    write_records(
        arguments.results, records, notes="forward + backward; memory beyond the parameters and their gradients"
    )


def steps(layer: FullSoftmax, hidden: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """A loss by name; "autocast" ones run in bfloat16."""

    def own() -> Tensor:
        return layer(hidden, targets)

    def plain() -> Tensor:
        return F.cross_entropy(F.linear(hidden, layer.weight, layer.bias), targets)

    losses = {"FullSoftmax": own, PLAIN: plain}
    if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
        best = torch.nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=512)
        losses[CHUNKED] = lambda: F.linear_cross_entropy(
            hidden, layer.weight, targets, linear_bias=layer.bias, options=best
        )
    autocast = {f"{name}, autocast": in_bfloat16(losses[name]) for name in list(losses)[:2]}
    return {**losses, **autocast}


def in_bfloat16(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same under bfloat16 autocast."""

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss()

    return under_autocast


def time_and_memory(layer: FullSoftmax, rows: int, rounds: int) -> list[dict[str, Any]]:
    """One record a peer."""
    leaves = [torch.randn(rows, IN_FEATURES, requires_grad=True), *layer.parameters()]
    ids = torch.randint(layer.num_classes, (rows,))
    losses = steps(layer, leaves[0], ids)

    def step_of(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

        return step

    peers = {name: step_of(loss) for name, loss in losses.items()}
    gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    few = lambda: layer(leaves[0][:16], ids[:16])  # noqa: E731
    for warm in (few, in_bfloat16(few)):  # the engine is loaded before memory is measured
        step_of(warm)()
    memory = {}
    for name, step in peers.items():  # the first run of each, so the warm-up too
        for leaf in leaves:
            leaf.grad = None
        memory[name] = peak_bytes(step) - gradient_bytes
    timings = interleaved(peers, rounds=rounds, warmup=0)
    return [
        {
            "case": "forward + backward",
            "name": name,
            "num_classes": layer.num_classes,
            "in_features": IN_FEATURES,
            "batch": rows,
            **timing.rounded(),
            "ratio_to_full": round(timing.ms / timings["FullSoftmax"].ms, 3),
            "peak_bytes": memory[name],
            "memory_ratio_to_plain": round(memory[name] / memory[PLAIN], 4),
        }
        for name, timing in timings.items()
    ]


def distances(layer: FullSoftmax, rows: int) -> list[dict[str, Any]]:
    """How far loss and gradients under autocast are from those of float64 (chunked too: tested to be exact)."""
    hidden, targets = torch.randn(rows, IN_FEATURES), torch.randint(layer.num_classes, (rows,))

    def loss_and_gradients(kind: str) -> list[Tensor]:
        exact = kind == "exact"
        model = FullSoftmax(IN_FEATURES, layer.num_classes, dtype=torch.float64) if exact else layer
        model.load_state_dict(layer.state_dict())
        leaves = [hidden.to(model.weight.dtype).requires_grad_(), *model.parameters()]
        losses = steps(model, leaves[0], targets)
        loss = losses["FullSoftmax" if exact else kind]()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    truth = loss_and_gradients("exact")
    records = []
    for name in ("FullSoftmax, autocast", f"{PLAIN}, autocast"):
        errors = [
            float((part.double() - exact).norm() / exact.norm())
            for part, exact in zip(loss_and_gradients(name), truth, strict=True)
        ]
        named = zip(("loss", "hidden", "weight", "bias"), errors, strict=True)
        records.append(
            {"case": "distance", "name": name, "batch": rows, **{k: float(f"{e:.3e}") for k, e in named}}
        )
    return records


if __name__ == "__main__":
    main()

"""MixtureOfSoftmaxes against its own matrix products, the plain softmax and the usual implementation.

python benchmarks/mixture.py [--num-classes 33278] [--rows 1024] [--rounds 2] [--few 256]
python benchmarks/mixture.py --num-classes 128000 --rows 512 --rounds 1 --few 96     # about a minute, 5 GB
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lastlayer import FullSoftmax, MixtureOfSoftmaxes, OutputLayer
from lastlayer.functional.linear_chunks import rows_of_chunk
from lastlayer.study.measuring.measure import interleaved, peak_bytes, write_records

RESULTS = Path(__file__).parent / "results"
WIDTH, COMPONENTS = 512, 15


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--num-classes", type=int, default=33_278)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--few", type=int, default=256, help="rows of the usual implementation: several (N, K, V) tensors"
    )
    parser.add_argument("--results", type=Path, help="none: by the number of classes")
    arguments = parser.parse_args()
    num_classes = arguments.num_classes
    torch.manual_seed(0)
    mixture = MixtureOfSoftmaxes(WIDTH, num_classes, COMPONENTS)
    full = FullSoftmax(WIDTH, num_classes)
    hidden, targets = torch.randn(arguments.rows, WIDTH), torch.randint(num_classes, (arguments.rows,))

    few = arguments.few
    memory = {
        "mixture": memory_of(mixture, hidden, targets),
        "full": memory_of(full, hidden, targets),
        f"mixture, {few} rows": memory_of(mixture, hidden[:few], targets[:few]),
        f"usual implementation, {few} rows": memory_of(mixture, hidden[:few], targets[:few], usual_loss),
    }
    peers = {
        "mixture": step_of(mixture, hidden, targets),
        "its matrix products": lambda: products(mixture, hidden),
        "full": step_of(full, hidden, targets),
    }
    timings = interleaved(peers, rounds=arguments.rounds, warmup=0)
    records = [
        {
            "case": f"V={num_classes} K={COMPONENTS} d={WIDTH}",
            "name": name,
            "batch": few if "rows" in name else arguments.rows,
            "ms": round(timings[name].ms, 1) if name in timings else None,
            "low_ms": round(timings[name].low_ms, 1) if name in timings else None,
            "ratio_to_products": round(timings[name].ms / timings["its matrix products"].ms, 3)
            if name in timings
            else None,
            "peak_bytes": memory.get(name),
            "memory_ratio_to_full": round(memory[name] / memory["full"], 3) if name in memory else None,
        }
        for name in {**timings, **memory}
    ]
    for record in records:
        print("  ".join(f"{key}={value}" for key, value in record.items()))
    notes = "forward + backward; memory beyond the parameters and their gradients"
    write_records(arguments.results or RESULTS / f"mixture_{num_classes}.json", records, notes=notes)


def step_of(
    layer: OutputLayer,
    hidden: Tensor,
    targets: Tensor,
    loss_of: Callable[[OutputLayer, Tensor, Tensor], Tensor] = lambda layer, hidden, targets: layer(
        hidden, targets
    ),
) -> Callable[[], None]:
    """A training step without an optimizer."""
    leaf = hidden.clone().requires_grad_()

    def step() -> None:
        loss_of(layer, leaf, targets).backward()
        layer.zero_grad()
        leaf.grad = None

    return step


def memory_of(layer: OutputLayer, hidden: Tensor, targets: Tensor, *loss_of: Callable[..., Tensor]) -> int:
    """Peak bytes of a warmed-up step beyond the gradients."""
    step = step_of(layer, hidden, targets, *loss_of)
    step()
    gradients = hidden.numel() + sum(parameter.numel() for parameter in layer.parameters())
    return peak_bytes(step) - 4 * gradients


def usual_loss(layer: MixtureOfSoftmaxes, hidden: Tensor, targets: Tensor) -> Tensor:
    """As the authors' code has it: probabilities of all classes, then their logarithm."""
    latents, prior = layer.latents(hidden), layer.log_prior(hidden).exp()
    prob = torch.nn.functional.linear(latents, layer.weight, layer.bias).softmax(-1)
    mixed = (prob * prior[..., None]).sum(1)
    return torch.nn.functional.nll_loss((mixed + 1e-8).log(), targets)


@torch.no_grad()
def products(layer: MixtureOfSoftmaxes, hidden: Tensor) -> None:
    """The three products of each chunk, as large as the layer's."""
    rows = layer.latents(hidden).flatten(0, 1)
    weight = layer.weight
    size = min(rows_of_chunk(4 * len(weight)), 3 * len(hidden) // 4) // COMPONENTS * COMPONENTS
    logits, of_weight = torch.empty(size, len(weight)), torch.empty_like(weight)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        out = torch.mm(part, weight.T, out=logits[: len(part)])
        torch.mm(out, weight)
        of_weight.addmm_(out.T, part, beta=0 if start == 0 else 1)


if __name__ == "__main__":
    main()

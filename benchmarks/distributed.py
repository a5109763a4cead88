"""Bytes and memory of a training step whose classes are divided among 1, 2 and 4 processes.

python benchmarks/distributed.py [--num-classes V] [--in-features d] [--batch N] [--results PATH]

Each process counts what it writes to its connections (`/proc/self/io`, which counts gloo's writes) in some steps,
beside what the formula of each layer's docstring gives; and the most memory that a step holds beyond the
parameters and their gradients, beside that of the plain way, in one process with all logits. Processes share the
processors here, so that no time is written.
"""

import argparse
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F

from lastlayer import MixtureOfSoftmaxes, OneVsAll
from lastlayer.distributed import count_bytes, shard
from lastlayer.layers.base import OutputLayer
from lastlayer.study.choices import build_layer
from lastlayer.study.measuring.cost import training_step
from lastlayer.study.measuring.measure import peak_bytes, write_records
from lastlayer.study.measuring.peers import zipf_counts

RESULTS = Path(__file__).parent / "results" / "distributed.json"
RANKS, STEPS = (1, 2, 4), 1
LAYERS = ("full", "hierarchical", "adaptive", "sampled", "mixture", "one-vs-all")
COMPONENTS = 2


def make(name: str, d: int, counts: Tensor) -> OutputLayer:
    """A whole layer, with dense gradients, the same on all ranks."""
    torch.manual_seed(0)
    if name == "mixture":
        return MixtureOfSoftmaxes(d, len(counts), COMPONENTS)
    if name == "one-vs-all":
        return OneVsAll(d, len(counts))
    layer = build_layer(name, d, counts)
    vars(layer)["sparse"] = False
    return layer


def plain_loss(name: str, layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The plain way: PyTorch's own loss of all logits; of a mixture, of all components' probabilities."""

    def cross_entropy(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, layer.weight, layer.bias), targets)

    def mixture(hidden: Tensor, targets: Tensor) -> Tensor:
        inside = F.linear(layer.latents(hidden), layer.weight, layer.bias).softmax(-1)
        return F.nll_loss((layer.log_prior(hidden).exp()[..., None] * inside).sum(1).log(), targets)

    def one_vs_all(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(hidden, layer.weight, layer.bias)
        dense = torch.zeros_like(logits).scatter_(1, targets[:, None], 1.0)
        return F.binary_cross_entropy_with_logits(logits, dense, reduction="sum") / len(hidden)

    return {"mixture": mixture, "one-vs-all": one_vs_all}.get(name, cross_entropy)


def plain_work_bytes(name: str, d: int, counts: Tensor, hidden: Tensor, targets: Tensor) -> int:
    """The most memory of a step in the plain way beyond parameters and gradients."""
    layer = make(name if name in ("mixture", "one-vs-all") else "full", d, counts)
    step = training_step(plain_loss(name, layer), torch.optim.SGD(layer.parameters(), lr=1e-3), hidden, targets)
    step()
    return least_peak(step) - sum(p.nbytes for p in layer.parameters())


def least_peak(step: Callable[[], None]) -> int:
    """Of a few steps: what an allocator has kept from before is in some."""
    return min(peak_bytes(step) for _ in range(3))


def numbers_sent(name: str, layer: Any, targets: Tensor, d: int) -> int:
    """The numbers of results that a step reduces over the ranks, by the docstrings of the sharded layers.

    The state of random numbers is left out.
    """
    N = len(targets)
    if name == "mixture":
        return N * COMPONENTS * (layer.latent_features + 3)
    if name == "one-vs-all":
        return N * d + 1
    if name in ("full", "sampled"):
        return N * (d + 3)
    if name == "hierarchical":
        return N * (d + 6) + layer.num_clusters
    in_tails = [((targets >= start) & (targets < stop)).sum() for start, stop in _tails(layer)]
    widths = [layer.tail[i][0].weight.shape[0] for i in range(len(in_tails))]
    return N * (d + 3) + sum(int(n) * (w + 3) for n, w in zip(in_tails, widths, strict=True))


def _tails(layer: Any) -> list[tuple[int, int]]:
    edges = [*layer.cutoffs, layer.num_classes]
    return list(pairwise(edges))


def written() -> int:
    """The bytes that this process has written, to connections too."""
    line = next(part for part in Path("/proc/self/io").read_text().splitlines() if part.startswith("wchar"))
    return int(line.split()[1])


def measure(rank: int, ranks: int, sizes: tuple[int, int, int], folder: str) -> None:
    """One process of a group; writes its records to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    V, d, N = sizes
    counts = zipf_counts(V)
    torch.manual_seed(0)
    hidden, targets = torch.randn(N, d), torch.multinomial(counts.double(), N, replacement=True)
    records = []
    for name in LAYERS:
        whole = make(name, d, counts)
        parameters = sum(p.nbytes for p in whole.parameters())
        layer = shard(whole)
        del whole
        step = training_step(layer, torch.optim.SGD(layer.parameters(), lr=1e-3), hidden, targets)
        step()
        with count_bytes() as sent:
            step()
        before = written()
        for _ in range(STEPS):
            step()
        formula = numbers_sent(name, layer, targets, d)
        own = sum(p.to_local().nbytes for p in layer.parameters() if isinstance(p, DTensor))
        records.append(
            {
                "name": name,
                "ranks": ranks,
                "rank": rank,
                "num_classes": V,
                "in_features": d,
                "batch": N,
                "written_bytes": (written() - before) / STEPS,
                "counted_bytes": sent.total(),
                "formula_bytes": 2 * (ranks - 1) / ranks * 4 * formula,
                "parameter_bytes": own,
                "whole_parameter_bytes": parameters,
                "work_bytes": least_peak(step) - own,  # the gradients are as large as the parameters
            }
        )
        del layer, step
        if ranks == 1:
            records[-1]["plain_work_bytes"] = plain_work_bytes(name, d, counts, hidden, targets)
    torch.save(records, f"{folder}/{ranks}-{rank}")
    dist.destroy_process_group()


def main() -> None:
    """Runs all groups, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-classes", type=int, default=50_000)
    parser.add_argument("--in-features", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes = options.num_classes, options.in_features, options.batch
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            spawn(measure, args=(ranks, sizes, folder), nprocs=ranks)
            for rank in range(ranks):
                records += torch.load(f"{folder}/{ranks}-{rank}")
    write_records(options.results, records, notes="bytes a step and a process, gloo; times are not measured")
    for name in LAYERS:
        of_name = [r for r in records if r["name"] == name]
        plain = of_name[0]["plain_work_bytes"]
        for ranks in RANKS:
            own = [r for r in of_name if r["ranks"] == ranks]
            mean = {key: sum(r[key] for r in own) / len(own) for key in own[0] if key.endswith("_bytes")}
            wire = mean["written_bytes"] / mean["formula_bytes"] if ranks > 1 else 1
            figures = {key: round(value / 1e3) for key, value in mean.items()}
            most = max(r["work_bytes"] for r in own)
            print(name, ranks, f"written / formula {wire:.3f}, work / plain {most / plain:.3f}", figures)


if __name__ == "__main__":
    main()

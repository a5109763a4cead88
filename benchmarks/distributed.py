"""Bytes and memory of a training step whose classes are divided among 1, 2 and 4 processes, and the model of more.

python benchmarks/distributed.py [--num-classes V] [--in-features d] [--batch N] [--results PATH]

Each process counts what it writes to its connections (`/proc/self/io`, which counts gloo's writes) in 10 steps,
beside
what the formula of each layer's docstring gives. Processes share the processors here, so that no time is written.
"""

import argparse
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from lastlayer.distributed import count_bytes, shard
from lastlayer.study.choices import build_layer
from lastlayer.study.measuring.cost import training_step
from lastlayer.study.measuring.measure import peak_bytes, write_records
from lastlayer.study.measuring.peers import zipf_counts

RESULTS = Path(__file__).parent / "results" / "distributed.json"
RANKS, STEPS = (1, 2, 4), 10
LAYERS = ("full", "hierarchical", "adaptive", "sampled")


def numbers_sent(name: str, layer: Any, targets: torch.Tensor, d: int) -> int | None:
    """The numbers of results that a step reduces over the ranks, by the docstrings of the sharded layers."""
    N = len(targets)
    if name in ("full", "sampled"):
        return N * (d + 3)
    if name == "hierarchical":
        return N * (d + 4) + layer.num_clusters
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
        torch.manual_seed(0)
        whole = build_layer(name, d, counts)
        vars(whole)["sparse"] = False
        parameters = sum(p.nbytes for p in whole.parameters())
        layer = shard(whole)
        del whole
        step = training_step(layer, torch.optim.SGD(layer.parameters(), lr=1e-3), hidden, targets)
        for _ in range(2):
            step()
        with count_bytes() as sent:
            step()
        before = written()
        for _ in range(STEPS):
            step()
        formula = numbers_sent(name, layer, targets, d)
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
                "formula_bytes": None if formula is None else 2 * (ranks - 1) / ranks * 4 * formula,
                "parameter_bytes": sum(p.to_local().nbytes for p in layer.parameters() if isinstance(p, DTensor)),
                "whole_parameter_bytes": parameters,
                "peak_bytes": peak_bytes(step),
            }
        )
        del layer, step
    torch.save(records, f"{folder}/{ranks}-{rank}")
    dist.destroy_process_group()


def main() -> None:
    """Runs all groups, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-classes", type=int, default=200_000)
    parser.add_argument("--in-features", type=int, default=128)
    parser.add_argument("--batch", type=int, default=256)
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
        for ranks in RANKS:
            own = [r for r in records if r["name"] == name and r["ranks"] == ranks]
            mean = {key: sum(r[key] for r in own) / len(own) for key in own[0] if key.endswith("_bytes")}
            print(name, ranks, {key: round(value / 1e3) for key, value in mean.items()})


if __name__ == "__main__":
    main()

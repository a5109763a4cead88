"""Exact top-k of the layers that search for it, against all their log-probabilities, on flat and on peaked models.

python benchmarks/search.py [--rounds 15] [--classes 100000,3000] [--rows 1,8] [--results PATH]

`topk(hidden, 10)` against `log_prob(hidden).topk(10)` of the same layer, and against `F.linear` + `topk` over as
many classes, d=64. A flat model is one early in training: weights as made, hidden states small. A peaked one has
logits of standard deviation 3, and counts by Zipf's law in its biases or its tree. Times are the processor's, of
one thread, so that a busy machine changes them little; all calls interleaved.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer import AdaptiveSoftmax, HierarchicalSoftmax, OutputLayer, TreeSoftmax, clusters
from lastlayer.study.measuring.measure import Timing, write_records
from lastlayer.study.measuring.peers import zipf_counts

RESULTS = Path(__file__).parent / "results" / "search.json"
WIDTH, K, DEVIATION = 64, 10, 3.0
PLAIN = "F.linear + topk"


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--classes", default="100000,3000")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for num_classes in map(int, options.classes.split(",")):
        for model in ("flat", "peaked"):
            made = layers(num_classes, model)
            for rows in map(int, options.rows.split(",")):
                for record in measure(made, rows, model, options.rounds):
                    print("  ".join(f"{key}={value}" for key, value in record.items()), flush=True)
                    records.append(record)
    write_records(
        options.results, records, notes=f"top-{K} of {WIDTH} features, exact; ratios are to log_prob().topk"
    )


def layers(num_classes: int, model: str) -> dict[str, OutputLayer]:
    """The layers that search, all of one kind of distribution."""
    torch.manual_seed(0)
    counts = zipf_counts(num_classes)
    made: dict[str, OutputLayer] = {
        "hierarchical, even": HierarchicalSoftmax(WIDTH, num_classes),
        "hierarchical, by_frequency": HierarchicalSoftmax(
            WIDTH, num_classes, clusters=clusters.by_frequency(counts)
        ),
        "tree, balanced": TreeSoftmax(WIDTH, num_classes),
        "tree, Huffman's": TreeSoftmax(WIDTH, num_classes, counts=counts),
        "adaptive": AdaptiveSoftmax(WIDTH, num_classes),
    }
    with torch.no_grad():
        for layer in made.values():
            if model == "peaked":
                for name, parameter in layer.named_parameters():
                    if "bias" not in name:  # hidden states have norm sqrt(d)
                        parameter.normal_(std=DEVIATION * WIDTH**-0.5)
            if model == "peaked" and isinstance(layer, HierarchicalSoftmax):
                share = (counts / counts.sum()).float()[layer.order]
                parts = share.split(layer.offsets.diff().tolist())
                log_shares = share.log(), torch.stack([part.sum() for part in parts]).log()
                for bias, log_share in zip((layer.bias, layer.head_bias), log_shares, strict=True):
                    assert bias is not None
                    bias.copy_(log_share)
    return made


@torch.no_grad()
def measure(made: dict[str, OutputLayer], rows: int, model: str, rounds: int) -> list[dict[str, Any]]:
    """One record a layer; every peer in the same interleaved run."""
    num_classes = next(iter(made.values())).num_classes
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(rows, WIDTH, generator=generator) * (1.0 if model == "peaked" else 0.1)
    weight = torch.randn(num_classes, WIDTH, generator=generator)
    calls: dict[str, Any] = {PLAIN: lambda: F.linear(hidden, weight).topk(K)}
    for name, layer in made.items():
        calls[name] = partial(layer.topk, hidden, K)
        calls[f"{name}, all"] = partial(everything, layer, hidden)
        assert torch.allclose(layer.topk(hidden, K).log_prob, layer.log_prob(hidden).topk(K).values, atol=1e-4)
    timings = processor_times({name: torch.no_grad()(call) for name, call in calls.items()}, rounds)
    plain = timings[PLAIN].ms
    return [
        {
            "case": f"{model}-{num_classes}-{rows}",
            "name": name,
            "num_classes": num_classes,
            "in_features": WIDTH,
            "batch": rows,
            "ms": round(timings[name].ms, 4),
            "low_ms": round(timings[name].low_ms, 4),
            "high_ms": round(timings[name].high_ms, 4),
            "log_prob_topk_ms": round(timings[f"{name}, all"].ms, 4),
            "linear_topk_ms": round(plain, 4),
            "ratio_to_log_prob": round(timings[name].ms / timings[f"{name}, all"].ms, 3),
        }
        for name in made
    ]


def processor_times(calls: dict[str, Any], rounds: int) -> dict[str, Timing]:
    """Each call once a round, after one that does not count: what it reads is in the cache for all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return {name: Timing.of(times) for name, times in seconds.items()}


def everything(layer: OutputLayer, hidden: Tensor) -> object:
    """What the search must not cost more than one and a half times of."""
    return layer.log_prob(hidden).topk(K)


if __name__ == "__main__":
    main()

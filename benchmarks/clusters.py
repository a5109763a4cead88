"""A whole training step (forward, backward, SGD) of cluster and tree layers against their peers, and exact top-k.

python benchmarks/clusters.py [--rounds 5] [--text FOLDER] [--cases steps-100000,steps-800000,adaptive,topk]

Zipf targets, N=1024, d=512. Against `nn.Linear + F.cross_entropy` at V=100,000 and V=800,000; `AdaptiveSoftmax`
against `nn.AdaptiveLogSoftmaxWithLoss` of the same weights; and `topk(10)` of one state against all
log-probabilities, on a two-level layer trained on a text (`--text`, else Python's own source) with made-up further
words up to V=177,000. The gradient of the hidden states is formed too, as under a network.
"""

import argparse
import json
import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer import AdaptiveSoftmax, HierarchicalSoftmax, TreeSoftmax, clusters
from lastlayer.functional.sampling import sample_classes
from lastlayer.study.measuring.measure import Timing, interleaved, peak_bytes, write_records
from lastlayer.study.measuring.peers import sgd_step, zipf_counts
from lastlayer.study.text.batches import Streams
from lastlayer.study.text.corpus import load_corpus
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import Budget, Trainer

RESULTS = Path(__file__).parent / "results" / "clusters.json"
ROWS, WIDTH = 1024, 512
FULL = "nn.Linear + F.cross_entropy"
CUTOFFS = ([2000, 10_000], [4000, 20_000], [1000, 10_000, 40_000])
QUERY_CLASSES, QUERY_WIDTH, QUERIES, K = 177_000, 256, 64, 10
Record = dict[str, Any]


def main() -> None:
    """Measures, prints and writes; cases that are not selected keep the records they have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--train-seconds", type=float, default=20.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    chosen = options.cases.split(",")
    records = json.loads(options.results.read_text())["records"] if options.results.exists() else []
    records = [record for record in records if record["case"] not in chosen]
    for case in chosen:
        found = [{"case": case, **record} for record in CASES[case](options)]
        for record in found:
            print("  ".join(f"{key}={value}" for key, value in record.items()), flush=True)
        records += found
        write_records(options.results, records, notes="steps: forward + backward + torch.optim.SGD, Zipf targets")


def steps(num_classes: int) -> Callable[[Any], list[Record]]:
    """Every layer's step against that of all logits."""

    def measure(options: Any) -> list[Record]:
        counts = zipf_counts(num_classes)
        hidden, targets = torch.randn(ROWS, WIDTH), zipf_targets(num_classes)
        linear = nn.Linear(WIDTH, num_classes)

        def all_logits(hidden: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(linear(hidden), targets)

        by_count = clusters.by_frequency(counts)
        layers = {
            "HierarchicalSoftmax(clusters=by_frequency(counts), sparse=True)": HierarchicalSoftmax(
                WIDTH, num_classes, clusters=by_count, sparse=True
            ),
            "HierarchicalSoftmax(sparse=True)": HierarchicalSoftmax(WIDTH, num_classes, sparse=True),
            "TreeSoftmax(sparse=True)": TreeSoftmax(WIDTH, num_classes, counts=counts, sparse=True),
        }
        peers = {FULL: sgd_step(linear, all_logits, hidden, targets)}
        peers |= {name: sgd_step(layer, layer, hidden, targets) for name, layer in layers.items()}
        timings = interleaved(peers, rounds=options.rounds, warmup=1)
        bound = 4 * WIDTH * (ROWS + math.sqrt(num_classes))
        return [
            {
                **sizes(num_classes, name, timing),
                "times_faster": timings[FULL].ms / timing.ms,
                "peak_bytes": peak_bytes(peers[name]),
                "bytes_of_N_d_and_root_V_d": bound,
            }
            for name, timing in timings.items()
        ]

    return measure


def adaptive(options: Any) -> list[Record]:
    """`AdaptiveSoftmax` against PyTorch's, with the same weights."""
    num_classes = 100_000
    hidden, targets = torch.randn(ROWS, WIDTH), zipf_targets(num_classes)
    records = []
    for cutoffs in CUTOFFS:
        theirs = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, num_classes, cutoffs)
        ours = AdaptiveSoftmax(WIDTH, num_classes, cutoffs)
        ours.load_state_dict(theirs.state_dict())
        assert torch.allclose(ours(hidden, targets), theirs(hidden, targets).loss)

        def loss(hidden: Tensor, targets: Tensor, theirs: Any = theirs) -> Tensor:
            return theirs(hidden, targets).loss

        peers = {
            "nn.AdaptiveLogSoftmaxWithLoss": sgd_step(theirs, loss, hidden, targets),
            "AdaptiveSoftmax": sgd_step(ours, ours, hidden, targets),
        }
        timings = interleaved(peers, rounds=3 * options.rounds)
        base = timings["nn.AdaptiveLogSoftmaxWithLoss"].ms
        records += [
            {**sizes(num_classes, name, timing), "cutoffs": cutoffs, "times_faster": base / timing.ms}
            for name, timing in timings.items()
        ]
    return records


def topk(options: Any) -> list[Record]:
    """One state at a time, on a trained layer: the exact search against all log-probabilities."""
    layer, states = trained(options)
    queries = cycle(states.split(1))

    @torch.no_grad()
    def search() -> None:
        layer.topk(next(queries), K)

    @torch.no_grad()
    def everything() -> None:
        layer.log_prob(next(queries)).topk(K)

    with torch.no_grad():
        same = 0
        for row in states.split(1):
            found, wanted = layer.topk(row, K), layer.log_prob(row).topk(K)
            same += bool(
                torch.allclose(found.log_prob, wanted.values, atol=1e-5)
                and torch.equal(found.indices.sort().values, wanted.indices.sort().values)
            )
    peers = {"log_prob(hidden).topk(10)": everything, "topk(hidden, 10)": search}
    timings = interleaved(peers, rounds=10 * options.rounds, repeats=4)
    base = timings["log_prob(hidden).topk(10)"].ms
    return [
        {
            **sizes(layer.num_classes, name, timing),
            "in_features": QUERY_WIDTH,
            "batch": 1,
            "times_faster": base / timing.ms,
            "identical": same / len(states),
        }
        for name, timing in timings.items()
    ]


def trained(options: Any) -> tuple[HierarchicalSoftmax, Tensor]:
    """A two-level layer of a language model after some seconds of training, and held-out states `(QUERIES, d)`."""
    corpus = load_corpus(options.text and [options.text], min_count=2 if options.text else 1)
    counts = F.pad(corpus.counts, (0, max(0, QUERY_CLASSES - corpus.num_classes)))
    layer = HierarchicalSoftmax(QUERY_WIDTH, len(counts), clusters=clusters.by_frequency(counts), sparse=True)
    cpu = torch.device("cpu")
    held_out = Streams(corpus.held_out, 10, 50, cpu)
    model = LanguageModel(len(counts), layer)
    budget = Budget(seconds=options.train_seconds)
    Trainer(model, Streams(corpus.train, 20, 35, cpu), held_out, budget, learning_rate=0.2).run()
    model.eval()
    with torch.no_grad():
        hidden, _ = model.encode(held_out[0][0], None)
    return layer, hidden.flatten(0, 1)[:: len(held_out[0][0].flatten()) // QUERIES][:QUERIES]


def zipf_targets(num_classes: int) -> Tensor:  # (ROWS,)
    """Classes that occur as words do: class `i` as `1 / (i + 1)`."""
    return sample_classes(-torch.arange(1.0, num_classes + 1).log()[None], ROWS)[0]


def sizes(num_classes: int, name: str, timing: Timing) -> Record:
    """What every record has."""
    return {
        "name": name,
        "num_classes": num_classes,
        "in_features": WIDTH,
        "batch": ROWS,
        "ms": timing.ms,
        "low_ms": timing.low_ms,
        "high_ms": timing.high_ms,
    }


CASES: dict[str, Callable[[Any], list[Record]]] = {
    "steps-100000": steps(100_000),
    "steps-800000": steps(800_000),
    "adaptive": adaptive,
    "topk": topk,
}


if __name__ == "__main__":
    main()

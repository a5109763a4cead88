"""Sampled losses with and without bias, many passes over the same examples: the training loss at equal time.

python benchmarks/unbiased.py [--seconds 6] [--samples 16,256]

The setting of the papers on U-max and Augment & Reduce: a linear classifier of fixed features, so that the number
kept for each example is of use again and again. Judged by the full softmax's loss of all training examples.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lastlayer import AugmentReduce, FullSoftmax, OutputLayer, SampledSoftmax, UMax, Unigram
from lastlayer.functional.sampling import sample_classes
from lastlayer.study.measuring.measure import write_records
from lastlayer.study.measuring.peers import zipf_counts

RESULTS = Path(__file__).parent / "results" / "unbiased.json"
CLASSES, IN_FEATURES, EXAMPLES, BATCH = 10_000, 32, 20_000, 256
RATES = (0.03, 0.1, 0.3)  # of Adagrad; the best of each layer is reported
Make = Callable[[], OutputLayer]


def main() -> None:
    """Trains each layer for the same time at each rate, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=6.0, help="of processor time, for each layer and rate")
    parser.add_argument("--samples", default="16,256")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(EXAMPLES, IN_FEATURES)
    teacher = torch.randn(CLASSES, IN_FEATURES) / 2
    prior = zipf_counts(CLASSES).double().log()
    targets = torch.cat([sample_classes(part @ teacher.T + prior, 1)[:, 0] for part in hidden.split(1000)])
    counts = torch.bincount(targets, minlength=CLASSES).clamp(min=1)
    records = []
    for name, samples, make in peers(counts, [int(number) for number in arguments.samples.split(",")]):
        runs = [trained(make, rate, hidden, targets, arguments.seconds) for rate in RATES]
        (loss, steps), rate = min(zip(runs, RATES, strict=True))
        print(f"{name}, {samples} samples: loss {loss:.3f}, {steps:,} steps, rate {rate}", flush=True)
        records.append(
            {
                "name": name,
                "samples": samples,
                "num_classes": CLASSES,
                "in_features": IN_FEATURES,
                "examples": EXAMPLES,
                "seconds": arguments.seconds,
                "steps": steps,
                "epochs": round(steps * BATCH / EXAMPLES, 1),
                "rate": rate,
                "loss": round(loss, 4),
            }
        )
    write_records(
        RESULTS,
        records,
        notes="seconds are of processor time, one thread; loss: the full softmax's, of all examples; best "
        "of three rates",
    )


def peers(counts: Tensor, samples: list[int]) -> list[tuple[str, int, Make]]:
    """The layers; those without bias keep a number for each example."""
    sizes, keeping = (IN_FEATURES, CLASSES), {"num_examples": EXAMPLES}
    found: list[tuple[str, int, Make]] = [("FullSoftmax", 0, lambda: FullSoftmax(*sizes))]
    for number in samples:
        found += [
            ("SampledSoftmax", number, lambda n=number: SampledSoftmax(*sizes, Unigram(counts), n, sparse=True)),
            (
                "AugmentReduce",
                number,
                lambda n=number: AugmentReduce(*sizes, Unigram(counts), n, **keeping, sparse=True),
            ),
            ("UMax", number, lambda n=number: UMax(*sizes, Unigram(counts), n, **keeping, sparse=True)),
        ]
    return found


def trained(make: Make, rate: float, hidden: Tensor, targets: Tensor, seconds: float) -> tuple[float, int]:
    """The loss after so many seconds, and the steps in them."""
    torch.manual_seed(1)
    layer, steps = make(), 0
    optimizer = torch.optim.Adagrad(layer.parameters(), lr=rate)
    start = time.process_time()  # of this process alone, however busy the machine is
    with torch.sparse.check_sparse_tensor_invariants(False):
        while time.process_time() - start < seconds:
            rows = torch.randint(EXAMPLES, (BATCH,))
            more = (rows,) if isinstance(layer, AugmentReduce | UMax) else ()
            optimizer.zero_grad()
            layer(hidden[rows], targets[rows], *more).backward()
            optimizer.step()
            steps += 1
    with torch.no_grad():
        return -float(layer.target_log_prob(hidden, targets).mean()), steps


if __name__ == "__main__":
    main()

"""FactoredOutput's step against plain ones at the sizes of the paper; its scaling, its drift, its losses on text.

python benchmarks/factored_output.py [--part PART] [--num-classes V] [--rounds R] [--results PATH]

Parts: output, repairs, whole, scaling, exactness, words, classifiers, rates.
"""

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lastlayer.layers.factored import FactoredOutput
from lastlayer.reproduce.large_sparse_targets.classifiers import measure_classifiers
from lastlayer.reproduce.large_sparse_targets.exactness import measure_exactness, measure_repairs
from lastlayer.reproduce.large_sparse_targets.speed import (
    measure_scaling,
    measure_speed,
    multiply_adds,
)
from lastlayer.reproduce.large_sparse_targets.words import EMBEDDING_METHODS, MODEL_METHODS, train_words
from lastlayer.study.measuring.measure import write_records
from lastlayer.study.text.batches import Streams
from lastlayer.study.text.corpus import load_corpus
from lastlayer.study.training.evaluation import evaluate
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import Budget, Trainer

RESULTS = Path(__file__).parent / "results"
IN_FEATURES, BATCH = 300, 128
COMPILED = 4_000, 64, 64, 2e-5  # classes, features, batch and rate, where the kernels serve
LOSSES = ("squared error", "spherical softmax", "Z-loss")


def words(paths: list[Path], seconds: float) -> list[dict[str, Any]]:
    """Embeddings, then language models."""
    corpus = load_corpus(paths)
    budget = Budget(seconds=seconds)
    embeddings = train_words(corpus, EMBEDDING_METHODS, budget, deep=False, seed=0)
    return embeddings + train_words(corpus, MODEL_METHODS, budget, deep=True, seed=0)


def rates(paths: list[Path], steps: int = 200) -> list[dict[str, Any]]:
    """Held-out perplexity of `compare`'s model after a few steps against the rate of `FactoredSGD`."""
    records = []
    for min_count, batch in ((20, 32), (20, 8), (3, 32)):
        corpus = load_corpus(paths, min_count=min_count)
        train, held_out = (
            Streams(part, n, 20, torch.device("cpu")) for part, n in ((corpus.train, batch), (corpus.held_out, 8))
        )
        for rate in (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0):
            torch.manual_seed(0)
            model = LanguageModel(corpus.num_classes, FactoredOutput(64, corpus.num_classes))
            trainer = Trainer(model, train, held_out, Budget(steps=steps), learning_rate=0.1)
            trainer.optimizers[-1].param_groups[0]["lr"] = rate
            trainer.base_rates[-1] = rate
            perplexity: float | None = None
            with suppress(ValueError):  # a step that would be singular is refused
                trainer.run()
                perplexity = evaluate(model, held_out, 4000).perplexity
            sizes = {"num_classes": corpus.num_classes, "batch": 20 * batch, "steps": trainer.steps}
            known = None if perplexity is None or not math.isfinite(perplexity) else perplexity
            records.append({"case": "rates", **sizes, "rate": rate, "perplexity": known})
    return records


def main() -> None:
    """Measures one part, prints and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="output")
    parser.add_argument("--num-classes", type=int, default=793_471)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--results", type=Path, help="default: results/factored_PART.json")
    given = parser.parse_args()
    size = (given.num_classes, IN_FEATURES, BATCH)
    count = multiply_adds(*size)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "output": lambda: measure_speed(*size, given.rounds, losses=LOSSES),
        "repairs": lambda: measure_repairs(*size, given.steps),
        "whole": lambda: measure_speed(*size, given.rounds, losses=LOSSES[:1], deep=True),
        "scaling": lambda: measure_scaling(
            [1_000, 10_000, 100_000, 1_000_000], [64, 128, 256, 300], BATCH, given.rounds
        ),
        "exactness": lambda: measure_exactness(given.steps) + measure_exactness(given.steps, *COMPILED),
        "words": lambda: words(given.text, given.seconds),
        "classifiers": lambda: measure_classifiers(load_corpus(given.text)),
        "rates": lambda: rates(given.text),
    }
    records = parts[given.part]()
    for record in records:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
    ratio = count["plain"] / count["factored"]
    notes = f"multiply-adds of a step at V={size[0]}, d={size[1]}, N={size[2]}: {count}, their ratio {ratio:.0f}"
    write_records(given.results or RESULTS / f"factored_{given.part}.json", records, notes=notes)


if __name__ == "__main__":
    main()

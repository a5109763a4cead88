"""FactoredOutput's step against plain ones at the sizes of the paper; its scaling, its drift, its losses on text.

python benchmarks/factored_output.py [--part output|whole|scaling|exactness|words] [--num-classes V] [--rounds R]
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lastlayer.study.large_sparse_exactness import measure_exactness
from lastlayer.study.large_sparse_speed import measure_scaling, measure_speed, measure_whole_model, multiply_adds
from lastlayer.study.large_sparse_words import EMBEDDING_METHODS, MODEL_METHODS, train_words
from lastlayer.study.measure import write_records
from lastlayer.study.text import load_corpus

RESULTS = Path(__file__).parent / "results"
IN_FEATURES, BATCH = 300, 128
LOSSES = ("squared error", "spherical softmax", "Z-loss")


def words(paths: list[Path], seconds: float) -> list[dict[str, Any]]:
    """Embeddings, then language models."""
    corpus = load_corpus(paths)
    options: dict[str, Any] = {"seconds": seconds, "steps": None, "seed": 0}
    return train_words(corpus, EMBEDDING_METHODS, deep=False, **options) + train_words(
        corpus, MODEL_METHODS, deep=True, **options
    )


def main() -> None:
    """Measures one part, prints and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", default="output")
    parser.add_argument("--num-classes", type=int, default=793_471)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    given = parser.parse_args()
    size = (given.num_classes, IN_FEATURES, BATCH)
    count = multiply_adds(*size)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "output": lambda: measure_speed(*size, given.rounds, losses=LOSSES),
        "whole": lambda: measure_whole_model(*size, given.rounds),
        "scaling": lambda: measure_scaling([1_000, 10_000, 100_000, 1_000_000], [64, 128, 256, 300], BATCH, 10),
        "exactness": lambda: measure_exactness(given.steps),
        "words": lambda: words(given.text, given.seconds),
    }
    records = parts[given.part]()
    for record in records:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
    ratio = count["plain"] / count["factored"]
    notes = f"multiply-adds of a step at V={size[0]}, d={size[1]}, N={size[2]}: {count}, their ratio {ratio:.0f}"
    write_records(RESULTS / f"factored_{given.part}.json", records, notes=notes)


if __name__ == "__main__":
    main()

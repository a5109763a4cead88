"""FactoredOutput's step against plain ones, at the sizes of the paper; its scaling.

python benchmarks/factored_output.py [--part output|whole|scaling] [--num-classes V] [--rounds R]
"""

import argparse
from pathlib import Path

from lastlayer.study.large_sparse_speed import measure_scaling, measure_speed, measure_whole_model, multiply_adds
from lastlayer.study.measure import write_records

RESULTS = Path(__file__).parent / "results"
IN_FEATURES, BATCH = 300, 128


def main() -> None:
    """Measures one part, prints and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["output", "whole", "scaling"], default="output")
    parser.add_argument("--num-classes", type=int, default=793_471)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    count = multiply_adds(arguments.num_classes, IN_FEATURES, BATCH)
    notes = f"multiply-adds of a step: {count}, their ratio {count['plain'] / count['factored']:.0f}"
    if arguments.part == "output":
        records = measure_speed(arguments.num_classes, IN_FEATURES, BATCH, arguments.rounds)
    elif arguments.part == "whole":
        records = measure_whole_model(arguments.num_classes, IN_FEATURES, BATCH, arguments.rounds)
    else:
        records = measure_scaling([1_000, 10_000, 100_000, 1_000_000], [64, 128, 256, 300], BATCH, 10)
    for record in records:
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
    write_records(RESULTS / f"factored_{arguments.part}.json", records, notes=notes)


if __name__ == "__main__":
    main()

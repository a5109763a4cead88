"""Mode matching of PLIF and softmax on random distributions, d = 4, mean of several seeds.

python benchmarks/softmax_bottleneck.py --contexts 300 [--seeds 5]
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from lastlayer.reproduce.softmax_bottleneck.synthetic import fit
from lastlayer.study.measuring.measure import write_records

RESULTS = Path(__file__).parent / "results"
WORDS, WIDTH = 300, 4


def main() -> None:
    """Fits, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    records = [
        {"layer": name, "contexts": arguments.contexts, "words": WORDS, "width": WIDTH, "seed": seed}
        | fit(name, arguments.contexts, WORDS, WIDTH, seed)
        for name in ("softmax", "PLIF")
        for seed in range(arguments.seeds)
    ]
    for name in ("softmax", "PLIF"):
        shares = [record["mode_matched_percent"] for record in records if record["layer"] == name]
        spread = f" ± {stdev(shares):.1f}" if len(shares) > 1 else ""
        print(f"{name}: {mean(shares):.1f}{spread} % of {arguments.contexts} modes matched", flush=True)
    write_records(RESULTS / f"softmax_bottleneck_{arguments.contexts}.json", records)


if __name__ == "__main__":
    main()

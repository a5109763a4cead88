"""Language modelling under each layer, and a step's cost: parts b and c of `reproduce softmax-bottleneck`.

python benchmarks/softmax_bottleneck_language.py --out DIR [--parts bc] [--budget minutes]

Killed, it goes on where it was when it is run again. Text: wikitext-2 in $LASTLAYER_DATA.
"""

import argparse
import os
from pathlib import Path

import torch

from lastlayer.reproduce.softmax_bottleneck.study import SIZES, run
from lastlayer.study.measuring.measure import write_records
from lastlayer.study.text.corpus import load_corpus

RESULTS = Path(__file__).parent / "results" / "softmax_bottleneck_language.json"


def main() -> None:
    """Trains, times, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default="bc")
    parser.add_argument("--budget", choices=SIZES, default="minutes")
    arguments = parser.parse_args()
    text = Path(os.environ["LASTLAYER_DATA"]) / "wikitext-2"
    size = SIZES[arguments.budget]
    cpu = torch.device("cpu")
    records = run(arguments.parts, size, lambda: load_corpus([text]), arguments.out, True, 0, cpu)
    write_records(RESULTS, records, notes="part b: trained in resumed pieces; its times were measured apart, last")


if __name__ == "__main__":
    main()

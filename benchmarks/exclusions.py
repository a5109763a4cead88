"""What `exclude` costs a screened query: 100 ids a row, the very best or any, against none.

python benchmarks/exclusions.py [--rounds 15]
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.screening.preview import Preview
from lastlayer.study.measuring.measure import Timing, write_records

RESULTS = Path(__file__).parent / "results" / "exclusions.json"
CLASSES, IN_FEATURES, EXCLUDED, K = 100_000, 256, 100, 10
ROWS = (1, 8, 64)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    spectrum = torch.arange(1, IN_FEATURES + 1) ** -0.5  # as of trained weights, for the preview by SVD
    weight = torch.randn(CLASSES, IN_FEATURES) * spectrum
    states = torch.randn(4096, IN_FEATURES) * spectrum
    previews: dict[str, Preview] = {
        "Int8Preview": Int8Preview(),
        "Int4Preview": Int4Preview(calibration=states),
        "SVDPreview(64)": SVDPreview(64, calibration=states),
    }
    records = []
    for name, preview in previews.items():
        screen = ScreenedSoftmax(weight, preview=preview, candidates=256, exact=True, use="screen")
        for rows in ROWS:
            records += measured(name, screen, states[:rows], arguments.rounds)
    write_records(RESULTS, records, notes=f"top {K}, exact=True; processor time of one thread")


def measured(name: str, screen: ScreenedSoftmax, hidden: Tensor, rounds: int) -> list[dict[str, object]]:
    """The same queries with nothing excluded, with any ids, and with the best ones, interleaved."""
    best = (hidden @ screen.weight.T).topk(EXCLUDED).indices
    excluded = {"none": None, "any": torch.randint(CLASSES, best.shape), "the best": best}
    took: dict[str, list[float]] = {kind: [] for kind in excluded}
    for turn in range(-1, rounds * max(1, 32 // len(hidden))):
        for kind, ids in excluded.items():
            start = time.process_time()
            screen.topk(hidden, K, exclude=ids)
            if turn >= 0:
                took[kind].append(time.process_time() - start)
    timings = {kind: Timing.of(seconds) for kind, seconds in took.items()}
    found = []
    for kind, timing in timings.items():
        ratio = timing.ms / timings["none"].ms
        print(
            f"{name}, {len(hidden)} rows, {EXCLUDED} excluded: {kind}: {timing.ms:.3f} ms, {ratio:.3f}", flush=True
        )
        found.append(
            {
                "preview": name,
                "excluded": kind,
                "num_excluded": 0 if kind == "none" else EXCLUDED,
                "num_classes": CLASSES,
                "in_features": IN_FEATURES,
                "batch": len(hidden),
                "ms": timing.ms,
                "low_ms": timing.low_ms,
                "high_ms": timing.high_ms,
                "ratio_to_none": round(ratio, 3),
            }
        )
    return found


if __name__ == "__main__":
    main()

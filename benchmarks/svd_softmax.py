"""SVD-softmax at the size of the old TensorFlow code: the rotation, and top-10 queries against the full softmax.

python benchmarks/svd_softmax.py            (two cores: about 20 seconds)
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from lastlayer import SVDSoftmax
from lastlayer.screening.calibration import rotation_of
from lastlayer.study.measuring.measure import interleaved, write_records

NUM_CLASSES, IN_FEATURES, CANDIDATES, K = 30_000, 256, 2_048, 10
RESULTS = Path(__file__).parent / "results" / "svd_softmax.json"


def main() -> None:
    """Measures and writes the results file."""
    torch.manual_seed(0)
    # directions matter unequally, as in a trained layer; times do not depend on it
    weight = torch.randn(NUM_CLASSES, IN_FEATURES) * torch.logspace(0, -1, IN_FEATURES)
    bias = torch.randn(NUM_CLASSES)
    layer = SVDSoftmax(weight, bias, window=IN_FEATURES // 8, candidates=CANDIDATES, use="screen")

    def full(hidden: torch.Tensor) -> object:
        return F.linear(hidden, weight, bias).log_softmax(-1).topk(K)

    sizes = {"num_classes": NUM_CLASSES, "in_features": IN_FEATURES}
    once = interleaved(
        {"rotation": lambda: rotation_of(weight, None), "whole preparation": layer.refresh}, rounds=9
    )
    records = [{"case": "prepare", "name": name, **sizes, "ms": timing.ms} for name, timing in once.items()]
    with torch.inference_mode():
        for batch in (1, 4, 16, 256):
            hidden = torch.randn(batch, IN_FEATURES)
            timings = interleaved(
                {"full": lambda h=hidden: full(h), "SVDSoftmax": lambda h=hidden: layer.topk(h, K)},
                rounds=41 if batch < 100 else 15,
                repeats=5 if batch < 100 else 1,
            )
            for name, timing in timings.items():
                ratio = timings["full"].ms / timing.ms
                spread = {"low_ms": timing.low_ms, "high_ms": timing.high_ms}
                query = {"batch": batch, "ms": timing.ms, **spread, "times_faster_than_full": ratio}
                records.append({"case": f"top-{K}", "name": name, **sizes, **query})
    for record in records:
        print(record)
    settings = f"window {IN_FEATURES // 8}, {CANDIDATES} candidates"
    write_records(RESULTS, records, notes=f"full: F.linear, log_softmax, topk; SVDSoftmax: {settings}")


if __name__ == "__main__":
    main()

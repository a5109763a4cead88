"""Prints what queries in plain PyTorch, as on a GPU and in float64, allocate: numbers a class and row, as JSON."""

import ctypes
import json

import torch

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, SVDPreview
from lastlayer.kernels import engine
from lastlayer.screening import screen_rows
from lastlayer.screening.plan import Plan
from lastlayer.study.measuring.measure import peak_bytes

V, D, ROWS = 200_000, 8, 4
MMAP_THRESHOLD, SMALL = -3, 1 << 16  # mallopt's name for it, and bytes
PREVIEWS = {
    "float32": SVDPreview(2),
    "bfloat16": SVDPreview(2, storage="bfloat16"),
    "int8": Int8Preview(),
    "int4": Int4Preview(),
    "shifted": SVDPreview(2, tail_correction=1.0),
}


def main() -> None:
    """Large blocks go back to the system when they are freed: what is counted is what a query holds at once."""
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, SMALL)
    generator = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(V, D, generator=generator), torch.randn(ROWS, D, generator=generator)
    found = {}
    torch.set_num_threads(1)
    for dtype, size in ((torch.float64, 8), (torch.bfloat16, 4)):  # bfloat16 is computed in float32
        for name, preview in PREVIEWS.items():
            for exact in (False, True):
                settings = {"candidates": 1000, "exact": exact, "use": "screen"}
                layer = ScreenedSoftmax(weight.to(dtype), preview=preview, **settings)
                rows = hidden.to(dtype)
                layer.topk(rows, 10)  # what the allocator keeps for the next call is there
                taken = min(peak_bytes(lambda layer=layer, rows=rows: layer.topk(rows, 10)) for _ in range(2))
                found[f"{name} {dtype} {exact}".replace("torch.", "")] = taken / (size * V * ROWS)
    print(json.dumps(found))


if __name__ == "__main__":
    screen_rows.measure_plan = lambda *_: Plan(())  # nothing is timed
    with engine.forced(None):
        main()

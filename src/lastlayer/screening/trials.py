"""One screen tried on hidden states: how many candidates it needs, how well it agrees, how long a query takes."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.screening.exact import full_logits
from lastlayer.screening.int4_preview import Int4Preview
from lastlayer.screening.int8_preview import Int8Preview
from lastlayer.screening.preview import Preview
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.screening.svd_preview import SVDPreview

KL_ROWS = 128
ENOUGH_ROWS = 256  # queried for the agreement, also where time is short
SPARE = 1.5  # candidates, over what the tuning rows needed
CERTIFIED_CANDIDATES = {Int8Preview: 96, Int4Preview: 32}  # what could be better is rescored besides
Make = Callable[..., ScreenedSoftmax]  # of a preview and its settings
Query = Callable[[Tensor], object]


class Truth(NamedTuple):
    """What the full layer says of some hidden states."""

    hidden: Tensor  # (n, d)
    best: Tensor  # (n, k), best first

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, hidden: Tensor, k: int) -> "Truth":
        """Queries the full layer, few rows at a time."""
        rows = max(1, (1 << 25) // len(weight))
        best = [full_logits(part, weight, bias).topk(k).indices for part in hidden.split(rows)]
        return cls(hidden, torch.cat(best))


def tuned_screen(make: Make, preview: Preview, tuning: Truth, agreement: float, k: int) -> ScreenedSoftmax:
    """A screen with the candidates that the tuning rows needed, and some to spare."""
    screen = make(preview=preview, candidates=1)
    needed = []
    for hidden, best in zip(tuning.hidden.split(16), tuning.best.split(16), strict=True):
        scores = screen.preview_scores(hidden)
        of_best = scores.gather(-1, best).unsqueeze(-1)
        # a true class is kept if there are as many candidates as classes that score higher
        needed.append(torch.stack([(scores >= of_best[:, i]).sum(-1) for i in range(best.shape[-1])], dim=-1))
    ranks = torch.cat(needed).flatten().sort().values  # of the tuning rows' classes, not of all
    at = min(len(ranks) - 1, int(agreement * len(ranks)))
    candidates = int(SPARE * int(ranks[at]))
    screen.candidates = min(screen.out_features, max(candidates, 4 * k, 16))
    return screen


def described(preview: Preview, screen: ScreenedSoftmax | None = None) -> dict[str, Any]:
    """A record before any query; without a screen, of a preview that is not tried."""
    measured = ("certified_fraction", "ms", "full_ms", "ratio", "dropped")
    return {
        "preview": preview_name(preview),
        "window": preview.window if isinstance(preview, SVDPreview) else None,
        "candidates": None if screen is None else screen.candidates,
        **dict.fromkeys(("agreement_top1", "agreement_topk", "kl")),
        "bytes_read_fraction": None if screen is None else screen.bytes_read / screen.weight.nbytes,
        **dict.fromkeys(measured),
    }


def preview_name(preview: Preview) -> str:
    """What a table calls it."""
    if not isinstance(preview, SVDPreview):
        return "int8, certified" if isinstance(preview, Int8Preview) else "int4, calibrated, certified"
    kind = "SVD, plain" if preview.calibration is None else "SVD, calibrated"
    return f"{kind}, {preview.storage}" if preview.storage else kind


def quality(screen: ScreenedSoftmax, truth: Truth, k: int, seconds: float = math.inf) -> dict[str, Any]:
    """Agreement and divergence on held-out rows, so few at a time that the screen is used.

    After `seconds` no further rows are queried, once there are `ENOUGH_ROWS`.
    """
    rows = max(1, min(64, (screen.out_features - 1) // screen.candidates))
    found, certified, queried = [], [], 0
    end = time.perf_counter() + seconds
    for part in truth.hidden.split(rows):
        result = screen.topk(part, k)
        found.append(result.indices)
        certified.append(result.certified)
        queried += len(part)
        if queried >= ENOUGH_ROWS and time.perf_counter() > end:
            break
    indices, best = torch.cat(found), truth.best[:queried]
    kept = (indices.unsqueeze(-1) == best.unsqueeze(-2)).any(-2)  # (n, k): of the true ones
    return {
        "agreement_top1": float((indices[:, 0] == best[:, 0]).double().mean()),
        "agreement_topk": float(kept.double().mean()),
        "kl": _divergence(screen, truth.hidden[:KL_ROWS], rows),
        "certified_fraction": float(torch.cat(certified).double().mean()),
    }


def _divergence(screen: ScreenedSoftmax, hidden: Tensor, rows: int) -> float:
    total = 0.0
    for part in hidden.split(rows):
        full = full_logits(part, screen.weight, screen.bias).double().log_softmax(-1)
        total += float((full.exp() * (full - screen.log_prob(part).double())).sum())
    return max(0.0, total / len(hidden))


def query_times(queries: list[Query], hidden: Tensor, rounds: int, warmup: int) -> list[float]:
    """Milliseconds of a query of one hidden state, by each in turn; medians."""
    taken: list[list[float]] = [[] for _ in queries]
    for turn in range(-warmup, rounds):
        row = hidden[turn % len(hidden)][None]
        for query, times in zip(queries, taken, strict=True):
            start = time.perf_counter()
            query(row)
            if row.is_cuda:
                torch.cuda.synchronize()
            if turn >= 0:
                times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]

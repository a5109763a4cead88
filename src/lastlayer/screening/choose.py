"""choose_screen: which preview, window and candidates answer this layer's queries fastest, and still agree."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count, check_hidden
from lastlayer.functional.gram import gram_matrix
from lastlayer.screening.calibration import second_moment
from lastlayer.screening.exact import full_logits
from lastlayer.screening.int4_preview import Int4Preview
from lastlayer.screening.int8_preview import Int8Preview
from lastlayer.screening.preview import Preview
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.screening.svd_preview import SVDPreview
from lastlayer.screening.watched_head import check_head

LEAST_ROWS = 16  # hidden states below which halves say nothing
TUNING_ROWS, MEASURED_ROWS, KL_ROWS = 512, 2048, 128
ROUNDS = 15
ROOM = 1.5  # candidates beyond what the tuning rows needed
WINDOWS = (16, 8, 4)  # of the width: d/16, d/8, d/4
CERTIFIED_CANDIDATES = {Int8Preview: 96, Int4Preview: 32}  # what could be better is rescored besides
Make = Callable[..., ScreenedSoftmax]  # of a preview and its settings


class Truth(NamedTuple):
    """What the full layer says of some hidden states."""

    hidden: Tensor  # (n, d)
    best: Tensor  # (n, k), best first

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, hidden: Tensor, k: int) -> "Truth":
        """Asks the full layer, few rows at a time."""
        rows = max(1, (1 << 25) // len(weight))
        best = [full_logits(part, weight, bias).topk(k).indices for part in hidden.split(rows)]
        return cls(hidden, torch.cat(best))


@torch.no_grad()
def choose_screen(
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    hidden: Tensor,  # (n, d)
    *,
    agreement: float = 0.999,
    k: int = 1,
) -> tuple[ScreenedSoftmax, list[dict[str, Any]]]:
    """The fastest screen of a trained layer whose top-k agrees with the full layer's, and all that were tried.

    Calibrated and plain SVD previews of several windows, and the 8-bit and 4-bit previews with proof. The first
    half of the hidden states calibrates and says how many candidates are needed; the second, never seen by either,
    measures agreement, divergence and certificates. Times are of one query at a time, interleaved with the full
    layer.

    Args:
        weight, bias: the trained layer.
        hidden: at least 16 hidden states that the layer really meets; some thousands are better.
        agreement: share of the true top-k that the screen must keep on the held-out half.
        k: how many best classes matter.

    Returns:
        the screen, and one record for each that was tried, fastest first: `preview, window, candidates,
        agreement_top1, agreement_topk, kl, bytes_read_fraction, ms, full_ms, ratio, certified_fraction, chosen`.
        When no preview agrees by itself, the certified one is chosen: it agrees by proof.

    Raises:
        ValueError, TypeError: a layer that `ScreenedSoftmax` does not take; hidden states that do not fit, fewer
            than 16, or NaN; `agreement` outside (0, 1]; `k` above V.

    Cost: preparing each screen, and about `30 * n` queries of the full layer. When NOT to use it: within training.

    >>> import torch
    >>> from lastlayer import choose_screen
    >>> screen, table = choose_screen(torch.randn(2000, 32), None, torch.randn(64, 32))
    >>> sum(record["chosen"] for record in table)
    1
    """
    check_head(weight, bias)
    k = check_count("k", k, 1, len(weight))
    if not 0 < agreement <= 1:
        raise ValueError(f"agreement must be above 0 and at most 1, got {agreement}")
    rows = _checked(hidden, weight)
    first, second = rows.tensor_split(2)  # in their order: neighbours in a text are alike
    share = min(TUNING_ROWS, max(2, len(first) // 4))
    tuning = Truth.of(weight, bias, first[:share], k)
    measuring = Truth.of(weight, bias, second[:MEASURED_ROWS], k)

    make = partial(ScreenedSoftmax, weight, bias, gram=gram_matrix(weight))  # of the weight: once for all
    screens = [_certified(make, preview, k) for preview in (Int8Preview(), Int4Preview(calibration=first))]
    screens += [_tuned(make, preview, tuning, agreement, k) for preview in _previews(weight, first[share:])]
    records = [_measured(screen, measuring, k) for screen in screens]
    for record, ms, full_ms in zip(records, *_times(screens, second, k), strict=True):
        record |= {"ms": ms, "full_ms": full_ms, "ratio": full_ms / ms}
    agreeing = [i for i, record in enumerate(records) if record["agreement_topk"] >= agreement] or [0]
    best = min(agreeing, key=lambda i: records[i]["ms"])
    for i, record in enumerate(records):
        record["chosen"] = i == best
    return screens[best], sorted(records, key=lambda record: record["ms"])


def _checked(hidden: Tensor, weight: Tensor) -> Tensor:  # (n, d) in the weight's dtype
    check_hidden(hidden, weight.shape[-1])
    rows = hidden.reshape(-1, weight.shape[-1]).to(weight.dtype)
    if len(rows) < LEAST_ROWS:
        raise ValueError(f"hidden must hold at least {LEAST_ROWS} hidden states, got {len(rows)}")
    if not bool(rows.isfinite().all()):
        raise ValueError("hidden must be finite, got NaN or infinity")
    return rows


def _previews(weight: Tensor, hidden: Tensor) -> list[Preview]:
    width, calibration = weight.shape[-1], second_moment(hidden)
    windows = sorted({max(1, width // part) for part in WINDOWS})
    calibrated: list[Preview] = [
        SVDPreview(window, calibration=calibration, storage=storage)
        for window in windows
        for storage in ("float32", "bfloat16")
    ]
    return [*calibrated, SVDPreview(max(1, width // 8))]


def _certified(make: Make, preview: Preview, k: int) -> ScreenedSoftmax:
    screen = make(preview=preview, candidates=1, exact=True)
    screen.candidates = min(screen.out_features, max(CERTIFIED_CANDIDATES[type(preview)], 2 * k))
    return screen


def _tuned(make: Make, preview: Preview, tuning: Truth, agreement: float, k: int) -> ScreenedSoftmax:
    """A screen with the candidates that the tuning rows needed, and some room."""
    screen = make(preview=preview, candidates=1)
    needed = []
    for hidden, best in zip(tuning.hidden.split(16), tuning.best.split(16), strict=True):
        scores = screen.preview_scores(hidden)
        of_best = scores.gather(-1, best).unsqueeze(
            -1
        )  # a true class is kept if as many candidates as score higher
        needed.append(torch.stack([(scores >= of_best[:, i]).sum(-1) for i in range(best.shape[-1])], dim=-1))
    ranks = torch.cat(needed).flatten().sort().values  # of the tuning rows' classes, not of all
    at = min(len(ranks) - 1, int(agreement * len(ranks)))
    candidates = int(ROOM * int(ranks[at]))
    screen.candidates = min(screen.out_features, max(candidates, 4 * k, 16))
    return screen


def _measured(screen: ScreenedSoftmax, truth: Truth, k: int) -> dict[str, Any]:
    """Agreement and divergence on held-out rows, so few at a time that the screen is what answers."""
    rows = max(1, min(64, (screen.out_features - 1) // screen.candidates))
    found, certified = [], []
    for part in truth.hidden.split(rows):
        answer = screen.topk(part, k)
        found.append(answer.indices)
        certified.append(answer.certified)
    indices = torch.cat(found)
    kept = (indices.unsqueeze(-1) == truth.best.unsqueeze(-2)).any(-2)  # (n, k): of the true ones
    preview = screen.preview
    return {
        "preview": _name(preview),
        "window": preview.window if isinstance(preview, SVDPreview) else None,
        "candidates": screen.candidates,
        "agreement_top1": float((indices[:, 0] == truth.best[:, 0]).double().mean()),
        "agreement_topk": float(kept.double().mean()),
        "kl": _divergence(screen, truth.hidden[:KL_ROWS], rows),
        "bytes_read_fraction": screen.bytes_read / (screen.weight.nbytes),
        "certified_fraction": float(torch.cat(certified).double().mean()),
    }


def _name(preview: Preview) -> str:
    if not isinstance(preview, SVDPreview):
        return "int8, certified" if isinstance(preview, Int8Preview) else "int4, calibrated, certified"
    kind = "SVD, plain" if preview.calibration is None else "SVD, calibrated"
    return f"{kind}, {preview.storage}" if preview.storage else kind


def _divergence(screen: ScreenedSoftmax, hidden: Tensor, rows: int) -> float:
    total = 0.0
    for part in hidden.split(rows):
        full = full_logits(part, screen.weight, screen.bias).double().log_softmax(-1)
        total += float((full.exp() * (full - screen.log_prob(part).double())).sum())
    return max(0.0, total / len(hidden))


def _times(screens: list[ScreenedSoftmax], hidden: Tensor, k: int) -> tuple[list[float], list[float]]:
    """Milliseconds of one query of each screen, and of the full layer beside it; medians, interleaved."""
    layer = screens[0]
    weight, bias = layer.weight, layer.bias
    calls: list[Callable[[Tensor], object]] = [lambda row: full_logits(row, weight, bias).topk(k)]
    calls += [lambda row, screen=screen: screen.topk(row, k) for screen in screens]
    taken: list[list[float]] = [[] for _ in calls]
    for turn in range(-2, ROUNDS):
        for call, times in zip(calls, taken, strict=True):
            row = hidden[turn % len(hidden)][None]
            start = time.perf_counter()
            call(row)
            if row.is_cuda:
                torch.cuda.synchronize()
            if turn >= 0:
                times.append(1e3 * (time.perf_counter() - start))
    full, *of_screens = (statistics.median(times) for times in taken)
    return of_screens, [full] * len(screens)

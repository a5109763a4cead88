"""choose_screen: which preview, window and candidates compute this layer's top-k fastest, and still agree."""

import math
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
from lastlayer.screening.trials import (
    CERTIFIED_CANDIDATES,
    Make,
    Query,
    Truth,
    described,
    preview_name,
    quality,
    query_times,
    tuned_screen,
)
from lastlayer.screening.watched_head import check_head

LEAST_ROWS = 16  # hidden states below which halves say nothing
TUNING_ROWS, MEASURED_ROWS, FALLBACK_ROWS = 512, 2048, 64
ROUNDS, FEW = 15, 3
HOPELESS = 1.5  # times the full layer's time, from which a screen is dropped after a few queries
MOST_CANDIDATES = 0.5  # of the classes, above which rescoring reads about what the full layer does
LAST_START = 0.6  # of the time allowed, after which no further preview is prepared
WINDOWS = (8, 16, 4)  # parts of the width: d/8, d/16, d/4


class Progress(NamedTuple):
    """What `choose_screen` is about to do."""

    doing: str
    done: int  # steps, of `total`
    total: int
    seconds_left: float | None  # as far as it can be estimated


@torch.no_grad()
def choose_screen(
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    hidden: Tensor,  # (n, d)
    *,
    agreement: float = 0.999,
    k: int = 1,
    seconds: float = math.inf,
    on_progress: Callable[[Progress], object] = lambda progress: None,
) -> tuple[ScreenedSoftmax, list[dict[str, Any]]]:
    """The fastest screen of a trained layer whose top-k agrees with the full layer's, and all that were tried.

    The 8-bit and 4-bit previews with proof, and calibrated and plain SVD previews of several windows. The first
    half of the hidden states calibrates and says how many candidates are needed; the second, never seen by either,
    measures agreement, divergence and certificates. Times are of one query at a time, interleaved with the full
    layer. A screen that after a few queries is clearly slower than the full layer, or needs most classes as
    candidates, is dropped: its record says why, and has no agreement.

    Args:
        weight, bias: the trained layer.
        hidden: at least 16 hidden states that the layer really meets; some thousands are better.
        agreement: share of the true top-k that the screen must keep on the held-out half.
        k: how many best classes matter.
        seconds: about how long it may take; previews whose turn does not come are not tried, and their records say
            so. The first is always tried.
        on_progress: called before each step.

    Returns:
        the screen, and one record for each that was tried, fastest first: `preview, window, candidates,
        agreement_top1, agreement_topk, kl, bytes_read_fraction, ms, full_ms, ratio, certified_fraction, dropped,
        chosen`. When no preview agrees by itself, the certified one is chosen: it agrees by proof. Its `ratio` may
        be below 1, and then the full layer is the faster one.

    Raises:
        ValueError, TypeError: a layer that `ScreenedSoftmax` does not take; hidden states that do not fit, fewer
            than 16, or NaN; `agreement` outside (0, 1]; `k` above V; `seconds` that are not above 0.

    `lastlayer.study.report.frontier_page.save_frontier` draws the result, agreement against time, as a page.

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
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}")
    rows = _checked(hidden, weight)
    first, second = rows.tensor_split(2)  # in their order: neighbours in a text are alike
    share = min(TUNING_ROWS, max(2, len(first) // 4))
    clock = _Clock(seconds, on_progress)
    clock.step("querying the full layer")
    tuning = Truth.of(weight, bias, first[:share], k)
    measuring = Truth.of(weight, bias, second[:MEASURED_ROWS], k)
    # what is measured is the screen, also where it is the slower one; the Gram matrix is made once for all
    make = partial(ScreenedSoftmax, weight, bias, gram=gram_matrix(weight), use="screen")

    previews = _previews(weight, first, share)
    clock.total = len(previews) + 1
    trials = []
    for number, preview in enumerate(previews):
        if number and clock.is_late():
            trials.append(_Trial(None, described(preview) | {"dropped": "no time was left to try it"}))
            continue
        clock.step(f"trying {preview_name(preview)}")
        limit = seconds / (2 * len(previews))
        trials.append(_try(make, preview, len(weight), tuning, measuring, agreement, k, limit))
    clock.step("comparing their times")
    return _chosen(trials, measuring, agreement, k)


class _Trial(NamedTuple):
    screen: ScreenedSoftmax | None  # None: it was not tried
    record: dict[str, Any]


class _Clock:
    """Says what is done next and how long all of it will still take."""

    def __init__(self, seconds: float, on_progress: Callable[[Progress], object]) -> None:
        self.seconds, self.on_progress = seconds, on_progress
        self.start, self.done, self.total = time.perf_counter(), -1, 1

    def spent(self) -> float:
        return time.perf_counter() - self.start

    def is_late(self) -> bool:
        return self.spent() > LAST_START * self.seconds

    def step(self, doing: str) -> None:
        """The steps to come take as long as those before did, on the average, and no longer than is allowed."""
        self.done += 1
        left = None
        if self.done > 0:
            left = min(self.spent() / self.done * (self.total - self.done), max(0.0, self.seconds - self.spent()))
        self.on_progress(Progress(doing, self.done, self.total, left))


def _checked(hidden: Tensor, weight: Tensor) -> Tensor:  # (n, d) in the weight's dtype
    check_hidden(hidden, weight.shape[-1])
    rows = hidden.reshape(-1, weight.shape[-1]).to(weight.dtype)
    if len(rows) < LEAST_ROWS:
        raise ValueError(f"hidden must hold at least {LEAST_ROWS} hidden states, got {len(rows)}")
    if not bool(rows.isfinite().all()):
        raise ValueError("hidden must be finite, got NaN or infinity")
    return rows


def _previews(weight: Tensor, hidden: Tensor, tuning_rows: int) -> list[Preview]:
    """What is tried: the likeliest first, for where time is short."""
    width, calibration = weight.shape[-1], second_moment(hidden[tuning_rows:])
    windows = list(dict.fromkeys(max(1, width // part) for part in WINDOWS))
    of_window = [
        SVDPreview(window, calibration=calibration, storage=storage)
        for window in windows
        for storage in ("float32", "bfloat16")
    ]
    plain = SVDPreview(max(1, width // 8))
    return [Int8Preview(), *of_window[:2], Int4Preview(calibration=hidden), *of_window[2:], plain]


def _try(
    make: Make,
    preview: Preview,
    num_classes: int,
    tuning: Truth,
    measuring: Truth,
    agreement: float,
    k: int,
    limit: float,
) -> _Trial:
    """Tunes one screen; a few queries say whether it is worth measuring."""
    if isinstance(preview, SVDPreview):
        screen = tuned_screen(make, preview, tuning, agreement, k)
    else:
        candidates = min(num_classes, max(CERTIFIED_CANDIDATES[type(preview)], 2 * k))
        screen = make(preview=preview, candidates=candidates, exact=True)
    record = described(preview, screen)
    ms, full_ms = query_times([_query(screen, k), _full_query(screen, k)], measuring.hidden, FEW, 1)
    record |= {"ms": ms, "full_ms": full_ms, "ratio": full_ms / ms}
    if screen.candidates > max(MOST_CANDIDATES * screen.out_features, 4 * k):
        record["dropped"] = f"it needs {screen.candidates:,} of {screen.out_features:,} classes as candidates"
    elif ms > HOPELESS * full_ms:
        record["dropped"] = f"{ms / full_ms:.1f} times as slow as the full layer"
    else:
        record |= quality(screen, measuring, k, limit)
    return _Trial(screen, record)


def _query(screen: ScreenedSoftmax, k: int) -> Query:
    return lambda row: screen.topk(row, k)


def _full_query(screen: ScreenedSoftmax, k: int) -> Query:
    return lambda row: full_logits(row, screen.weight, screen.bias).topk(k)


def _chosen(
    trials: list[_Trial], measuring: Truth, agreement: float, k: int
) -> tuple[ScreenedSoftmax, list[dict[str, Any]]]:
    """Times those that were not dropped side by side; the fastest that agrees, or else a certified one."""
    left = [trial for trial in trials if trial.record["dropped"] is None]
    if not any(trial.screen is not None and trial.screen.exact for trial in left):
        proved = next(trial for trial in trials if trial.screen is not None and trial.screen.exact)
        assert proved.screen is not None
        few = Truth(measuring.hidden[:FALLBACK_ROWS], measuring.best[:FALLBACK_ROWS])
        proved.record.update(quality(proved.screen, few, k))
        left.append(proved)
    screens = [trial.screen for trial in left if trial.screen is not None]
    queries = [_full_query(screens[0], k), *(_query(screen, k) for screen in screens)]
    full_ms, *times = query_times(queries, measuring.hidden, ROUNDS, 2)
    for trial, ms in zip(left, times, strict=True):
        trial.record.update({"ms": ms, "full_ms": full_ms, "ratio": full_ms / ms})
    agreeing = [t for t in left if t.record["agreement_topk"] >= agreement]
    agreeing = agreeing or [t for t in left if t.screen is not None and t.screen.exact]
    best = min(agreeing, key=lambda trial: trial.record["ms"])
    for trial in trials:
        trial.record["chosen"] = trial is best
    assert best.screen is not None
    best.screen.use = "fastest"
    best.screen.plan(measuring.hidden)  # with the candidates that it has now, on real hidden states
    records = sorted((trial.record for trial in trials), key=lambda r: math.inf if r["ms"] is None else r["ms"])
    return best.screen, records

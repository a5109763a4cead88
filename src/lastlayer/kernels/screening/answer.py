"""From summarised scores to an answer: exact logits of candidates, certificate, widening, normaliser."""

from typing import Any

import numpy as np
from numba import njit

from lastlayer.kernels.fast_math import exp, load
from lastlayer.kernels.screening.blocks import FAST, MINUS_INFINITY, largest, summarise_one, summarise_part
from lastlayer.kernels.screening.choose import choose
from lastlayer.kernels.screening.threads import apart

FEW = 1 << 17  # numbers that one thread reads before others are asked to help
UNCERTIFIED, CERTIFIED = 0, 1  # what became of a row
DENSE = 2  # too much is in play: ask the full layer
BAD = 3  # not finite, or so large that float32 could overflow


@njit(cache=True, fastmath=FAST)
def _rescore_part(
    worker: int, workers: int, weight: Any, bias: Any, hidden: Any, classes: Any, logits: Any
) -> None:
    share = (classes.size + workers - 1) // workers
    for n in range(worker * share, min((worker + 1) * share, classes.size)):
        row = weight[classes[n]]
        total = np.float32(0.0)
        for j in range(hidden.size):
            total += load(row[j]) * hidden[j]
        logits[n] = total + bias[classes[n]]


@njit(cache=True)
def _rescore(weight: Any, bias: Any, hidden: Any, classes: Any, workers: int) -> Any:
    """Exact logits of some classes."""
    logits = np.empty(classes.size, dtype=np.float32)
    if workers > 1 and logits.size * hidden.size > FEW:
        apart(_rescore_part, workers, (workers, weight, bias, hidden, classes, logits))  # pyright: ignore
    else:
        _rescore_part(0, 1, weight, bias, hidden, classes, logits)
    return logits


@njit(cache=True)
def _insert(logits: Any, classes: Any, values: Any, indices: Any, filled: int) -> Any:
    """Keeps the best of `logits` in `values`, sorted, of which `filled` are in use already."""
    k = values.size
    for n in range(logits.size):
        z = logits[n]
        if filled == k and not z > values[k - 1]:
            continue
        at = min(filled, k - 1)
        while at > 0 and values[at - 1] < z:
            values[at], indices[at] = values[at - 1], indices[at - 1]
            at -= 1
        values[at], indices[at] = z, classes[n]
        filled = min(filled + 1, k)
    return filled


@njit(cache=True)
def _set_aside(
    scores: Any, classes: Any, size: int, block_max: Any, block_sum: Any, keep_max: bool, workers: int
) -> None:
    """Takes rescored classes out of the scores and of their blocks' sums; of their maxima unless `keep_max`."""
    if classes.size > block_max.size:  # most blocks change
        for i in classes:
            scores[i] = MINUS_INFINITY
        summarise_one(scores, size, block_max, block_sum, workers)
        return
    left = block_sum.copy()
    touched = np.zeros(block_max.size, dtype=np.uint8)
    for i in classes:
        block = i // size
        left[block] -= exp(scores[i] - block_max[block])
        touched[block] = 1
        scores[i] = MINUS_INFINITY
    for block in range(block_max.size):
        if not touched[block]:
            continue
        first, last = block * size, min((block + 1) * size, scores.size)
        if left[block] < np.float32(0.05) * block_sum[block]:  # what cancelled leaves too few digits
            summarise_part(scores, first, last, size, block_max, block_sum)
        elif keep_max:  # not the largest any more, but no smaller than it
            block_sum[block] = left[block]
        else:
            most = largest(scores[first:last])
            block_sum[block] = left[block] * np.exp(block_max[block] - most)
            block_max[block] = most


@njit(cache=True)
def _upper_bounds(of_row: Any, of_classes: Any, scores: Any, first: int, last: int) -> Any:
    """What the logits of `scores[first:last]` can be at most."""
    upper = scores[first:last].copy()
    for m in range(of_row.size):
        of_part, share = of_classes[m, first:last], of_row[m]
        for i in range(upper.size):
            upper[i] += share * of_part[i]
    return upper


@njit(cache=True)
def _in_play(
    scores: Any, of_row: Any, of_classes: Any, of_blocks: Any, size: int, block_max: Any, kth: Any, most: int
) -> Any:
    """The first `most` classes not set aside whose logit could reach `kth`: blocks first, by their bounds."""
    found = np.empty(most, dtype=np.int32)
    n = 0
    of_block = _upper_bounds(of_row, of_blocks, block_max, 0, block_max.size)
    for block in range(block_max.size):
        if of_block[block] < kth:
            continue
        first, last = block * size, min((block + 1) * size, scores.size)
        upper = _upper_bounds(of_row, of_classes, scores, first, last)
        for i in range(first, last):
            if not upper[i - first] < kth and scores[i] > MINUS_INFINITY:
                found[n] = i
                n += 1
                if n == most:
                    return found
    return found[:n]


@njit(cache=True, fastmath=FAST)
def _log_sum_exp(block_max: Any, block_sum: Any, best: float, rescored_sum: float) -> Any:
    """Of all classes: the blocks' summaries and the rescored logits' exponentials relative to `best`."""
    most = best
    for block in range(block_max.size):
        most = max(most, block_max[block])
    total = rescored_sum * np.exp(float(best - most))
    for block in range(block_max.size):
        total += float(block_sum[block] * exp(block_max[block] - most))
    return most + np.log(total)


@njit(cache=True, fastmath=FAST)
def _sum_exp(logits: Any, most: float) -> Any:
    total = np.float32(0.0)
    for n in range(logits.size):
        total += exp(logits[n] - most)
    return float(total)


@njit(cache=True)
def _put(final: Any, classes: Any, logits: Any) -> None:
    if final.size:
        for n in range(classes.size):
            final[classes[n]] = logits[n]


@njit(cache=True)
def answer(
    scores: Any,  # (V,) float32; overwritten
    block_max: Any,  # (blocks,) float32; overwritten
    block_sum: Any,  # (blocks,) float32; overwritten
    size: int,
    of_row: Any,  # (m,) float32
    of_classes: Any,  # (m, V) float32
    of_blocks: Any,  # (m, blocks) float32: the largest of each block
    weight: Any,  # (V, d) float32, or the bits of bfloat16 as int16, of float16 as uint16
    bias: Any,  # (V,) float32
    hidden: Any,  # (d,) float32
    candidates: int,
    exact: bool,
    workers: int,  # for the rescoring of one row; 1 where rows are spread over workers already
    log_prob: Any,  # (k,) float32, out
    indices: Any,  # (k,) int64, out
    log_normalizer: Any,  # (1,) float32, out
    final: Any,  # (V,) float32, out: the scores, exact logits where there are any; or (0,)
) -> int:
    """Top-k of one row from its summarised scores: UNCERTIFIED, CERTIFIED, or DENSE (then nothing is put out)."""
    if final.size:
        final[:] = scores
    chosen = choose(scores, block_max, size, candidates)
    logits = _rescore(weight, bias, hidden, chosen, workers)
    _put(final, chosen, logits)
    filled = _insert(logits, chosen, log_prob, indices, 0)
    best, kth = log_prob[0], log_prob[-1]
    total = _sum_exp(logits, best)
    _set_aside(scores, chosen, size, block_max, block_sum, not exact, workers)
    most = scores.size // 4 + 1 if exact else 1
    found = _in_play(scores, of_row, of_classes, of_blocks, size, block_max, kth, most)
    certified = found.size == 0
    if exact and not certified:
        if found.size == most:
            return DENSE
        logits = _rescore(weight, bias, hidden, found, workers)
        _put(final, found, logits)
        _insert(logits, found, log_prob, indices, filled)
        total = total * np.exp(float(best - log_prob[0]))
        best = log_prob[0]
        total += _sum_exp(logits, best)
        _set_aside(scores, found, size, block_max, block_sum, True, workers)
        certified = True
    log_normalizer[0] = _log_sum_exp(block_max, block_sum, best, total)
    for n in range(log_prob.size):
        log_prob[n] -= log_normalizer[0]
    return CERTIFIED if certified else UNCERTIFIED


@njit(cache=True)
def _answer_some(
    worker: int,
    workers: int,
    scores: Any,
    block_max: Any,
    block_sum: Any,
    size: int,
    of_rows: Any,
    of_classes: Any,
    of_blocks: Any,
    weight: Any,
    bias: Any,
    hidden: Any,
    candidates: int,
    exact: bool,
    log_prob: Any,
    indices: Any,
    log_normalizer: Any,
    final: Any,
    status: Any,
) -> None:
    for row in range(worker, len(scores), workers):
        status[row] = answer(
            scores[row],
            block_max[row],
            block_sum[row],
            size,
            of_rows[row],
            of_classes,
            of_blocks,
            weight,
            bias,
            hidden[row],
            candidates,
            exact,
            1,
            log_prob[row],
            indices[row],
            log_normalizer[row],
            final[row],
        )


@njit(cache=True)
def answer_rows(workers: int, *given: Any) -> None:
    """`answer` of every row, spread over workers: its arrays with a leading N, and `status (N,)` int64, out."""
    apart(_answer_some, workers, (workers,) + given)  # noqa: RUF005  # pyright: ignore[reportCallIssue]


@njit(cache=True)
def _answer_some_dense(
    worker: int,
    workers: int,
    logits: Any,
    block_max: Any,
    block_sum: Any,
    size: int,
    log_prob: Any,
    indices: Any,
    log_normalizer: Any,
) -> None:
    for row in range(worker, len(logits), workers):
        chosen = choose(logits[row], block_max[row], size, log_prob.shape[1])
        values = np.empty(chosen.size, dtype=np.float32)
        for n in range(chosen.size):
            values[n] = logits[row, chosen[n]]
        _insert(values, chosen, log_prob[row], indices[row], 0)
        log_normalizer[row, 0] = _log_sum_exp(block_max[row], block_sum[row], log_prob[row, 0], 0.0)
        for n in range(log_prob.shape[1]):
            log_prob[row, n] -= log_normalizer[row, 0]


@njit(cache=True)
def answer_dense(
    workers: int,
    logits: Any,  # (N, V) float32
    block_max: Any,  # (N, blocks) float32
    block_sum: Any,  # (N, blocks) float32
    size: int,
    log_prob: Any,  # (N, k) float32, out
    indices: Any,  # (N, k) int64, out
    log_normalizer: Any,  # (N, 1) float32, out
) -> None:
    """Top-k and normaliser of summarised logits that are exact already."""
    given = workers, logits, block_max, block_sum, size, log_prob, indices, log_normalizer
    apart(_answer_some_dense, workers, given)  # pyright: ignore[reportCallIssue]

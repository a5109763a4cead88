"""From summarised scores to an answer: exact logits of candidates, certificate, widening, normaliser."""

# pyright: reportArgumentType=false
# (a number written out is a type of its own to numba: `np.int64(0)` saves another compilation)

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from lastlayer.kernels.apart import apart
from lastlayer.kernels.fast_math import exp, load
from lastlayer.kernels.screening.blocks import FAST, MINUS_INFINITY, largest, summarise_one, summarise_part
from lastlayer.kernels.screening.choose import choose

FEW = 1 << 17  # numbers that one thread reads before others are asked to help
WIDENED = 64  # blocks that one thread looks through before others are asked to help
# what became of a row
ANSWERED = 0
DENSE = 1  # too much is in play: ask the full layer
BAD = 2  # not finite, or so large that float32 could overflow


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
        _rescore_part(np.int64(0), np.int64(1), weight, bias, hidden, classes, logits)
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
def _upper_bounds(of_row: Any, of_classes: Any, scores: Any, first: int, upper: Any) -> None:
    """What the logits of the `scores` from `first` on can be at most, as many as `upper` has room for."""
    last = first + upper.size
    of_part = scores[first:last]
    for i in range(upper.size):
        upper[i] = of_part[i]
    for m in range(of_row.size):
        of_part, share = of_classes[m, first:last], of_row[m]
        for i in range(upper.size):
            upper[i] += share * of_part[i]


@njit(cache=True)
def _in_play(
    worker: int,
    workers: int,
    room: Any,
    layer: Any,
    kth: Any,
    found: Any,  # out
) -> int:
    """How many of a worker's classes, not set aside, have a logit that could reach `kth`: blocks first, by bounds.

    Stops when `found` is full. Blocks go to the workers in turn, as frequent classes have ids close to each other.
    """
    scores, block_max, _, of_row = room
    size, n = layer.size, 0
    of_blocks, room_of_block = np.empty(block_max.size, dtype=np.float32), np.empty(size, dtype=np.float32)
    _upper_bounds(of_row, layer.of_blocks, block_max, np.int64(0), of_blocks)
    for block in range(worker, block_max.size, workers):
        if of_blocks[block] < kth:
            continue
        first = block * size
        upper = room_of_block[: min(size, scores.size - first)]
        _upper_bounds(of_row, layer.of_classes, scores, first, upper)
        if largest(upper) < kth:
            continue
        for i in range(upper.size):
            if not upper[i] < kth and scores[first + i] > MINUS_INFINITY:
                found[n] = first + i
                n += 1
                if n == found.size:
                    return n
    return n


@njit(cache=True)
def _widen_part(
    worker: int,
    workers: int,
    room: Any,
    layer: Any,
    hidden: Any,
    kth: Any,
    classes: Any,
    logits: Any,
    counts: Any,
) -> None:
    share = classes.size // workers
    mine = classes[worker * share : (worker + 1) * share]
    counts[worker] = _in_play(worker, workers, room, layer, kth, mine)
    if counts[worker] < share:
        given = layer.weight, layer.bias, hidden, mine[: counts[worker]]
        _rescore_part(0, 1, *given, logits[worker * share : (worker + 1) * share])


@njit(cache=True)
def _widen(room: Any, layer: Any, hidden: Any, kth: Any, workers: int) -> Any:
    """All classes in play and their exact logits; or whether they are too many for that."""
    scores = room.scores
    if room.block_max.size < WIDENED * workers:
        workers = 1
    share = scores.size // 4 // workers + 1
    classes, logits = np.empty(share * workers, dtype=np.int32), np.empty(share * workers, dtype=np.float32)
    counts = np.zeros(workers, dtype=np.int64)
    if workers == 1:
        _widen_part(np.int64(0), np.int64(1), room, layer, hidden, kth, classes, logits, counts)
    else:
        given = workers, room, layer, hidden, kth, classes, logits, counts
        apart(_widen_part, workers, given)  # pyright: ignore[reportCallIssue]
    n = counts[0]
    for worker in range(1, workers):
        for m in range(worker * share, worker * share + counts[worker]):
            classes[n], logits[n] = classes[m], logits[m]
            n += 1
    return classes[:n], logits[:n], counts.max() == share


@njit(cache=True, fastmath=FAST)
def _log_sum_exp(block_max: Any, block_sum: Any, best: float, rescored_sum: float) -> Any:
    """Of all classes: the blocks' summaries and the rescored logits' exponentials relative to `best`."""
    most = best
    for block in range(block_max.size):
        most = max(most, block_max[block])
    total = rescored_sum * np.exp(float(best - most))
    for block in range(block_max.size):
        total += float(block_sum[block] * exp(block_max[block] - most))
    return np.float64(most) + np.log(np.float64(total))


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


class Room(NamedTuple):
    """Summarised scores of one row, which an answer overwrites, and the row's part of the error bound."""

    scores: Any  # (V,) float32
    block_max: Any  # (blocks,) float32
    block_sum: Any  # (blocks,) float32
    of_row: Any  # (m,) float32


class Layer(NamedTuple):
    """What is screened, and the classes' part of the error bound."""

    size: int  # of a block
    candidates: int
    of_classes: Any  # (m, V) float32
    of_blocks: Any  # (m, blocks) float32: the largest of each block
    weight: Any  # (V, d) float32, or the bits of bfloat16 as int16, of float16 as uint16
    bias: Any  # (V,) float32


class Asked(NamedTuple):
    """One row's question, and where its answer goes."""

    hidden: Any  # (d,) float32
    exact: Any
    log_prob: Any  # (k,) float32, out
    indices: Any  # (k,) int64, out
    certified: Any  # (1,) bool, out
    log_normalizer: Any  # (1,) float32, out
    final: Any  # (V,) float32, out: the scores, exact logits where there are any; or (0,)


@njit(cache=True)
def answer(
    room: Any,
    layer: Any,
    asked: Any,
    workers: int,  # 1 where rows are spread over workers already
) -> int:
    """Top-k of one row from its summarised scores: ANSWERED, or DENSE (then the answer is still to be made)."""
    scores, block_max, block_sum, _ = room
    size, candidates, _, _, weight, bias = layer
    hidden, exact, log_prob, indices, certified, log_normalizer, final = asked
    if final.size:
        for i in range(final.size):
            final[i] = scores[i]
    chosen = choose(scores, block_max, size, candidates)
    logits = _rescore(weight, bias, hidden, chosen, workers)
    _put(final, chosen, logits)
    filled = _insert(logits, chosen, log_prob, indices, np.int64(0))
    best, kth = log_prob[0], log_prob[-1]
    total = _sum_exp(logits, best)
    _set_aside(scores, chosen, size, block_max, block_sum, not exact, workers)
    if exact:
        more, logits, too_many = _widen(room, layer, hidden, kth, workers)
        if too_many:
            return DENSE
        _put(final, more, logits)
        _insert(logits, more, log_prob, indices, filled)
        total = total * np.exp(float(best - log_prob[0]))
        best = log_prob[0]
        total += _sum_exp(logits, best)
        _set_aside(scores, more, size, block_max, block_sum, np.bool_(True), workers)
        certified[0] = True
    else:
        certified[0] = _in_play(np.int64(0), np.int64(1), room, layer, kth, np.empty(1, dtype=np.int32)) == 0
    normalizer = _log_sum_exp(block_max, block_sum, best, total)  # in float64, as the logits may be large
    log_normalizer[0] = normalizer
    for n in range(log_prob.size):
        log_prob[n] = np.float64(log_prob[n]) - normalizer
    return ANSWERED


@njit(cache=True)
def _answer_some(worker: int, workers: int, helpers: int, rooms: Any, layer: Any, asked: Any, status: Any) -> None:
    scores, block_max, block_sum, of_rows = rooms
    hidden, exact, log_prob, indices, certified, log_normalizer, final = asked
    for n in range(worker, len(scores), workers):
        room = Room(scores[n], block_max[n], block_sum[n], of_rows[n])
        answers = log_prob[n], indices[n], certified[n : n + 1], log_normalizer[n], final[n]
        status[n] = answer(room, layer, Asked(hidden[n], exact, *answers), helpers)


@njit(cache=True)
def answer_rows(workers: int, rooms: Any, layer: Any, asked: Any, status: Any) -> None:
    """`answer` of every row, spread over workers: arrays with a leading N, but the layer's; `status (N,)`, out."""
    if len(status) == 1:
        _answer_some(np.int64(0), np.int64(1), workers, rooms, layer, asked, status)
    else:
        apart(_answer_some, workers, (workers, 1, rooms, layer, asked, status))  # pyright: ignore[reportCallIssue]


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
        _insert(values, chosen, log_prob[row], indices[row], np.int64(0))
        normalizer = _log_sum_exp(block_max[row], block_sum[row], log_prob[row, 0], 0.0)
        log_normalizer[row, 0] = normalizer
        for n in range(log_prob.shape[1]):
            log_prob[row, n] = np.float64(log_prob[row, n]) - normalizer


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

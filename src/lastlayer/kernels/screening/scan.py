"""Passes over a preview: scores of all classes, summarised while they are in the cache."""

from typing import Any

import numpy as np
from numba import njit

from lastlayer.kernels.apart import apart
from lastlayer.kernels.fast_math import FLAGS, load
from lastlayer.kernels.screening.blocks import FAST, summarise_part
from lastlayer.kernels.screening.dots import ROWS, pointer_at, score_rows, unsigned_extra

TILE = 16  # blocks scored before they are summarised
TURNED_AT_ONCE = 64  # products whose sum may lose digits
STRIP = 16  # classes whose products stay in the first cache while they are transposed


@njit(cache=True)
def share_of(worker: int, workers: int, classes: int, size: int) -> tuple[int, int]:
    """The classes that are this worker's: whole tiles."""
    tile = TILE * size
    share = ((classes + tile - 1) // tile + workers - 1) // workers * tile
    return min(worker * share, classes), min((worker + 1) * share, classes)


@njit(cache=True, fastmath=FLAGS)
def norm_of(vector: Any) -> Any:
    """The Euclidean norm, summed in float64; not finite where a number is not."""
    total = 0.0
    for j in range(vector.size):
        total += np.float64(vector[j]) * np.float64(vector[j])
    return np.sqrt(total)


@njit(cache=True)
def split_in_two(
    hidden: Any,  # (d,) float32
    high: Any,  # (>= d,) int8, out
    low: Any,  # the same, out
) -> Any:
    """`hidden` as two int8 vectors: their steps, and the norm of what is left over."""
    most = 0.0
    for j in range(hidden.size):
        most = max(most, abs(np.float64(hidden[j])))
    step_high = np.float32(most / 127) if most > 0 else np.float32(1.0)
    most = 0.0
    for j in range(hidden.size):
        high[j] = np.int8(np.rint(np.float64(hidden[j]) / step_high))
        most = max(most, abs(np.float64(hidden[j]) - np.float64(step_high) * high[j]))
    step_low = np.float32(most / 127) if most > 0 else np.float32(1.0)
    left = 0.0
    for j in range(hidden.size):
        rest = np.float64(hidden[j]) - np.float64(step_high) * high[j]
        low[j] = np.int8(np.rint(rest / step_low))
        left += (rest - np.float64(step_low) * low[j]) ** 2
    return step_high, step_low, np.sqrt(left)


@njit(cache=True, fastmath=FAST)
def _scan_int8_part(
    worker: int,
    workers: int,
    rows: Any,
    scale: Any,
    bias: Any,
    high: Any,
    low: Any,
    step_high: float,
    step_low: float,
    size: int,
    scores: Any,
    block_max: Any,
    block_sum: Any,
) -> None:
    first, last = share_of(worker, workers, len(rows), size)
    width = rows.shape[1]
    extra_high, extra_low = unsigned_extra(high), unsigned_extra(low)
    high_at, low_at = pointer_at(high, 0), pointer_at(low, 0)  # pyright: ignore
    for start in range(first, last, TILE * size):
        end = min(start + TILE * size, last)
        whole = start + (end - start) // ROWS * ROWS
        for i in range(start, whole, ROWS):
            given = high_at, low_at, extra_high, extra_low, step_high, step_low
            score_rows(pointer_at(rows, i * width), width, *given, scores, i)  # pyright: ignore
        part, of_scale, of_bias = scores[start:whole], scale[start:whole], bias[start:whole]
        for i in range(part.size):
            part[i] = of_scale[i] * part[i] + of_bias[i]
        for i in range(whole, end):
            of_high, of_low = np.int32(0), np.int32(0)
            for j in range(width):
                of_high = np.int32(of_high + np.int32(rows[i, j]) * np.int32(high[j]))
                of_low = np.int32(of_low + np.int32(rows[i, j]) * np.int32(low[j]))
            scores[i] = scale[i] * (step_high * np.float32(of_high) + step_low * np.float32(of_low)) + bias[i]
        summarise_part(scores, start, end, size, block_max, block_sum)


@njit(cache=True)
def scan_int8(
    rows: Any,  # (V, w) int8, w a multiple of LANES, zero beyond the vectors' own width
    scale: Any,  # (V,) float32
    bias: Any,  # (V,) float32
    high: Any,  # (w,) int8
    low: Any,  # (w,) int8
    step_high: float,
    step_low: float,
    size: int,
    workers: int,
    scores: Any,  # (V,) float32, out
    block_max: Any,  # (ceil(V / size),) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores `scale * rows @ (step_high * high + step_low * low) + bias` and their summary; reads `rows` once."""
    given = workers, rows, scale, bias, high, low, step_high, step_low, size, scores, block_max, block_sum
    if workers == 1:
        _scan_int8_part(0, *given)
    else:
        apart(_scan_int8_part, workers, given)  # pyright: ignore[reportCallIssue]


@njit(cache=True, fastmath=FAST)
def add_columns(columns: Any, hidden: Any, begin: int, stop: int, first: int, last: int, sums: Any) -> None:
    """Adds `hidden[begin:stop] @ columns[begin:stop, first:last]` to `sums`."""
    whole = begin + (stop - begin) // 4 * 4
    for j in range(begin, whole, 4):  # four at once, so that a sum is fetched and put back a quarter as often
        a, b, c, d = hidden[j], hidden[j + 1], hidden[j + 2], hidden[j + 3]
        of_a, of_b, of_c, of_d = (
            columns[j, first:last],
            columns[j + 1, first:last],
            columns[j + 2, first:last],
            columns[j + 3, first:last],
        )
        for i in range(sums.size):
            sums[i] += (load(of_a[i]) * a + load(of_b[i]) * b) + (load(of_c[i]) * c + load(of_d[i]) * d)
    for j in range(whole, stop):
        of_a, a = columns[j, first:last], hidden[j]
        for i in range(sums.size):
            sums[i] += load(of_a[i]) * a


@njit(cache=True, fastmath=FAST)
def _scan_float_part(
    worker: int,
    workers: int,
    columns: Any,
    hidden: Any,
    bias: Any,
    size: int,
    scores: Any,
    block_max: Any,
    block_sum: Any,
) -> None:
    first, last = share_of(worker, workers, columns.shape[1], size)
    for start in range(first, last, TILE * size):
        end = min(start + TILE * size, last)
        part, of_bias = scores[start:end], bias[start:end]
        for i in range(part.size):
            part[i] = of_bias[i]
        add_columns(columns, hidden, 0, len(hidden), start, end, part)
        summarise_part(scores, start, end, size, block_max, block_sum)


@njit(cache=True)
def scan_float(
    columns: Any,  # (w, V) float32, or the bits of bfloat16 as int16
    hidden: Any,  # (w,) float32
    bias: Any,  # (V,) float32
    size: int,
    workers: int,
    scores: Any,  # (V,) float32, out
    block_max: Any,  # (ceil(V / size),) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores `hidden @ columns + bias` and their summary; reads `columns` once.

    By columns, as no sum then runs across a vector of numbers.
    """
    given = workers, columns, hidden, bias, size, scores, block_max, block_sum
    if workers == 1:
        _scan_float_part(0, *given)
    else:
        apart(_scan_float_part, workers, given)  # pyright: ignore[reportCallIssue]


@njit(cache=True, fastmath=FLAGS)
def rotate(
    hidden: Any,  # (d,) float32
    to_head: Any,  # (w, d) float64
    to_tail: Any,  # (d - w, d) float32
    head: Any,  # (w,) float32, out
) -> Any:
    """`to_head @ hidden` by float64 sums; returns the norms of `hidden` and of `to_tail @ hidden`."""
    tail = 0.0
    exact = hidden.astype(np.float64)
    for i in range(head.size):
        total = 0.0
        for j in range(exact.size):
            total += to_head[i, j] * exact[j]
        head[i] = total
    for i in range(len(to_tail)):
        of_tail = np.float32(0.0)
        for j in range(hidden.size):
            of_tail += to_tail[i, j] * hidden[j]
        tail += np.float64(of_tail) ** 2
    return norm_of(hidden), np.sqrt(tail)


@njit(cache=True, fastmath=FAST)
def _turn_part(worker: int, workers: int, hidden: Any, matrix: Any, totals: Any) -> None:
    """A worker's rows of the matrix, which lie one after another, and their share of the sums."""
    unit = TURNED_AT_ONCE
    share = ((hidden.size + unit - 1) // unit + workers - 1) // workers * unit
    total, part = totals[worker], np.empty(totals.shape[1], dtype=np.float32)
    total[:] = 0
    for start in range(worker * share, min((worker + 1) * share, hidden.size), unit):
        part[:] = 0
        add_columns(matrix, hidden, start, min(start + unit, hidden.size), 0, part.size, part)
        for i in range(part.size):
            total[i] += float(part[i])


@njit(cache=True)
def turn(
    hidden: Any,  # (d,) float32
    matrix: Any,  # (d, w) float32, or the bits of bfloat16 as int16
    workers: int,
    turned: Any,  # (w,) float32, out
) -> None:
    """`hidden @ matrix`; TURNED_AT_ONCE products are summed in float32, their sums in float64."""
    totals = np.empty((workers, turned.size))
    if workers == 1:
        _turn_part(0, 1, hidden, matrix, totals)
    else:
        apart(_turn_part, workers, (workers, hidden, matrix, totals))  # pyright: ignore[reportCallIssue]
    for i in range(turned.size):
        total = 0.0
        for worker in range(workers):
            total += totals[worker, i]
        turned[i] = total


@njit(cache=True, fastmath=FAST)
def _combine_int8_part(
    worker: int,
    workers: int,
    products: Any,
    begin: int,
    scale: Any,
    bias: Any,
    step_high: Any,
    step_low: Any,
    size: int,
    scores: Any,
    block_max: Any,
    block_sum: Any,
) -> None:
    rows, tile = len(scores), TILE * size
    beside = np.empty((STRIP, rows), dtype=np.float32)
    begins, ends = share_of(worker, workers, len(products), size)
    for first in range(begins, ends, tile):
        last = min(first + tile, ends)
        for start in range(first, last, STRIP):
            strip, i = min(STRIP, last - start), begin + start
            for j in range(strip):
                of_high, of_low = products[start + j, :rows], products[start + j, rows : 2 * rows]
                own, scale_of, bias_of = beside[j], scale[i + j], bias[i + j]
                for n in range(rows):
                    both = step_high[n] * np.float32(of_high[n]) + step_low[n] * np.float32(of_low[n])
                    own[n] = scale_of * both + bias_of
            for n in range(rows):  # a vector of the loop above holds the numbers of many rows: turned round here
                part = scores[n, i : i + strip]
                for j in range(strip):
                    part[j] = beside[j, n]
        for n in range(rows):
            summarise_part(scores[n], begin + first, begin + last, size, block_max[n], block_sum[n])


@njit(cache=True)
def combine_int8(
    workers: int,
    products: Any,  # (R, M) int32 of classes from `begin` on: columns of high parts, then of low parts
    begin: int,  # a multiple of the tile
    scale: Any,  # (V,) float32
    bias: Any,  # (V,) float32
    step_high: Any,  # (N,) float32
    step_low: Any,  # (N,) float32
    size: int,
    scores: Any,  # (N, V) float32, out
    block_max: Any,  # (N, blocks) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores and their summary from integer products, by tiles that stay in the cache."""
    given = workers, products, begin, scale, bias, step_high, step_low, size, scores, block_max, block_sum
    apart(_combine_int8_part, workers, given)  # pyright: ignore[reportCallIssue]

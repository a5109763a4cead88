"""One pass over 8-bit rows for many hidden states, by AMX: scores, summarised while they are in the cache."""

from typing import Any

import numpy as np
from numba import njit

from lastlayer.kernels.apart import apart
from lastlayer.kernels.cache_hints import fetch_row
from lastlayer.kernels.screening.blocks import MINUS_INFINITY
from lastlayer.kernels.screening.lanes import put_together, sum_exponentials, transpose, zero_lines
from lastlayer.kernels.screening.scan import norm_of, share_of, split_in_two
from lastlayer.kernels.screening.tiles import DEPTH, PAIR, SIDE, begin_tiles, end_tiles, multiply_pairs


@njit(cache=True)
def _pack_some(
    worker: int,
    workers: int,
    hidden: Any,  # (N, w) float32
    right: Any,  # (groups, padded w / 64, 2, 16, 64) int8, zeros; out
    steps: Any,  # (groups, 2, 16) float32, out
    of_rows: Any,  # (N, 2), out: norm, and norm of what is left over
) -> None:
    """Hidden states in two int8 parts, as `multiply_pairs` takes them: of each 16 the high parts, then the low."""
    width = hidden.shape[1]
    high, low = np.empty(width, dtype=np.int8), np.empty(width, dtype=np.int8)
    for row in range(worker, len(hidden), workers):
        group, column = row // SIDE, row % SIDE
        of_rows[row, 0] = norm_of(hidden[row])
        steps[group, 0, column], steps[group, 1, column], of_rows[row, 1] = split_in_two(hidden[row], high, low)
        for j in range(width):
            line, place = right[group, j // DEPTH], (j % DEPTH // 4, 4 * column + j % 4)
            line[0][place], line[1][place] = high[j], low[j]


@njit(cache=True)
def _copy(given: Any, into: Any) -> None:
    """`into[: len(given)] = given`, which takes numba seconds to compile."""
    for row in range(len(given)):
        for j in range(given.shape[1]):
            into[row, j] = given[row, j]


@njit(cache=True)
def _scan_rows_part(
    worker: int,
    workers: int,
    rows: Any,
    scale: Any,
    bias: Any,
    right: Any,
    steps: Any,
    size: int,
    scores: Any,
    block_max: Any,
    block_sum: Any,
) -> None:
    first, last = share_of(worker, workers, len(rows), size)
    products = zero_lines(4 * PAIR * PAIR).view(np.int32).reshape(PAIR, PAIR)
    beside = zero_lines(4 * size * SIDE).view(np.float32).reshape(size, SIDE)
    most, total = np.empty(SIDE, dtype=np.float32), np.empty(SIDE, dtype=np.float32)
    # the last block, where it is not whole, is read and written in room of a whole one's size
    last_rows = zero_lines(size * rows.shape[1]).reshape(size, rows.shape[1])
    last_scores = np.empty((SIDE, size), dtype=np.float32)
    begin_tiles()
    for start in range(first, last, size):
        count = min(size, last - start)
        if count == size:
            block = rows[start : start + size]
        else:
            block = last_rows
            _copy(rows[start:last], block)
        for row in range(start + size, min(start + 2 * size, last)):
            fetch_row(rows, row)
        for group in range(len(right)):
            most[:] = MINUS_INFINITY
            for part in range(0, count, PAIR):
                multiply_pairs(block, part, block.shape[1], right, group, products)  # pyright: ignore
                at, classes = start + part, min(PAIR, count - part)
                put_together(products, steps[group], scale[at:], bias[at:], classes, beside, part, most)  # pyright: ignore
            row = SIDE * group
            real = min(SIDE, len(scores) - row)
            if count == size:
                for part in range(0, size, SIDE):
                    transpose(beside, part, scores, row, real, start + part)  # pyright: ignore[reportCallIssue]
            else:
                for part in range(0, count, SIDE):
                    transpose(beside, part, last_scores, 0, real, part)  # pyright: ignore[reportCallIssue]
                _copy(last_scores[:real, :count], scores[row : row + real, start:last])
            sum_exponentials(beside, most, count, total)  # pyright: ignore[reportCallIssue]
            for n in range(real):
                block_max[row + n, start // size] = most[n]
                block_sum[row + n, start // size] = total[n]
    end_tiles()  # pyright: ignore[reportCallIssue]


@njit(cache=True)
def scan_int8_rows(
    workers: int,
    hidden: Any,  # (N, w) float32
    rows: Any,  # (V, padded w) int8, zero beyond w, the padded width a multiple of 64
    scale: Any,  # (V,) float32
    bias: Any,  # (V,) float32
    size: int,  # a multiple of 32
    of_rows: Any,  # (N, 2), out: the norm of a hidden state, and of what its two int8 parts do not hold
    scores: Any,  # (N, V) float32, out
    block_max: Any,  # (N, blocks) float32, out
    block_sum: Any,  # the same, out
) -> None:
    """Scores `scale * rows @ hidden' + bias` of hidden states in two int8 parts, by AMX; reads `rows` once."""
    groups = (len(hidden) + SIDE - 1) // SIDE
    chunks = rows.shape[1] // DEPTH
    right = zero_lines(groups * chunks * 2 * SIDE * DEPTH).reshape(groups, chunks, 2, SIDE, DEPTH)
    steps = np.zeros((groups, 2, SIDE), dtype=np.float32)
    apart(_pack_some, workers, (workers, hidden, right, steps, of_rows))  # pyright: ignore[reportCallIssue]
    given = workers, rows, scale, bias, right, steps, size, scores, block_max, block_sum
    apart(_scan_rows_part, workers, given)  # pyright: ignore[reportCallIssue]

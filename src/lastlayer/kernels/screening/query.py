"""One hidden state, one call: scan, candidates, exact logits, certificate and normaliser.

What is passed on to `answer` is described there; `of_row` is filled here as far as it is the stored rows' part.
"""

from typing import Any

import numpy as np
from numba import njit

from lastlayer.kernels.screening.answer import BAD, answer
from lastlayer.kernels.screening.nibbles import scan_int4
from lastlayer.kernels.screening.scan import norm_of, scan_float, scan_int8, split_in_two, turn

MOST = 1e30  # a larger hidden state could overflow float32, which the kernels do not look for


@njit(cache=True)
def query_int8(
    vector: Any,  # (w,) float32: what the rows are multiplied by, the hidden state or what a preview makes of it
    rows: Any,  # (V, padded w) int8
    scale: Any,  # (V,) float32
    high: Any,  # (padded w,) int8, scratch that ends in zeros
    low: Any,  # the same
    scores: Any,
    block_max: Any,
    block_sum: Any,
    size: int,
    of_row: Any,  # the first two numbers: out
    of_classes: Any,
    of_blocks: Any,
    weight: Any,
    bias: Any,
    hidden: Any,
    candidates: int,
    exact: bool,
    workers: int,
    log_prob: Any,
    indices: Any,
    log_normalizer: Any,
    final: Any,
) -> int:
    """`answer` by 8-bit rows; BAD where the vector is not for the kernels."""
    of_row[0] = norm_of(vector)
    if not of_row[0] < MOST:  # NaN as well
        return BAD
    step_high, step_low, of_row[1] = split_in_two(vector, high, low)
    scan_int8(rows, scale, bias, high, low, step_high, step_low, size, workers, scores, block_max, block_sum)
    return answer(
        scores, block_max, block_sum, size, of_row, of_classes, of_blocks, weight, bias, hidden, candidates, exact,
        workers, log_prob, indices, log_normalizer, final,
    )  # fmt: skip


@njit(cache=True)
def query_float(
    vector: Any,  # (w,) float32, as above
    columns: Any,  # (w, V) float32, or the bits of bfloat16 as int16
    scores: Any,
    block_max: Any,
    block_sum: Any,
    size: int,
    of_row: Any,  # the first number: out
    of_classes: Any,
    of_blocks: Any,
    weight: Any,
    bias: Any,
    hidden: Any,
    candidates: int,
    exact: bool,
    workers: int,
    log_prob: Any,
    indices: Any,
    log_normalizer: Any,
    final: Any,
) -> int:
    """`answer` by floating-point columns; BAD where the vector is not for the kernels."""
    of_row[0] = norm_of(vector)
    if not of_row[0] < MOST:
        return BAD
    scan_float(columns, vector, bias, size, workers, scores, block_max, block_sum)
    return answer(
        scores, block_max, block_sum, size, of_row, of_classes, of_blocks, weight, bias, hidden, candidates, exact,
        workers, log_prob, indices, log_normalizer, final,
    )  # fmt: skip


@njit(cache=True)
def query_int4(
    fine: int,
    to_turned: Any,  # (d, d), the bits of bfloat16 as int16
    unbalance: Any,  # (d,) float32
    rounding: Any,  # (3,) float64: what rounding adds to the first two numbers of `of_row`
    codes: Any,  # as `scan_int4` takes them
    scale: Any,  # (V,) float32
    parts: Any,  # (1, 2, padded w) int8, scratch that ends in zeros
    scores: Any,
    block_max: Any,
    block_sum: Any,
    size: int,
    of_row: Any,  # out
    of_classes: Any,
    of_blocks: Any,
    weight: Any,
    bias: Any,
    hidden: Any,
    candidates: int,
    exact: bool,
    workers: int,
    log_prob: Any,
    indices: Any,
    log_normalizer: Any,
    final: Any,
) -> int:
    """`answer` by 4-bit rows; BAD where the hidden state is not for the kernels."""
    norm = norm_of(hidden)
    if not norm < MOST:  # NaN as well
        return BAD
    turned = np.empty((1, fine + hidden.size), dtype=np.float32)
    head, whole = turned[0, :fine], turned[0, fine:]
    turn(hidden, to_turned, workers, whole)
    for j in range(fine):
        head[j] = whole[j] / np.float32(16.0)
    in_rows = norm_of(turned[0])
    if not in_rows < MOST:
        return BAD
    given = size, workers, of_row[1:2], scores.reshape(1, -1), block_max.reshape(1, -1), block_sum.reshape(1, -1)
    scan_int4(turned, codes, scale, bias, parts, *given)
    of_row[0] = norm_of(whole * unbalance) + rounding[0] * norm
    of_row[1] += rounding[1] * norm + rounding[2] * in_rows
    of_row[2] = norm + 1
    return answer(
        scores, block_max, block_sum, size, of_row, of_classes, of_blocks, weight, bias, hidden, candidates, exact,
        workers, log_prob, indices, log_normalizer, final,
    )  # fmt: skip

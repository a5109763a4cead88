"""One hidden state, one call: scan, candidates, exact logits, certificate and normaliser.

`room`, `layer` and `asked` are `answer`'s; the part of `room.of_row` that is the stored rows' is filled here.
The `ask_*` are what `Bound` binds: `place[0]` holds what stays the same, `asked[0]` what is new, as `ASKED` says.
What they call here is put into them, or it would be compiled twice.
"""

from typing import Any

import numpy as np
from numba import carray, njit  # pyright: ignore[reportPrivateImportUsage]

from lastlayer.kernels.screening.answer import BAD, Asked, answer
from lastlayer.kernels.screening.nibbles import scan_int4
from lastlayer.kernels.screening.scan import norm_of, rotate, scan_float, scan_int8, split_in_two, turn

MOST = 1e30  # a larger hidden state could overflow float32, which the kernels do not look for
# hidden state; k, exact, workers; log_prob, indices, certified, log_normalizer, final; whether final is wanted
ASKED = "AnnnAAAAAn"  # addresses and numbers


@njit(inline="always")
def _query_int8(
    vector: Any,  # (w,) float32: what the rows are multiplied by, the hidden state or what a preview makes of it
    stored: Any,  # rows (V, padded w) int8, scale (V,) float32, twice (padded w,) int8, room that ends in zeros
    room: Any,  # the first two numbers of its `of_row` are filled in
    layer: Any,
    asked: Any,
    workers: int,
) -> int:
    """`answer` by 8-bit rows; BAD where the vector is not for the kernels."""
    rows, scale, high, low = stored
    scores, block_max, block_sum, of_row = room
    of_row[0] = norm_of(vector)
    if not of_row[0] < MOST:  # NaN as well
        return BAD
    step_high, step_low, of_row[1] = split_in_two(vector, high, low)
    summary = layer.size, workers, scores, block_max, block_sum
    scan_int8(rows, scale, layer.bias, high, low, step_high, step_low, *summary)
    return answer(room, layer, asked, workers)


@njit(inline="always")
def _query_float(
    vector: Any,  # (w,) float32, as above
    stored: Any,  # columns (w, V) float32, or the bits of bfloat16 as int16
    room: Any,  # the first number of its `of_row` is filled in
    layer: Any,
    asked: Any,
    workers: int,
) -> int:
    """`answer` by floating-point columns; BAD where the vector is not for the kernels."""
    scores, block_max, block_sum, of_row = room
    of_row[0] = norm_of(vector)
    if not of_row[0] < MOST:
        return BAD
    scan_float(stored[0], vector, layer.bias, layer.size, workers, scores, block_max, block_sum)
    return answer(room, layer, asked, workers)


@njit(inline="always")
def _query_int4(
    rotation: Any,  # (d, d), float32 or bits of bfloat16; unbalance (d,) float32; what rounding adds (3,) float64
    stored: Any,  # codes and scale for `scan_int4`; room, (1, 2, padded w) int8 and (1, fine + d) float32
    room: Any,  # all of its `of_row` is filled in
    layer: Any,
    asked: Any,
    workers: int,
) -> int:
    """`answer` by 4-bit rows; BAD where the hidden state is not for the kernels."""
    to_turned, unbalance, rounding = rotation
    codes, scale, parts, turned = stored
    scores, block_max, block_sum, of_row = room
    norm, fine = norm_of(asked.hidden), turned.size - unbalance.size
    if not norm < MOST:  # NaN as well
        return BAD
    head, whole = turned[0, :fine], turned[0, fine:]
    turn(asked.hidden, to_turned, workers, whole)
    for j in range(fine):
        head[j] = whole[j] / np.float32(16.0)
    in_rows = norm_of(turned[0])
    if not in_rows < MOST:
        return BAD
    summary = scores.reshape(1, -1), block_max.reshape(1, -1), block_sum.reshape(1, -1)
    scan_int4(turned, codes, scale, layer.bias, parts, layer.size, workers, of_row[1:2], *summary)
    of_row[0] = norm_of(whole * unbalance) + rounding[0] * norm
    of_row[1] += rounding[1] * norm + rounding[2] * in_rows
    of_row[2] = norm + 1
    return answer(room, layer, asked, workers)


@njit(inline="always")
def _rotate(
    rotation: Any,  # (w, d) float64, (d - w, d) float32, (2,) float64: shares of rounding; (w,) float32, room
    room: Any,  # the last two numbers of its `of_row` are filled in
    hidden: Any,
) -> Any:
    """The head of a rotated hidden state, and its norm."""
    to_head, to_tail, shares, head = rotation
    norm, tail = rotate(hidden, to_head, to_tail, head)
    room.of_row[-2] = tail + shares[0] * norm
    room.of_row[-1] = shares[1] * (norm + 1)
    return head, norm


@njit(inline="always")
def _question(asked: Any, layer: Any) -> tuple[Asked, int]:
    """What `ASKED` says, with the arrays at its addresses; and the workers."""
    hidden, k, exact, workers, log_prob, indices, certified, log_normalizer, final, with_logits = asked
    classes, width = layer.weight.shape
    arrays = (
        carray(log_prob, (k,), np.float32),
        carray(indices, (k,), np.int64),
        carray(certified, (1,), np.bool_),
        carray(log_normalizer, (1,), np.float32),
        carray(final, (classes if with_logits else 0,), np.float32),
    )
    return Asked(carray(hidden, (width,), np.float32), exact != 0, *arrays), workers


def ask_int8(place: Any, asked: Any) -> int:
    """By 8-bit rows of the weight itself."""
    stored, room, layer = place[0]
    question, workers = _question(asked[0], layer)
    return _query_int8(question.hidden, stored, room, layer, question, workers)


def ask_int4(place: Any, asked: Any) -> int:
    """By 4-bit rows."""
    rotation, stored, room, layer = place[0]
    question, workers = _question(asked[0], layer)
    return _query_int4(rotation, stored, room, layer, question, workers)


def ask_rotated_int8(place: Any, asked: Any) -> int:
    """By the head of a rotation, in 8-bit rows."""
    rotation, stored, room, layer = place[0]
    question, workers = _question(asked[0], layer)
    head, norm = _rotate(rotation, room, question.hidden)
    return _query_int8(head, stored, room, layer, question, workers) if norm < MOST else BAD


def ask_rotated_float(place: Any, asked: Any) -> int:
    """By the head of a rotation, in floating-point columns."""
    rotation, stored, room, layer = place[0]
    question, workers = _question(asked[0], layer)
    head, norm = _rotate(rotation, room, question.hidden)
    return _query_float(head, stored, room, layer, question, workers) if norm < MOST else BAD

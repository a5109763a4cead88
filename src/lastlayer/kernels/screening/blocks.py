"""Scores summarised by blocks of classes: a block's maximum, and the sum of exponentials relative to it."""

from typing import Any

import numpy as np
from numba import njit

from lastlayer.kernels.apart import apart
from lastlayer.kernels.fast_math import exp, larger
from lastlayer.kernels.screening.lanes import LANES, SUMMARISED, summarise_sixteen

MINUS_INFINITY = np.float32(-np.inf)

# What may be reordered or assumed: sums in any order, no NaN (callers check); infinities are as they are.
FAST = {"reassoc", "contract", "nsz", "nnan", "arcp"}


@njit(cache=True, fastmath=FAST)
def largest(values: Any) -> Any:
    """The largest of some numbers."""
    most = MINUS_INFINITY
    for i in range(values.size):
        most = larger(most, values[i])  # pyright: ignore[reportCallIssue]
    return most


@njit(cache=True, fastmath=FAST)
def summarise_part(scores: Any, first: Any, last: int, size: int, block_max: Any, block_sum: Any) -> None:
    """The summary of the blocks of `size` that begin in [first, last)."""
    if size == SUMMARISED:
        while last - first >= LANES * SUMMARISED:
            summarise_sixteen(scores, block_max, block_sum, first // size)  # pyright: ignore[reportCallIssue]
            first += LANES * SUMMARISED
    for start in range(first, last, size):
        block = scores[start : min(start + size, last)]  # loops from 0 on are vectorised: no index can be negative
        most = largest(block)
        total = np.float32(0.0)
        if most > MINUS_INFINITY:
            for i in range(block.size):
                total += exp(block[i] - most)
        block_max[start // size] = most
        block_sum[start // size] = total


@njit(cache=True)
def _summarise_share(worker: int, workers: int, scores: Any, size: int, block_max: Any, block_sum: Any) -> None:
    share = (block_max.size + workers - 1) // workers * size
    last = min((worker + 1) * share, scores.size)
    summarise_part(scores, worker * share, last, size, block_max, block_sum)


@njit(cache=True)
def summarise_one(scores: Any, size: int, block_max: Any, block_sum: Any, workers: int) -> None:
    """The summary of one row, `(V,)`."""
    if workers == 1:
        summarise_part(scores, np.int64(0), scores.size, size, block_max, block_sum)
    else:
        given = workers, scores, size, block_max, block_sum
        apart(_summarise_share, workers, given)  # pyright: ignore[reportCallIssue]


@njit(cache=True)
def _summarise_some(worker: int, workers: int, scores: Any, size: int, block_max: Any, block_sum: Any) -> None:
    for row in range(worker, len(scores), workers):
        summarise_part(scores[row], np.int64(0), scores.shape[1], size, block_max[row], block_sum[row])


@njit(cache=True)
def summarise(workers: int, scores: Any, size: int, block_max: Any, block_sum: Any) -> None:
    """The summary of scores made elsewhere, `(N, V)`."""
    given = workers, scores, size, block_max, block_sum
    apart(_summarise_some, workers, given)  # pyright: ignore[reportCallIssue]

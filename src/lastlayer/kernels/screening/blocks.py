"""Scores summarised by blocks of classes: a block's maximum, and the sum of exponentials relative to it."""

from typing import Any

import numpy as np
from numba import njit, prange

from lastlayer.kernels.fast_math import exp, larger

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
def summarise_part(scores: Any, first: int, last: int, size: int, block_max: Any, block_sum: Any) -> None:
    """The summary of the blocks of `size` that begin in [first, last)."""
    for start in range(first, last, size):
        block = scores[start : min(start + size, last)]  # loops from 0 on are vectorised: no index can be negative
        most = largest(block)
        total = np.float32(0.0)
        if most > MINUS_INFINITY:
            for i in range(block.size):
                total += exp(block[i] - most)
        block_max[start // size] = most
        block_sum[start // size] = total


@njit(cache=True, parallel=True)
def summarise(scores: Any, size: int, block_max: Any, block_sum: Any) -> None:
    """The summary of scores made elsewhere, `(N, V)`."""
    for row in prange(len(scores)):
        summarise_part(scores[row], 0, scores.shape[1], size, block_max[row], block_sum[row])

"""Many tiny softmaxes, each over its own few rows of one large matrix; compiled by numba, arrays in, arrays out.

numba is imported when a function here first runs. Where one or two rows of the batch fall into a cluster, a matrix
product per cluster is all overhead, and what remains is reading each cluster's weight once.
`functional/two_level.py` holds the same in plain PyTorch.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lastlayer.kernels.threads import at_once

# Multiply-adds below which handing half of the groups to another thread costs more than it saves.
WORTH_A_THREAD = 1 << 19


class GroupArrays(NamedTuple):
    """Some groups: rows `rows[g]` up to `rows[g] + counts[g]` share the weight rows from `starts[g]`."""

    rows: NDArray[np.int64]
    counts: NDArray[np.int64]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    places: NDArray[np.int64]  # where the group's (counts, sizes) numbers begin in the flat residuals
    outs: NDArray[np.int64]  # first row of the group in the weight's gradient


def softmax_forward(
    groups: GroupArrays,
    hidden: NDArray[Any],  # (N, d), sorted by group
    weight: NDArray[Any],  # (V, d)
    bias: NDArray[Any],  # (V,), or (0,) for none
    slots: NDArray[np.int64],  # (N,), the weight row of each target
    residual: NDArray[Any],  # flat; becomes softmax - one_hot(target), group after group
    log_prob: NDArray[Any],  # (N,); gains the target's log-probability in its group
    slope: NDArray[Any],  # (N, d), or (0, d) for none; gains residual @ weight
    threads: int,
) -> None:
    """For every group `log_softmax(hidden @ weight.T + bias)` at the targets, and what its gradient needs."""
    from lastlayer.kernels import grouped_loops

    arrays = (tuple(groups), hidden, weight, bias, slots, residual, log_prob, slope)
    spread(grouped_loops.forward, groups.sizes * (groups.counts + 1), arrays, hidden.shape[1], threads)


def softmax_backward(
    groups: GroupArrays,
    hidden: NDArray[Any],  # (N, d), sorted by group
    residual: NDArray[Any],  # flat, from the forward pass
    scale: NDArray[Any],  # (N,)
    grad_weight: NDArray[Any],  # (R, d); rows of the groups become (scale * residual).T @ hidden
    grad_bias: NDArray[Any],  # (R,), or (0,) for none; likewise the sums over the batch
    threads: int,
) -> None:
    """The gradients of weight and bias, every row written once."""
    from lastlayer.kernels import grouped_loops

    arrays = (tuple(groups), hidden, residual, scale, grad_weight, grad_bias)
    spread(grouped_loops.backward, groups.sizes * (groups.counts + 1), arrays, hidden.shape[1], threads)


def small_forward(*arguments: Any) -> Any:
    """Both levels of a hierarchical softmax for a small batch, as `grouped_loops.small_forward` says."""
    from lastlayer.kernels import grouped_loops

    return grouped_loops.small_forward(*arguments)


def small_backward(*arguments: Any) -> None:
    """Its gradients, as `grouped_loops.small_backward` says."""
    from lastlayer.kernels import grouped_loops

    grouped_loops.small_backward(*arguments)


def spread(
    kernel: Callable[..., None], work: NDArray[np.int64], arrays: tuple[Any, ...], width: int, threads: int
) -> None:
    """Runs `kernel(first, last, *arrays)` over all items, in parts of about equal `work` on `threads` threads."""
    num_items = len(work)
    done = work.cumsum()
    total = int(done[-1]) if num_items else 0
    threads = min(threads, num_items, total * width // WORTH_A_THREAD)
    if threads <= 1:
        kernel(0, num_items, *arrays)
        return
    cuts = [0, *np.searchsorted(done, [total * part / threads for part in range(1, threads)]).tolist(), num_items]
    parts = list(itertools.pairwise(cuts))
    at_once(lambda part: kernel(*parts[part], *arrays), threads)

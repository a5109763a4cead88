"""Logistic regressions along paths through a tree; compiled by numba, arrays in, arrays out.

numba is imported when a function here first runs. `functional/paths.py` holds the same in plain PyTorch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lastlayer.kernels.grouped import spread

Array = NDArray[Any]


def forward(
    starts: Array,  # (N + 1,), where each row's path begins
    nodes: Array,  # (P,)
    signs: Array,  # (P,)
    hidden: Array,  # (N, d)
    weight: Array,  # (V - 1, d)
    log_prob: Array,  # (N,); becomes the sum of log sigmoid(sign * score)
    factors: Array,  # (P,); becomes sign * sigmoid(-sign * score)
    slope: Array,  # (N, d), or (0, d) for none; gains factors @ weight
    threads: int,
) -> None:
    """Log-probabilities of paths, and what their gradient needs."""
    from lastlayer.kernels import paths_loops

    arrays = (starts, nodes, signs, hidden, weight, log_prob, factors, slope)
    spread(paths_loops.forward, np.diff(starts), arrays, hidden.shape[1], threads)


def backward(
    starts: Array,  # (U + 1,), where the pairs of each touched node begin
    pairs: Array,  # (P,), sorted by node
    rows: Array,  # (P,), the row of each pair
    factors: Array,  # (P,)
    scale: Array,  # (N,)
    hidden: Array,  # (N, d)
    of_weight: Array,  # (U, d), written
    threads: int,
) -> None:
    """The gradient of the touched nodes, each written once."""
    from lastlayer.kernels import paths_loops

    arrays = (starts, pairs, rows, factors, scale, hidden, of_weight)
    spread(paths_loops.backward, np.diff(starts), arrays, hidden.shape[1], threads)

"""Logistic regressions along paths through a tree: `csrc/paths.cpp`. The plain twin is `functional/paths.py`."""

import torch
from torch import Tensor

from lastlayer.kernels.engine import Kernel

# classes, starts, parents, sides, V, hidden, weight, nodes, signs, log_prob, factors, slope, N, d, in float64
_FORWARD = Kernel("paths_forward", "ppppnpppppppnnn")
# starts, pairs, rows, factors, scale, hidden, of_weight, U, d, in float64
_BACKWARD = Kernel("paths_backward", "pppppppnnn")


def forward(
    classes: Tensor,  # (N,) int64
    starts: Tensor,  # (N + 1,) int64, where each path is to begin
    parents: Tensor,  # (2V - 1,) int64, the inner node above each id; -1 above the root
    sides: Tensor,  # (2V - 1,) int8, 1 for a first child, -1 for a second
    hidden: Tensor,  # (N, d) float32 or float64
    weight: Tensor,  # (V - 1, d), of the same dtype
    nodes: Tensor,  # (P,) int64; become the inner nodes on the way from each class to the root
    signs: Tensor,  # (P,) int8; become the sides on which each was left
    log_prob: Tensor,  # (N,), of the dtype of the weight, as all that follow; sum of log sigmoid(sign * score)
    factors: Tensor,  # (P,); become sign * sigmoid(-sign * score)
    slope: Tensor | None,  # (N, d); becomes factors @ weight
) -> None:
    """Log-probabilities of paths, and what their gradient needs."""
    _FORWARD(
        classes, starts, parents, sides, weight.shape[0] + 1, hidden, weight,
        nodes, signs, log_prob, factors, slope, *hidden.shape, hidden.dtype == torch.float64,
    )  # fmt: skip


def backward(
    starts: Tensor,  # (U + 1,) int64, where the pairs of each touched node begin
    pairs: Tensor,  # (P,) int64, sorted by node
    rows: Tensor,  # (P,) int64, the row of each pair
    factors: Tensor,  # (P,)
    scale: Tensor,  # (N,)
    hidden: Tensor,  # (N, d)
    of_weight: Tensor,  # (U, d), written
) -> None:
    """The gradient of the touched nodes, each written once."""
    _BACKWARD(
        starts, pairs, rows, factors, scale, hidden, of_weight, *of_weight.shape, hidden.dtype == torch.float64
    )  # fmt: skip

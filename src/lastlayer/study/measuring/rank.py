"""The rank of a model's log-probability matrix: how much of the softmax bottleneck it has left behind."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_fraction
from lastlayer.layers.base import OutputLayer

BLOCK_ROWS = 256  # whose log-probabilities are computed at once
BLOCK_NUMBERS = 1 << 24  # widened to float64 at once


class Rank(NamedTuple):
    """The result of `rank`."""

    numerical: int  # singular values above the threshold
    effective: int  # least k whose squares hold 1 - epsilon of all
    threshold: float
    singular_values: Tensor  # (min(N, V),) float64, best first


@torch.no_grad()
def rank(
    layer: OutputLayer,
    hidden: Tensor,  # (..., d)
    *,
    epsilon: float = 1e-3,
) -> Rank:
    """The numerical and the effective rank of `layer.log_prob(hidden)`, the `(N, V)` matrix of all contexts.

    Of a linear softmax of width d it is at most `d + 1`, with a bias `d + 2`. Numerical: the singular values above
    `½ sqrt(N + V + 1) s_max eps` with float32's eps, the threshold of Press et al. 2007 that the papers use.
    ε-effective: the least k with `Σ_{i≤k} s_i² >= (1 - ε) Σ s_i²` (Parthiban, Mao and Inkpen, AAAI 2021).

    The singular values come from the eigenvalues of the smaller Gram matrix, in float64. Memory: with `V <= N`
    that matrix alone, rows are streamed; else the `(N, V)` log-probabilities once, and the `(N, N)` matrix; give
    a few thousand contexts, not all. Time: `min(N, V)² max(N, V)` operations.

    Args:
        layer: any layer with `log_prob`.
        hidden: the hidden states of the contexts, such as those of a test text.
        epsilon: of the effective rank.

    Raises:
        ValueError: no contexts, or log-probabilities that are not finite.

    >>> import torch, lastlayer
    >>> layer = lastlayer.FullSoftmax(4, 50, bias=False, dtype=torch.float64)
    >>> lastlayer.rank(layer, 10 * torch.randn(60, 4, dtype=torch.float64)).numerical
    5
    """
    check_fraction("epsilon", epsilon)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if not len(rows):
        raise ValueError(f"hidden must hold at least one context, got shape {tuple(hidden.shape)}")
    blocks = (layer.log_prob(part) for part in rows.split(BLOCK_ROWS))
    num_rows, num_classes = len(rows), layer.num_classes
    if num_classes <= num_rows:
        gram = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=rows.device)
        for block in blocks:
            wide = block.double()
            gram.addmm_(wide.T, wide)
    else:
        log_prob = torch.cat(list(blocks))
        gram = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=rows.device)
        for columns in log_prob.split(max(1, BLOCK_NUMBERS // num_rows), dim=1):
            wide = columns.double()
            gram.addmm_(wide, wide.T)
    if not bool(gram.isfinite().all()):
        raise ValueError("log-probabilities must be finite for a rank; some class has probability 0, or nan")
    squares = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    values = squares.sqrt()
    eps = torch.finfo(torch.float32).eps
    threshold = 0.5 * (num_rows + num_classes + 1) ** 0.5 * float(values[0]) * eps
    share = squares.cumsum(0) / squares.sum()
    effective = int((share < 1 - epsilon).sum()) + 1
    return Rank(int((values > threshold).sum()), min(effective, len(values)), threshold, values)

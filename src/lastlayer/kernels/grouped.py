"""Many softmaxes, each over its own rows of one matrix (`csrc/grouped.cpp`), and rows summed up by class
(`csrc/add_rows.cpp`).

The plain twins are in `functional/cluster_softmax.py` and `functional/sampled_logits.py`.
"""

import numpy as np
import torch
from torch import Tensor

from lastlayer.kernels.engine import Kernel

# table, G, large_work, order, hidden, weight, bias, slots, residual, log_prob, slope, V, d, in float64
_FORWARD = Kernel("grouped_softmax_forward", "pnnppppppppnnn")
# table, G, large_work, compact, order, hidden, residual, scale, of_weight, of_bias, R, d, in float64
_BACKWARD = Kernel("grouped_softmax_backward", "pnnnppppppnnn")
_ADD = Kernel("add_rows", "ppppnnnn")  # sums, places, factors, rows, N, K, d, in float64


def softmax_forward(
    table: Tensor,  # (G, 4) int64: first place in `order`, count, first weight row, size of each group
    large_work: int,  # multiply-adds from which threads share a group, not the groups
    order: Tensor,  # (N,) int64, the rows of the batch, group after group
    hidden: Tensor,  # (N, d) float32 or float64
    weight: Tensor,  # (V, d), of the same dtype, as all that follow
    bias: Tensor | None,  # (V,)
    slots: Tensor,  # (N,) int64, the weight row of each target
    residual: Tensor,  # flat; becomes softmax - one_hot(target), group after group
    log_prob: Tensor,  # (N,); becomes the target's log-probability in its group
    slope: Tensor | None,  # (N, d); becomes residual @ weight
) -> None:
    """For every group `log_softmax(hidden @ weight.T + bias)` at the targets, and what its gradient needs."""
    _FORWARD(
        table, table.shape[0], large_work, order, hidden, weight, bias, slots, residual, log_prob, slope,
        *weight.shape, hidden.dtype == torch.float64,
    )  # fmt: skip


def softmax_backward(
    table: Tensor,  # (G, 4) int64
    large_work: int,
    order: Tensor,  # (N,) int64
    hidden: Tensor,  # (N, d)
    residual: Tensor,  # flat, from the forward pass
    scale: Tensor,  # (N,)
    of_weight: Tensor,  # (R, d); rows of the groups become residual.T @ (scale * hidden)
    of_bias: Tensor,  # (R,); likewise residual.T @ scale
    *,
    compact: bool,  # whether of_weight and of_bias hold the rows of the groups only, one group after the other
) -> None:
    """The gradients of weight and bias, every row written once."""
    _BACKWARD(
        table, table.shape[0], large_work, compact, order, hidden, residual, scale, of_weight, of_bias,
        *of_weight.shape, hidden.dtype == torch.float64,
    )  # fmt: skip


def scaled_rows(
    rows: Tensor,  # (N, d)
    scale: Tensor,  # (N,)
) -> Tensor:  # (N, d)
    """`rows * scale[:, None]` on the calling thread, by NumPy: PyTorch would share the work, and on a busy machine
    wait for the other threads for milliseconds."""
    scaled = torch.empty_like(rows)  # PyTorch's memory, which autograd can resize
    np.multiply(rows.detach().numpy(), scale.detach().numpy()[:, None], out=scaled.numpy())
    return scaled


def add_rows(
    sums: Tensor,  # (R, d) float32 or float64; gains the rows
    places: Tensor,  # (N, K) int64, where each goes
    factors: Tensor | None,  # (N, K), of the same dtype, as is all that follows; None: ones
    rows: Tensor,  # (N, d)
) -> None:
    """`sums[places[n, c]] += factors[n, c] * rows[n]`, as `index_add_` does in some thirty times the time."""
    _ADD(sums, places, factors, rows, *places.shape, rows.shape[1], sums.dtype == torch.float64)

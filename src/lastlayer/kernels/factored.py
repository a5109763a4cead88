"""A training pass of `FactoredOutput` and its step: `csrc/factored.cpp`.

The plain twins are in `layers/factored/record.py` and `step.py`, whose names these are. All arrays are contiguous,
and of one dtype, float32 or float64, but for the ids and the float64 statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.kernels.engine import Kernel

# hidden, reading, factor, ids, a copy of hidden, products, squared norm, scores, total, N, K, d, in float64
_READ = Kernel("factored_read", "pppppppppnnnn")
# products, reading, factor, ids, by score, norm and total, by hidden, sparse, a copy of by hidden, N, K, d,
# in float64
_HIDDEN_GRADIENT = Kernel("factored_hidden_gradient", "ppppppppppnnnn")
# factor, ids, by score, X, rate, N, K, d, in float64
_MOVE_TARGETS = Kernel("factored_move_targets", "ppppxnnnn")
# hidden, products, by hidden, sparse, ids, by score, norm and total, reading, inverse, the new reading, inverse
# and X, what is found, rate, easy, the limit of the drift, N, K, d, V, in float64
_PLAN = Kernel("factored_plan", "ppppppppppppppxxxnnnnn")


def read(
    hidden: Tensor,  # (N, d)
    reading: Tensor,  # (2 d + 2, d)
    factor: Tensor,  # (V, d)
    ids: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # (N, d), (N, 2 d + 2), then in float64 (N, K), (N,), (N,)
    """A copy of `hidden`; its products with `reading`; target scores, squared norms and sums of the outputs."""
    (rows, d), width = hidden.shape, ids.shape[1]
    copy, products = torch.empty_like(hidden), hidden.new_empty(rows, 2 * d + 2)
    statistics = hidden.new_empty(rows, width + 2, dtype=torch.float64)
    scores, squared_norm, total = statistics.view(-1).split([rows * width, rows, rows])
    _READ(
        hidden, reading, factor, ids, copy, products, squared_norm, scores, total,
        rows, width, d, hidden.dtype == torch.float64,
    )  # fmt: skip
    return copy, products, scores.view(rows, width), squared_norm, total


def hidden_gradient(
    products: Tensor,  # (N, 2 d + 2)
    reading: Tensor,
    factor: Tensor,
    ids: Tensor,  # (N, K)
    by_score: Tensor,  # (N, K)
    by_norm: Tensor,  # (N,)
    by_total: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor, Tensor]:  # (N, d) each
    """The gradient of the hidden states, the part of it that comes of targets and sum, and a copy of the first."""
    (rows, width), d = ids.shape, factor.shape[1]
    by_hidden, sparse, copy = (products.new_empty(rows, d) for _ in range(3))
    _HIDDEN_GRADIENT(
        products, reading, factor, ids, by_score, by_norm, by_total, by_hidden, sparse, copy,
        rows, width, d, products.dtype == torch.float64,
    )  # fmt: skip
    return by_hidden, sparse, copy


def move_targets(
    factor: Tensor,  # (V, d)
    ids: Tensor,  # (N, K)
    by_score: Tensor,  # (N, K)
    solution: Tensor,  # (N, d)
    rate: float,
) -> None:
    """`F <- F - rate Y^T X`."""
    _MOVE_TARGETS(
        factor, ids, by_score, solution, rate, *ids.shape, factor.shape[1], factor.dtype == torch.float64
    )  # fmt: skip


class EasyPlan(NamedTuple):
    """A step that is far from singular, as `layers/factored/step.py` has it."""

    reading: Tensor  # (2 d + 2, d)
    inverse: Tensor  # (d, d)
    solution: Tensor  # (N, d)
    shrinking: float  # the positive part of the trace of S = lr H H^T D
    growing: float  # and the negative
    size: float  # the norm of S


def plan_easy(
    hidden: Tensor,  # (N, d)
    products: Tensor,  # (N, 2 d + 2)
    by_hidden: Tensor,  # (N, d)
    sparse: Tensor,  # (N, d)
    ids: Tensor,  # (N, K)
    by_score: Tensor,  # (N, K)
    by_norm: Tensor,  # (N,)
    by_total: Tensor | None,  # (N,)
    reading: Tensor,  # (2 d + 2, d)
    inverse: Tensor,  # (d, d)
    *,
    rate: float,
    easy: float,
    drift_limit: float,
    num_classes: int,
) -> EasyPlan | None:
    """The step by rows; None where the norm of S is above `easy`, R has drifted, or something is not finite."""
    plan = torch.empty_like(reading), torch.empty_like(inverse), torch.empty_like(hidden)
    found = hidden.new_empty(4, dtype=torch.float64)
    done = _PLAN(
        hidden, products, by_hidden, sparse, ids, by_score, by_norm, by_total, reading, inverse, *plan, found,
        rate, easy, drift_limit, *ids.shape, hidden.shape[1], num_classes, hidden.dtype == torch.float64,
    )  # fmt: skip
    return EasyPlan(*plan, *found.tolist()[:3]) if done else None

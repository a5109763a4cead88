"""A training pass of `FactoredOutput` and its step: `csrc/factored.cpp`.

The plain twins are in `layers/factored/state.py`, `record.py` and `step.py`, whose names these are. All arrays are
contiguous, and of one dtype, float32 or float64, but for the ids and the float64 statistics.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.kernels.engine import Kernel

# hidden, reading, factor, ids, products, squared norm, scores, total, N, K, d, in float64
_READ = Kernel("factored_read", "ppppppppnnnn")
# products, reading, factor, ids, by score, norm and total, by hidden, sparse, N, K, d, in float64
_HIDDEN_GRADIENT = Kernel("factored_hidden_gradient", "pppppppppnnnn")
# factor, ids, by score, X, rate, N, K, d, in float64
_MOVE_TARGETS = Kernel("factored_move_targets", "ppppxnnnn")
# hidden, products, by hidden, sparse, ids, by score, norm and total, reading, inverse, the new reading, inverse
# and X, the norm, rate, easy, the limit of the drift, N, K, d, V, in float64
_PLAN = Kernel("factored_plan", "ppppppppppppppxxxnnnnn")


def read(
    hidden: Tensor,  # (N, d)
    reading: Tensor,  # (2 d + 2, d)
    factor: Tensor,  # (V, d)
    ids: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N, 2 d + 2), then in float64 (N, K), (N,), (N,)
    """The products of `hidden` with `reading`; target scores, squared norms and sums of the outputs."""
    (rows, d), width = hidden.shape, ids.shape[1]
    products = hidden.new_empty(rows, 2 * d + 2)
    statistics = hidden.new_empty(rows * (width + 2), dtype=torch.float64)
    scores, squared_norm, total = statistics.split([rows * width, rows, rows])
    _READ(
        hidden, reading, factor, ids, products, squared_norm, scores, total,
        rows, width, d, hidden.dtype == torch.float64,
    )  # fmt: skip
    return products, scores.view(rows, width), squared_norm, total


def hidden_gradient(
    products: Tensor,  # (N, 2 d + 2)
    reading: Tensor,
    factor: Tensor,
    ids: Tensor,  # (N, K)
    by_score: Tensor,  # (N, K)
    by_norm: Tensor,  # (N,)
    by_total: Tensor | None,  # (N,)
) -> tuple[Tensor, Tensor]:  # (N, d) each
    """The gradient of the hidden states, and the part of it that comes of targets and sum."""
    (rows, width), d = ids.shape, factor.shape[1]
    by_hidden, sparse = products.new_empty(rows, d), products.new_empty(rows, d)
    _HIDDEN_GRADIENT(
        products, reading, factor, ids, by_score, by_norm, by_total, by_hidden, sparse,
        rows, width, d, products.dtype == torch.float64,
    )  # fmt: skip
    return by_hidden, sparse


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
    size: float  # the norm of S = lr H H^T D in its symmetric form


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
    size = hidden.new_empty((), dtype=torch.float64)
    done = _PLAN(
        hidden, products, by_hidden, sparse, ids, by_score, by_norm, by_total, reading, inverse, *plan, size,
        rate, easy, drift_limit, *ids.shape, hidden.shape[1], num_classes, hidden.dtype == torch.float64,
    )  # fmt: skip
    return EasyPlan(*plan, float(size)) if done else None

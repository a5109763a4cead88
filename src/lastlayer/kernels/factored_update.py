"""The exact step of `FactoredOutput` on its state, by rows; the notation is that of `kernels/factored.py`.

Each function has two forms: PyTorch's operations, and `kernels/factored_step_loops.py`, compiled by numba.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.kernels.factored import GATHERED, by_address, workers_for
from lastlayer.kernels.factored_gradient import FactoredGradient

FOUR = ctypes.c_double * 4


class RowMatrices(NamedTuple):
    """The (N, N) matrices of a step, and what tells whether it is easy."""

    both: Tensor  # (2, N, N), `system` and `inner`
    shrinking: float  # the positive part of the trace of S
    growing: float  # and the negative
    size: float  # the norm of S, at least its largest eigenvalue
    probe: float  # not finite where some target's derivative is not
    applied: bool = False  # the step was made

    @property
    def system(self) -> Tensor:
        """`S = lr H H^T D`."""
        return self.both[0]

    @property
    def inner(self) -> Tensor:
        """`lr (Y + g_s 1^T)(Y + g_s 1^T)^T + lr^2 D H both^T`: twice the half of `lr G G^T`."""
        return self.both[1]


class Easy(NamedTuple):
    """Up to where a step is easy, that is, far from singular and solved by a short series."""

    trace: float
    size: float


def row_matrices(
    stacked: Tensor,
    factor: Tensor,  # (V, d)
    g: FactoredGradient,
    rate: float,
    at_once: Easy | None = None,
) -> RowMatrices:
    """All of a step that its size and its safety depend on; the step itself too, where it is that easy.

    That saves a call in the midst of a step, 40 microseconds. The plain form leaves it to `update`.
    """
    sizes, num_classes = g.sizes(), factor.shape[0]
    rows = sizes.rows
    if workers := workers_for(factor, rows, sizes.features):
        both, found, easy = factor.new_empty(2, rows, rows), FOUR(), at_once or Easy(0, 0)
        applied = by_address("factored_step_loops", "easy_step", "EASY_KINDS", factor.dtype)(
            workers, *sizes, *g.place(), num_classes, rate, g.scaled, stacked.data_ptr(), factor.data_ptr(),
            both.data_ptr(), ctypes.addressof(found), at_once is not None, *easy, _rounding(factor.dtype),
        )  # fmt: skip
        shrinking, growing, size, probe = found
        return RowMatrices(both, shrinking, growing, size, probe, bool(applied))
    pull = 2 * rate * g.norm
    inner = sparse_overlap(g.ids, g.target, g.total, num_classes)
    inner.mul_(rate).addcmul_(g.hidden @ g.both.T, pull[:, None])
    system = (g.hidden @ g.hidden.T) * pull
    own = system.diagonal()
    found = torch.stack(
        [own.clamp(min=0).sum(), -own.clamp(max=0).sum(), system.norm(), g.target.sum()]
        + ([] if g.total is None else [g.total.sum()])
    ).tolist()
    shrinking, growing, size, *probes = found
    return RowMatrices(torch.stack([system, inner]), shrinking, growing, size, sum(probes))


def sparse_overlap(ids: Tensor, target: Tensor, total: Tensor | None, num_classes: int) -> Tensor:  # (N, N)
    """`(Y + g_s 1^T) (Y + g_s 1^T)^T`: the part of `G G^T` in which the outputs do not occur."""
    classes, place = ids.unique(return_inverse=True)
    compact = target.new_zeros(ids.shape[0], classes.shape[0]).scatter_add_(1, place, target)
    overlap = compact @ compact.T
    if total is not None:
        rank_one = torch.outer(total, target.sum(1) + num_classes / 2 * total)
        overlap += rank_one + rank_one.T
    return overlap


def gradient_norm(g: FactoredGradient, num_classes: int) -> float:
    """`||dL/dW||_F`, exact: the sum of `(G G^T) o (H H^T)`, in float64."""
    hidden = g.hidden.double()
    overlap = hidden @ hidden.T
    weighted = overlap @ (2 * g.norm.double()[:, None] * hidden)
    targets = sparse_overlap(g.ids, g.target, g.total, num_classes).double()
    square = (weighted * g.both.double()).sum() + (targets * overlap).sum()
    return float(square.clamp(min=0).sqrt())


def solve_by_series(
    rows: RowMatrices,
    right: Tensor,  # (N, d), H R^T
) -> Tensor:  # (N, d)
    """`(I - S)^-1 H R^T`, by `I + S + S^2 + ...` in few products, for a small S."""
    system, size, eps = rows.system, rows.size, _rounding(right.dtype)
    if size**2 <= eps:
        return torch.addmm(right, system, right)
    series, power = system, system @ system  # S + ... + S^(m - 1) and S^m
    while float(power.norm()) ** 2 * size > eps:  # what is left out below, from S^(2 m + 1) on
        series = torch.addmm(series + power, power, series)
        power = power @ power
    series = series + power
    return torch.addmm(right, torch.addmm(series, power, series), right)


def update(
    stacked: Tensor,
    factor: Tensor,  # (V, d)
    g: FactoredGradient,  # its products are used up
    rate: float,
    rows: RowMatrices,
    solution: Tensor | None,  # (N, d), X; None: found by `solve_by_series`
) -> None:
    """The step by rows: `F -= lr Y^T X`, and one product of rank N for all the rest.

    With its left factors in place of the products that they are made of,

        Q, U, offset, total, R  +=  [2 P | -lr D T | -lr D t - lr g_s | ... | lr D X]^T H,
        2 P = inner H - 2 lr (gradient of hidden),

    and then Q is made symmetric: the mean of `Q + 2 P^T H` and its transpose is `Q + P^T H + H^T P`.
    """
    sizes = g.sizes()
    d = sizes.features
    if workers := workers_for(factor, sizes.rows, d):
        given = rows.both if solution is None else solution.contiguous()
        by_address("factored_step_loops", "update", "UPDATE_KINDS", factor.dtype)(
            workers, *sizes, *g.place(), factor.shape[0], rate, g.scaled, stacked.data_ptr(), factor.data_ptr(),
            rows.both.data_ptr(), rows.size, _rounding(factor.dtype), given.data_ptr(), solution is not None,
        )  # fmt: skip
        return
    hidden, products, pull = g.hidden, g.products, (2 * rate * g.norm)[:, None]
    if solution is None:
        solution = solve_by_series(rows, g.right)
    products[:, :d].mul_(-2 * rate * g.scaled).addmm_(rows.inner, hidden, alpha=rate)
    g.mapped.mul_(-pull)
    g.shared.mul_(-pull)
    g.shared[:, 1].sub_(g.target.sum(1), alpha=rate)
    if g.total is not None:
        g.shared[:, 0].sub_(g.total, alpha=rate)
        g.shared[:, 1].sub_(g.total, alpha=rate * factor.shape[0])
    g.right.copy_(solution * pull)
    move_targets(factor, g.ids, g.target, rate, solution)
    stacked.addmm_(products.T, hidden)
    gram = stacked[:d]
    gram.add_(gram.T.clone()).div_(2)


def move_targets(factor: Tensor, ids: Tensor, target: Tensor, rate: float, solution: Tensor) -> None:
    """`F <- F - lr Y^T X`, one target of every row at a time."""
    for column, values in zip(ids.T, target.T, strict=True):
        factor.index_add_(0, column, values[:, None] * solution, alpha=-rate)


def add_columns(
    factor: Tensor,  # (V, d)
    columns: Tensor,  # (m,)
    change: Tensor,  # (m, d)
    least: Tensor,  # (m,)
) -> None:
    """`F <- F + F[:, columns] change`, for the rows in which one of the columns is larger than its `least`."""
    if factor.numel() > GATHERED and (workers := workers_for(factor, *factor.shape)):
        _add_columns()(workers, factor.numpy(), columns.numpy(), change.contiguous().numpy(), least.numpy())
        return
    for rows in factor.split(max(1, GATHERED // factor.shape[1])):
        some = rows[:, columns]
        at = (some.abs() > least).any(1).nonzero().squeeze(1)
        rows.index_add_(0, at, some[at] @ change)


@cache
def _add_columns() -> Any:
    from lastlayer.kernels.factored_step_loops import add_columns

    return add_columns


@cache
def _rounding(dtype: torch.dtype) -> float:
    """What may be left out of a sum of 1 and more."""
    return torch.finfo(dtype).eps / 4

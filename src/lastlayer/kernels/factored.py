"""The step of `FactoredOutput` between its loss and its checks: a few products, and passes over their rows.

Each function has two forms: PyTorch's operations, for any device, and `kernels/factored_loops.py`, compiled by
numba, which is one call where the other is ten, and makes use of each row while it is in the cache. That module is
imported when a loop first runs.

Notation: N rows, d features, K targets a row; `W = F U + 1 offset^T`, `Q = W^T W`, `total = W^T 1`, `R = U^-T`;
`stacked (3 d + 2, d)` is Q over U, offset, total and R. `products (N, 3 d + 2)` are those of the hidden states
with `stacked`; of a large batch, (N, 2 d + 2), without R. `D = diag(2 norm)`.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.kernels.softmax_rows import numba_is_there
from lastlayer.kernels.threads import gemm

LEAST_NUMBERS = 1 << 12  # of the hidden states: below, the plain form is as quick, and numba need not be imported
FEATURES_A_WORKER = 32  # at least
GATHERED = 1 << 22  # numbers of gathered rows that the plain form holds at once


class Answer(NamedTuple):
    """What the loss reads of a batch, float64, and what the gradient and the step make use of again."""

    pair: Tensor  # (2 N, d), the hidden states over room for as much
    products: Tensor  # (N, 3 d + 2), or (N, 2 d + 2)
    squared_norm: Tensor  # (N,), h^T Q h
    scores: Tensor  # (N, K), F_t (U h) + offset^T h
    total: Tensor  # (N,), total^T h


def answer(
    hidden: Tensor,  # (N, d)
    stacked: Tensor,  # (3 d + 2, d), or without its last d
    factor: Tensor,  # (V, d), F
    ids: Tensor,  # (N, K)
) -> Answer:
    """The statistics of the outputs; `hidden` is copied, for the caller may refill its buffer."""
    rows, d = hidden.shape
    pair = hidden.new_empty(2 * rows, d)
    if workers := _workers(hidden):
        wide = hidden.new_empty(rows, stacked.shape[0])
        found = Answer(pair, wide, *(torch.empty(s, dtype=torch.float64) for s in ((rows,), ids.shape, (rows,))))
        _loop("answer", workers, hidden.detach().contiguous(), stacked, factor, ids, *found)
        return found
    own = pair[:rows].copy_(hidden)
    products = own @ stacked.T
    squared_norm = (products[:, :d] * own).sum(1).double().clamp_(min=0)
    scores = target_scores(products[:, d : 2 * d], factor, ids) + products[:, 2 * d, None]
    return Answer(pair, products, squared_norm, scores.double(), products[:, 2 * d + 1].double())


def target_scores(
    mapped: Tensor,  # (N, d), hidden @ U^T
    factor: Tensor,  # (V, d)
    ids: Tensor,  # (N, K)
) -> Tensor:  # (N, K)
    """`F_t (U h)`, differentiable; gathered in pieces."""
    rows = max(1, GATHERED // (ids.shape[1] * factor.shape[1]))
    pieces = [
        torch.bmm(factor[piece], part[:, :, None])[:, :, 0]
        for piece, part in zip(ids.split(rows), mapped.split(rows), strict=True)
    ]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def hidden_gradient(
    pair: Tensor,  # (2 N, d); if `records`, the second half becomes the gradient + sparse
    products: Tensor,
    stacked: Tensor,
    factor: Tensor,
    ids: Tensor,  # (N, K)
    target: Tensor,  # (N, K), dL/da
    norm: Tensor,  # (N,), dL/dq
    total: Tensor | None,  # (N,), dL/ds
    records: bool,
) -> Tensor:  # (N, d)
    """`D H Q + sparse`, with `sparse = Y W + g_s total^T` and `Y W = (Y F) U + y offset^T`."""
    rows, d = ids.shape[0], factor.shape[1]
    if workers := _workers(pair):
        gradient, none = pair.new_empty(rows, d), norm[:0]
        some = none if total is None else total
        _loop(
            "hidden_gradient", workers, pair, products, stacked, factor, ids, target, norm, some, gradient, records
        )
        return gradient
    sums = F.embedding_bag(ids, factor, per_sample_weights=target, mode="sum")
    sparse = sums @ stacked[d : 2 * d]
    if total is not None:
        sparse.addr_(target.sum(1), stacked[2 * d]).addr_(total, stacked[2 * d + 1])
    gradient = torch.addcmul(sparse, norm[:, None], products[:, :d], value=2)
    if records:
        torch.add(gradient, sparse, out=pair[rows:])
    return gradient


class RowMatrices(NamedTuple):
    """The (N, N) matrices of a step, and what tells whether it is easy."""

    system: Tensor  # S = lr H H^T D
    inner: Tensor  # lr (Y + g_s 1^T)(Y + g_s 1^T)^T + lr^2 D H both^T: twice the half of lr G G^T
    shrinking: float  # the positive part of the trace of S
    growing: float  # and the negative
    size: float  # the norm of S, at least its largest eigenvalue
    probe: float  # not finite where some target's derivative is not


def row_matrices(
    pair: Tensor,  # (2 N, d), H over `both`, the gradient of hidden + its sparse part
    ids: Tensor,
    target: Tensor,
    total: Tensor | None,
    pull: Tensor,  # (N,), lr D
    rate: float,
    num_classes: int,
) -> RowMatrices:
    """All of a step that its size and its safety depend on."""
    rows = ids.shape[0]
    if workers := _workers(pair):
        system, inner = pair.new_empty(rows, rows), pair.new_empty(rows, rows)
        some = pull[:0] if total is None else total
        shrinking, growing, squares, probe = _loop(
            "row_matrices", workers, pair, ids, target, some, pull, rate, num_classes, system, inner
        )
        return RowMatrices(system, inner, shrinking, growing, math.sqrt(squares), probe)
    cross = pair[:rows] @ pair.T
    inner = sparse_overlap(ids, target, total, num_classes)
    inner.mul_(rate).addcmul_(cross[:, rows:], pull[:, None])
    system = cross[:, :rows] * pull
    own = system.diagonal()
    found = torch.stack(
        [own.clamp(min=0).sum(), -own.clamp(max=0).sum(), system.norm(), target.sum()]
        + ([] if total is None else [total.sum()])
    ).tolist()
    shrinking, growing, size, *probes = found
    return RowMatrices(system, inner, shrinking, growing, size, sum(probes))


def sparse_overlap(ids: Tensor, target: Tensor, total: Tensor | None, num_classes: int) -> Tensor:  # (N, N)
    """`(Y + g_s 1^T) (Y + g_s 1^T)^T`: the part of `G G^T` in which the outputs do not occur."""
    classes, place = ids.unique(return_inverse=True)
    compact = target.new_zeros(ids.shape[0], classes.shape[0]).scatter_add_(1, place, target)
    overlap = compact @ compact.T
    if total is not None:
        rank_one = torch.outer(total, target.sum(1) + num_classes / 2 * total)
        overlap += rank_one + rank_one.T
    return overlap


def solve_by_series(
    system: Tensor,  # (N, N), S
    products: Tensor,
    size: float,  # the norm of S
) -> Tensor:  # (N, d)
    """`(I - S)^-1 H R^T`, by `I + S + S^2 + ...` in few products, for a small S."""
    d = (products.shape[1] - 2) // 3
    right, eps = products[:, 2 * d + 2 :], torch.finfo(system.dtype).eps / 4
    if size**2 <= eps:
        return torch.addmm(right, system, right)
    if workers := _workers(right):
        solution = right.new_empty(right.shape)
        _loop("solve_by_series", workers, system, products, solution, size, eps)
        return solution
    series, power = system, system @ system  # S + ... + S^(m - 1) and S^m
    while float(power.norm()) ** 2 * size > eps:  # what is left out below, from S^(2 m + 1) on
        series = torch.addmm(series + power, power, series)
        power = power @ power
    series = series + power
    return torch.addmm(right, torch.addmm(series, power, series), right)


def update(
    stacked: Tensor,  # (3 d + 2, d)
    factor: Tensor,  # (V, d)
    pair: Tensor,  # (2 N, d), H over `both`
    products: Tensor,  # (N, 3 d + 2), used up
    ids: Tensor,
    target: Tensor,
    norm: Tensor,
    total: Tensor | None,
    rate: float,
    inner: Tensor,  # (N, N)
    solution: Tensor,  # (N, d), X
) -> None:
    """The step by rows: `F -= lr Y^T X`, and one product of rank N for all the rest.

    With its left factors in place of the products that they are made of,

        Q, U, offset, total, R  +=  [2 P | -lr D T | -lr D t - lr g_s | ... | lr D X]^T H,
        2 P = inner H - 2 lr (gradient of hidden),

    and then Q is made symmetric: the mean of `Q + 2 P^T H` and its transpose is `Q + P^T H + H^T P`.
    """
    rows, d = solution.shape
    if workers := _workers(solution):
        some = norm[:0] if total is None else total
        _loop("update", workers, stacked, factor, pair, products, ids, target, norm, some, rate, inner, solution)
        return
    hidden, pull = pair[:rows], (2 * rate * norm)[:, None]
    products[:, : 2 * d + 2].mul_(-pull)
    products[:, :d].sub_(pair[rows:], alpha=rate).addmm_(inner, hidden, alpha=rate)
    products[:, 2 * d + 1].sub_(target.sum(1), alpha=rate)
    if total is not None:
        products[:, 2 * d].sub_(total, alpha=rate)
        products[:, 2 * d + 1].sub_(total, alpha=rate * factor.shape[0])
    torch.mul(solution, pull, out=products[:, 2 * d + 2 :])
    move_targets(factor, ids, target, rate, solution)
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
    if factor.numel() > GATHERED and (workers := _workers(factor)):
        _loop("add_columns", workers, factor, columns, change.contiguous(), least)
        return
    for rows in factor.split(max(1, GATHERED // factor.shape[1])):
        some = rows[:, columns]
        at = (some.abs() > least).any(1).nonzero().squeeze(1)
        rows.index_add_(0, at, some[at] @ change)


def _workers(like: Tensor) -> int:
    """Among how many threads the compiled form divides a batch; 0: the plain form serves."""
    rows, d = like.shape
    if (
        like.device.type != "cpu"
        or like.dtype not in (torch.float32, torch.float64)
        or rows * d < LEAST_NUMBERS
        or not numba_is_there()
        or gemm() is None
    ):
        return 0
    return max(1, min(torch.get_num_threads(), d // FEATURES_A_WORKER))


@cache
def _compiled(name: str) -> Any:
    from lastlayer.kernels import factored_loops

    return getattr(factored_loops, name)


def _loop(name: str, *arguments: Any) -> Any:
    return _compiled(name)(*[a.numpy() if isinstance(a, Tensor) else a for a in arguments])

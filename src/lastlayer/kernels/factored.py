"""A pass of `FactoredOutput` up to the gradient of the hidden states: a few products, and passes over their rows.

Each function has two forms: PyTorch's operations, for any device, and `kernels/factored_loops.py`, compiled by
numba, which is one call where the other is ten, and makes use of each row while it is in the cache. That module is
imported when a loop first runs.

Notation: N rows, d features, K targets a row; `W = F U + 1 offset^T`, `Q = W^T W`, `total = W^T 1`, `R = U^-T`;
`stacked` is Q over U, offset, total and R, with rows of zeros between, as `Columns` says. `products` are those of
the hidden states with `stacked`; of a large batch without R. `D = diag(2 norm)`.
"""

import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.kernels.factored_gradient import Columns, GradientInRoom, Sizes, padded
from lastlayer.kernels.threads import gemm

LEAST_NUMBERS = 1 << 12  # of the hidden states: below, the plain form is as quick, and numba need not be imported
FEATURES_A_WORKER = 32  # at least
GATHERED = 1 << 22  # numbers of gathered rows that the plain form holds at once
SQUARED_ERROR, SPHERICAL_SOFTMAX, TAYLOR_SOFTMAX, Z_LOSS = range(4)  # the kinds of built-in losses
REALS = {torch.float32: "float32", torch.float64: "float64"}


class Answer(NamedTuple):
    """What the loss reads of a batch, float64, and what the gradient and the step make use of again."""

    pair: Tensor  # (2 N, padded d), the hidden states over room for as much
    products: Tensor  # (N, columns)
    squared_norm: Tensor  # (N,), h^T Q h
    scores: Tensor  # (N, K), F_t (U h) + offset^T h
    total: Tensor  # (N,), total^T h


def answer(
    hidden: Tensor,  # (N, d)
    stacked: Tensor,
    factor: Tensor,  # (V, d), F
    ids: Tensor,  # (N, K)
    columns: int,  # of the products that are wanted
) -> Answer:
    """The statistics of the outputs; `hidden` is copied, for the caller may refill its buffer."""
    rows, d = hidden.shape
    pair = hidden.new_empty(2 * rows, padded(d))
    if workers := workers_for(hidden, rows, d):
        wide = hidden.new_empty(rows, columns)
        found = Answer(
            pair, wide, *(hidden.new_empty(s, dtype=torch.float64) for s in ((rows,), ids.shape, (rows,)))
        )
        loop("answer", workers, hidden.detach().contiguous(), stacked, factor, ids, *found)
        return found
    at = Columns.of(d)
    own = pair[:rows, :d].copy_(hidden)
    products = own @ stacked[:columns].T
    squared_norm = (products[:, :d] * own).sum(1).double().clamp_(min=0)
    scores = target_scores(products[:, at.map : at.map + d], factor, ids) + products[:, at.shared, None]
    return Answer(pair, products, squared_norm, scores.double(), products[:, at.shared + 1].double())


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
    pair: Tensor,  # (2 N, padded d); if `records`, the second half becomes the gradient + sparse
    products: Tensor,  # if `records`, the gradient takes the place of those with Q
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
    if workers := workers_for(pair, rows, d):
        gradient, none = pair.new_empty(rows, d), norm[:0]
        some = none if total is None else total
        loop(
            "hidden_gradient", workers, pair, products, stacked, factor, ids, target, norm, some, gradient, records
        )
        return gradient
    at = Columns.of(d)
    sums = F.embedding_bag(ids, factor, per_sample_weights=target, mode="sum")
    sparse = sums @ stacked[at.map : at.map + d]
    if total is not None:
        sparse.addr_(target.sum(1), stacked[at.shared]).addr_(total, stacked[at.shared + 1])
    gradient = torch.addcmul(sparse, norm[:, None], products[:, :d], value=2)
    if records:
        products[:, :d] = gradient
        pair[rows:, :d] = gradient + sparse
    return gradient


class BuiltIn(NamedTuple):
    """A loss that `kernels/factored_losses.py` has, and its settings."""

    kind: int
    one: float = 0.0
    two: float = 0.0
    uses_sum: bool = False


class WholePass(NamedTuple):
    """A reduced loss, and what it changes by."""

    loss: Tensor  # ()
    gradient: Tensor  # of the hidden states, in their shape
    record: GradientInRoom


def whole_pass(
    hidden: Tensor,  # (..., d)
    targets: Tensor,  # (..., K), or (...) of one target a row
    weights: Tensor | None,  # (N, K), float64; None: 1 each
    stacked: Tensor,
    factor: Tensor,  # (V, d)
    loss: BuiltIn,
    mean: bool,  # or the sum of the rows
    columns: int,  # of the products that are wanted
) -> WholePass | None:
    """`answer`, the loss's derivatives and `hidden_gradient` in one compiled call.

    None where only the other form serves, or where a target is no class; then nothing was done.
    """
    num_classes, d = factor.shape
    rows = hidden.numel() // d
    if not (workers := workers_for(hidden, rows, d)) or hidden.dtype != factor.dtype or targets.is_cuda:
        return None
    sizes = Sizes(rows, targets.numel() // rows, d, columns, loss.uses_sum)
    hidden, targets = hidden.contiguous().resolve_neg(), targets.contiguous()
    record = GradientInRoom(sizes, hidden)
    pair, products, ids, target, norm, total = record.place()
    gradient, value = hidden.new_empty(hidden.shape), hidden.new_empty(())
    counts = targets if weights is None else weights.contiguous()
    done = by_address("factored_loops", "whole_pass", "PASS_KINDS", hidden.dtype)(
        workers, rows, sizes.width, d, columns, num_classes, loss.kind, loss.one, loss.two,
        1 / rows if mean else 1.0, loss.uses_sum, stacked.data_ptr(), factor.data_ptr(), hidden.data_ptr(),
        targets.data_ptr(), counts.data_ptr(), weights is not None, ids, pair, products, target, norm, total,
        gradient.data_ptr(), value.data_ptr(),
    )  # fmt: skip
    return WholePass(value, gradient, record) if done else None


def workers_for(like: Tensor, rows: int, d: int) -> int:
    """Among how many threads the compiled form divides a batch; 0: the plain form serves."""
    if (
        rows * d < LEAST_NUMBERS
        or like.dtype not in REALS
        or like.device.type != "cpu"
        or importlib.util.find_spec("numba") is None
        or gemm() is None
    ):
        return 0
    return max(1, min(torch.get_num_threads(), d // FEATURES_A_WORKER))


@cache
def _compiled(name: str) -> Any:
    from lastlayer.kernels import factored_loops

    return getattr(factored_loops, name)


def loop(name: str, *arguments: Any) -> Any:
    """A function of `factored_loops.py`."""
    return _compiled(name)(*[a.numpy() if isinstance(a, Tensor) else a for a in arguments])


@cache
def by_address(module: str, name: str, kinds: str, dtype: torch.dtype) -> Any:
    """A function of one of the modules of loops, called by address."""
    from importlib import import_module

    from lastlayer.kernels.by_address import ByAddress

    loops = import_module(f"lastlayer.kernels.{module}")
    return ByAddress(getattr(loops, name), getattr(loops, kinds), REALS[dtype])

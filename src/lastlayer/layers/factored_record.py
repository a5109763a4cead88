"""What a training-mode pass of `FactoredOutput` leaves for `FactoredSGD`, and how autograd carries it there.

One node, `_Loss` (usually that of `factored_pass.py`): the loss and, backwards, the gradient of the hidden
states and the record of the step. The record is made only when the engine goes on to the layer's anchor, that is,
when the gradient of the layer itself is wanted: `torch.autograd.grad(loss, hidden)` records nothing,
`loss.backward()` does.

The anchor's gradient stands for the weight's: each pass adds a tiny mark to it. Whoever removes it (`zero_grad`
of any kind) removes the records, and whoever multiplies it (`clip_grad_norm_`, a loss scaler) scales the step.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lastlayer.functional.reduce import reduce_loss
from lastlayer.functional.spherical import RowDerivatives, SphericalLoss
from lastlayer.kernels.factored import Answer, answer, hidden_gradient
from lastlayer.kernels.factored_gradient import Columns, FactoredGradient
from lastlayer.layers.factored_state import FactoredState
from lastlayer.layers.factored_step import prefers_features

MARK = 2.0**-100  # too small to change the norm of any other gradient


class Ledger:
    """The gradients recorded since the last step, tied to the life of the anchor's `.grad`."""

    def __init__(self) -> None:
        self.gradients: list[FactoredGradient] = []
        self.marks = 0.0  # what the anchor's gradient is when nobody scaled it
        self.spent = False  # a step took the records, and nobody has zeroed the gradient since
        self.version = 0  # of the weight
        self._backward = -1  # the backward pass that recorded last

    def add(self, anchor: Tensor, gradient: FactoredGradient) -> None:
        """Called in the backward pass, before autograd adds the mark to `anchor.grad`."""
        this_backward = torch._C._current_graph_task_id()
        if this_backward != self._backward:
            self.settle(anchor)
            if self.spent:
                raise RuntimeError(
                    "backward after step() without zero_grad(): a gradient of the weight before the step "
                    "cannot be added to one after it; call zero_grad() between them"
                )
            self._backward = this_backward
        self.gradients.append(gradient)
        self.marks += MARK

    def settle(self, anchor: Tensor) -> None:
        """Does to the records what was done to the anchor's gradient."""
        now = 0.0 if anchor.grad is None else float(anchor.grad)
        if now == 0:
            self.gradients, self.marks, self.spent = [], 0.0, False
        elif self.gradients and now != self.marks:
            for gradient in self.gradients:
                gradient.scale(now / self.marks)
            self.marks = now

    def take(self) -> FactoredGradient | None:
        """The settled records as one."""
        return FactoredGradient.joined(self.gradients) if self.gradients else None

    def forget(self, anchor: Tensor) -> None:
        """After the weight was replaced: what was recorded no longer fits it."""
        anchor.grad = None
        self.close()
        self.spent = False

    def close(self) -> None:
        """After a step: the records are used up."""
        self.gradients, self.marks, self.spent = [], 0.0, True
        self.version += 1


class Record:
    """One forward pass in training: whose weight it read, and whether its backward was recorded."""

    def __init__(
        self, state: FactoredState, ledger: Ledger, anchor: nn.Parameter, check_owner: Callable[[], None]
    ):
        self.state, self.ledger, self.version = state, ledger, ledger.version
        self.anchor, self.check_owner = anchor, check_owner
        self.committed = False

    def check_weight(self) -> None:
        """An error when a step was taken between forward and backward."""
        if self.version != self.ledger.version:
            raise RuntimeError(
                "the weight was changed by a step() after this forward pass, so its gradient can no longer be "
                "computed; run forward again"
            )

    def commit(self, gradient: FactoredGradient) -> None:
        """Records it, or an error when this backward pass cannot train the layer."""
        self.check_first()
        self.ledger.add(self.anchor, gradient)
        self.committed = True

    def check_first(self) -> None:
        """An error when this backward pass cannot train the layer."""
        self.check_owner()
        if self.committed:
            raise RuntimeError(
                "second backward of one forward pass: its step is recorded already; run forward again, or use "
                "torch.autograd.grad for the gradient of hidden alone"
            )


def recorded_loss(
    hidden: Tensor,  # (N, d)
    ids: Tensor,  # (N, K)
    weights: Tensor,  # (N, K)
    loss: SphericalLoss,
    record: Record,
    reduction: str,
) -> Tensor:  # (), or (N,) in float64 for "none"
    """The loss; its backward records the step."""
    return _Loss.apply(hidden, record.anchor, ids, weights, loss, record, reduction)  # pyright: ignore[reportReturnType]


class _Loss(torch.autograd.Function):
    """The loss's own derivatives are made in the forward pass, of a few numbers a row."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        ids: Tensor,
        weights: Tensor,
        loss: SphericalLoss,
        record: Record,
        reduction: str,
    ) -> Tensor:
        state, (rows, d), ids = record.state, hidden.shape, ids.contiguous()
        with full_precision(hidden.device.type):
            read: Answer = answer(hidden, state.stacked, state.factor, ids, needed_columns(rows, d))
        found = loss.derivatives(read.scores, weights, read.squared_norm, read.total, state.num_classes)
        ctx.record, ctx.ids, ctx.read, ctx.found, ctx.written = record, ids, read, found, False
        ctx.share = max(rows, 1) if reduction == "mean" else 1
        reduced = reduce_loss(found.row_loss, None, reduction)
        return reduced if reduction == "none" else reduced.to(state.factor.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        record: Record = ctx.record
        record.check_weight()
        commits = torch._C._will_engine_execute_node(ctx.next_functions[1][0])
        if commits:
            record.check_first()
        state, ids, read = record.state, ctx.ids, ctx.read
        if ctx.written:  # the gradient has taken the place of some products
            hidden = read.pair[: len(ids), : state.features]
            read = answer(hidden, state.stacked, state.factor, ids, read.products.shape[1])
        ctx.written |= commits
        pair, products, *_ = read
        found: RowDerivatives = ctx.found
        by_row, dtype = upstream / ctx.share, pair.dtype  # (), or (N,) in float64
        each = by_row[:, None] if by_row.dim() else by_row
        target, norm = (each * found.by_score).to(dtype).contiguous(), (by_row * found.by_norm).to(dtype)
        total = None if found.by_total is None else (by_row * found.by_total).to(dtype)
        with full_precision(pair.device.type):
            gradient = hidden_gradient(
                pair, products, state.stacked, state.factor, ids, target, norm, total, commits
            )
        if not commits:
            return gradient, *[None] * 6
        record.commit(FactoredGradient(pair, ids, target, norm, total, products, state.features))
        return gradient, mark_of(record.anchor), *[None] * 5


def mark_of(anchor: Tensor) -> Tensor:
    """The gradient of an anchor; autograd copies it, as it is kept here."""
    return _mark(anchor.dtype, anchor.device)


@cache
def _mark(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), MARK, dtype=dtype, device=device)


@cache
def needed_columns(rows: int, features: int) -> int:
    """Of the products with `stacked`: those with R serve a step by rows."""
    at = Columns.of(features)
    return at.inverse if prefers_features(rows, features) else at.end


def full_precision(kind: str) -> Any:
    """Outside of any autocast on this kind of device."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

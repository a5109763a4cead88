"""What a training-mode pass of `FactoredOutput` leaves for `FactoredSGD`, and how autograd carries it there.

Two nodes. `_RowLoss` computes the loss of every row and, backwards, the gradient of the hidden states
and the record of the step. `_Commit` stands between it and the layer's anchor, so that it runs only when the
gradient of the layer itself is wanted: `torch.autograd.grad(loss, hidden)` records nothing, `loss.backward()`
does.

The anchor's gradient stands for the weight's: each pass adds a tiny mark to it. Whoever removes it (`zero_grad`
of any kind) removes the records, and whoever multiplies it (`clip_grad_norm_`, a loss scaler) scales the step.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lastlayer.functional.spherical import RowDerivatives, SphericalLoss
from lastlayer.layers.factored_state import FactoredState
from lastlayer.layers.factored_step import FactoredGradient, prefers_features

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
    """One forward pass in training: what its backward needs, and then what the step needs."""

    def __init__(self, state: FactoredState, ledger: Ledger) -> None:
        self.state, self.ledger, self.version = state, ledger, ledger.version
        self.gradient: FactoredGradient | None = None
        self.committed = False

    def check_weight(self) -> None:
        """An error when a step was taken between forward and backward."""
        if self.version != self.ledger.version:
            raise RuntimeError(
                "the weight was changed by a step() after this forward pass, so its gradient can no longer be "
                "computed; run forward again"
            )


def recorded_row_loss(
    hidden: Tensor,  # (N, d)
    ids: Tensor,  # (N, K)
    weights: Tensor,  # (N, K)
    loss: SphericalLoss,
    anchor: nn.Parameter,
    record: Record,
    check_owner: Callable[[], None],
) -> Tensor:  # (N,), float64
    """The loss of every row; its backward records the step."""
    return _RowLoss.apply(hidden, _Commit.apply(anchor, record, check_owner), ids, weights, loss, record)


class _Commit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, record: Record, check_owner: Callable[[], None]) -> Tensor:
        ctx.anchor, ctx.record, ctx.check_owner = anchor, record, check_owner
        return torch.zeros_like(anchor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        record: Record = ctx.record
        ctx.check_owner()
        if record.committed:
            raise RuntimeError(
                "second backward of one forward pass: its step is recorded already; run forward again, or use "
                "torch.autograd.grad for the gradient of hidden alone"
            )
        assert record.gradient is not None
        record.ledger.add(ctx.anchor, record.gradient)
        record.committed, record.gradient = True, None
        return torch.full_like(ctx.anchor, MARK), None, None


class _RowLoss(torch.autograd.Function):
    """The loss's own derivatives are made in the forward pass, of a few numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, link: Tensor, ids: Tensor, weights: Tensor, loss: SphericalLoss, record: Record
    ) -> Tensor:
        state, (rows, d) = record.state, hidden.shape
        with full_precision(hidden.device.type):
            needed = state.square[: 2 * d] if prefers_features(rows, d) else state.square
            products = hidden @ needed.T  # H Q, H U^T, H R^T
            squared_norm = (products[:, :d] * hidden).sum(1)
            mapped = products[:, d : 2 * d]
            if ids.shape[1] == 1:
                ctx.factor_rows = state.factor.index_select(0, ids[:, 0])
                scores = (mapped * ctx.factor_rows).sum(1, keepdim=True)
            else:
                ctx.factor_rows = None
                scores = state.target_scores(mapped, None, ids)
            if state.total is None:
                total = torch.zeros_like(squared_norm)
            else:
                scores += (hidden @ state.offset)[:, None]
                total = hidden @ state.total
        found = loss.derivatives(
            scores.double(), weights, squared_norm.double().clamp_(min=0), total.double(), state.num_classes
        )
        ctx.record, ctx.ids, ctx.products, ctx.found = record, ids, products, found
        ctx.save_for_backward(hidden)
        return found.row_loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_row: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The gradient of hidden, `D H Q + Y W + g_s total^T`, with `Y W = (Y F) U + y offset^T`."""
        record: Record = ctx.record
        record.check_weight()
        (hidden,) = ctx.saved_tensors
        state, (_, d), dtype = record.state, hidden.shape, hidden.dtype
        found: RowDerivatives = ctx.found
        target = (by_row[:, None] * found.by_score).to(dtype)
        norm = (by_row * found.by_norm).to(dtype)
        total = None
        with full_precision(hidden.device.type):
            if ctx.factor_rows is not None:
                sparse = (target * ctx.factor_rows) @ state.map
            else:
                bags = F.embedding_bag(ctx.ids, state.factor, per_sample_weights=target, mode="sum")
                sparse = bags @ state.map
            if state.total is not None and found.by_total is not None:
                total = (by_row * found.by_total).to(dtype)
                sparse.addr_(target.sum(1), state.offset).addr_(total, state.total)
            wanted = torch.addcmul(sparse, norm[:, None], ctx.products[:, :d], value=2)
        own = hidden.clone(memory_format=torch.contiguous_format)  # the caller may refill its buffer before step()
        record.gradient = FactoredGradient(own, ctx.ids, target, norm, total, ctx.products, sparse, wanted)
        return wanted, norm.new_zeros(()), None, None, None, None


def full_precision(kind: str) -> Any:
    """Outside of any autocast on this kind of device."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

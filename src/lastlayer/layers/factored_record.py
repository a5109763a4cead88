"""What a training-mode pass of `FactoredOutput` leaves for `FactoredSGD`, and how autograd carries it there.

Two nodes. `_Statistics` computes the few numbers of the loss and, backwards, the gradient of the hidden states
and the record of the step. `_Commit` stands between it and the layer's anchor, so that it runs only when the
gradient of the layer itself is wanted: `torch.autograd.grad(loss, hidden)` records nothing, `loss.backward()`
does.

The anchor's gradient stands for the weight's: each pass adds a tiny mark to it. Whoever removes it (`zero_grad`
of any kind) removes the records, and whoever multiplies it (`clip_grad_norm_`, a loss scaler) scales the step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

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


def recorded_statistics(
    hidden: Tensor,  # (N, d)
    ids: Tensor,  # (N, K)
    anchor: nn.Parameter,
    state: FactoredState,
    ledger: Ledger,
    check_owner: Callable[[], None],
) -> tuple[Tensor, Tensor, Tensor]:  # (N, K), (N,), (N,), float64
    """Target scores, squared norm and sum of the outputs; their backward records the step."""
    record = Record(state, ledger)
    link = _Commit.apply(anchor, record, check_owner)
    return _Statistics.apply(hidden, link, ids, record)


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


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, link: Tensor, ids: Tensor, record: Record
    ) -> tuple[Tensor, Tensor, Tensor]:
        state, (rows, d) = record.state, hidden.shape
        with torch.autocast(hidden.device.type, enabled=False):
            needed = state.square[: 2 * d] if prefers_features(rows, d) else state.square
            products = hidden @ needed.T  # H Q, H U^T, H R^T
            squared_norm = (products[:, :d] * hidden).sum(1).double().clamp_(min=0)
            mapped = products[:, d : 2 * d]
            if state.total is None:
                shift, total = None, torch.zeros_like(squared_norm)
            else:
                shift, total = hidden @ state.offset, (hidden @ state.total).double()
            ctx.factor_rows = state.factor.index_select(0, ids[:, 0]) if ids.shape[1] == 1 else None
            if ctx.factor_rows is None:
                scores = state.target_scores(mapped, shift, ids)
            else:
                scores = (mapped * ctx.factor_rows).sum(1, keepdim=True)
                scores = scores if shift is None else scores + shift[:, None]
        ctx.record, ctx.ids, ctx.products = record, ids, products
        ctx.save_for_backward(hidden)
        return scores.double(), squared_norm, total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, by_score: Tensor, by_norm: Tensor, by_total: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        """The gradient of hidden, `D H Q + Y W + g_s total^T`, with `Y W = (Y F) U + y offset^T`."""
        record: Record = ctx.record
        record.check_weight()
        (hidden,) = ctx.saved_tensors
        state, d = record.state, hidden.shape[1]
        target, norm = by_score.to(hidden.dtype), by_norm.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.factor_rows is not None:
                sparse = (target * ctx.factor_rows) @ state.map
            else:
                bags = F.embedding_bag(ctx.ids, state.factor, per_sample_weights=target, mode="sum")
                sparse = bags @ state.map
            total = None
            if state.total is not None:
                total = by_total.to(hidden.dtype)
                sparse.addr_(target.sum(1), state.offset).addr_(total, state.total)
            wanted = torch.addcmul(sparse, (2 * norm)[:, None], ctx.products[:, :d])
        own = hidden.clone(memory_format=torch.contiguous_format)  # the caller may refill its buffer before step()
        record.gradient = FactoredGradient(own, ctx.ids, target, norm, total, ctx.products, sparse, wanted)
        return wanted, record.gradient.norm.new_zeros(()), None, None

"""What a training-mode pass of `FactoredOutput` leaves for `FactoredSGD`, and how autograd carries it there.

One node, `_Loss`: the loss and, backwards, the gradient of the hidden states. Its other input is a copy of the
layer's anchor, one for each pass, whose hook autograd calls only where it goes on to the anchor, that is, when
the gradient of the layer itself is needed: `loss.backward()` records the pass for the next step,
`torch.autograd.grad(loss, hidden)` does not.

The anchor's gradient stands for the weight's: a tiny mark. Whoever removes it (`zero_grad` of any kind) removes
the records, and whoever multiplies it (`clip_grad_norm_`, a loss scaler) scales the step. It is NaN where the
weight's is not finite, so that a loss scaler leaves the step out.
"""

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lastlayer.functional.precision import no_autocast
from lastlayer.functional.reduce import reduce_loss
from lastlayer.functional.second_order import HandWritten, refused
from lastlayer.functional.spherical import RowDerivatives, SphericalLoss
from lastlayer.kernels import factored as kernel
from lastlayer.layers.factored.state import FactoredState
from lastlayer.layers.factored.step import Gradient

NO_SECOND = (
    "FactoredOutput forms its own gradients and cannot be differentiated twice; for second derivatives "
    "use lastlayer.functional.spherical_loss with layer.weight"
)
MARK = 2.0**-100  # too small to change the norm of any other gradient


class Ledger:
    """The gradients recorded since the last step, valid while the anchor's `.grad` exists, and their optimizer."""

    def __init__(self) -> None:
        self.gradients: list[Gradient] = []
        self.mark = 0.0  # the anchor's gradient as long as it is not scaled
        self.spent = False  # a step used the records, and the gradient was not zeroed since
        self.version = 0  # of the weight
        self._owner: weakref.ref[Any] | None = None

    @property
    def owner(self) -> Any:
        """The `FactoredSGD` that makes the steps; None without one."""
        return None if self._owner is None else self._owner()

    @owner.setter
    def owner(self, optimizer: Any) -> None:
        self._owner = weakref.ref(optimizer)

    def add(self, anchor: Tensor, gradient: Gradient) -> None:
        """Called in the backward pass."""
        self.apply_scaling(anchor)
        if self.owner is None:
            raise RuntimeError(
                "backward in training mode of a FactoredOutput that no FactoredSGD owns: its weight would never "
                "be trained; make FactoredSGD(layer, lr) and keep it, or freeze the layer with layer.eval() or "
                "layer.requires_grad_(False)"
            )
        if self.spent:
            raise RuntimeError(
                "backward after step() without zero_grad(): a gradient of the weight before the step "
                "cannot be added to one after it; call zero_grad() between them"
            )
        if not self.gradients:
            self.mark = MARK
            anchor.grad = torch.full_like(anchor, MARK)
        if not _is_finite(gradient.by_hidden):
            anchor.grad = torch.full_like(anchor, torch.nan)
        self.gradients.append(gradient)

    def apply_scaling(self, anchor: Tensor) -> None:
        """Scales or drops the records as the anchor's gradient was scaled or zeroed."""
        now = 0.0 if anchor.grad is None else float(anchor.grad)
        if now == 0:
            self.gradients, self.spent = [], False
        elif self.gradients and now != self.mark:
            self.gradients = [gradient.scaled(now / self.mark) for gradient in self.gradients]
            self.mark = now

    def take(self) -> Gradient | None:
        """The scaled records as one."""
        return Gradient.joined(self.gradients) if self.gradients else None

    def forget(self, anchor: Tensor) -> None:
        """After the weight was replaced: what was recorded no longer fits it."""
        anchor.grad = None
        self.close()
        self.spent = False

    def close(self) -> None:
        """After a step: the records are used up."""
        self.gradients, self.spent = [], True
        self.version += 1


def _is_finite(gradient: Tensor) -> bool:
    """Whether all numbers are. On a CPU by numpy, on one thread: see "Threads" in docs/training_loops.md."""
    if gradient.device.type == "cpu":
        return bool(np.isfinite(gradient.numpy()).all())
    return bool(gradient.isfinite().all())


class Pass:
    """One forward pass in training: the state it read, and whether its backward was recorded."""

    def __init__(self, state: FactoredState, ledger: Ledger, anchor: nn.Parameter) -> None:
        self.state, self.ledger, self.anchor = state, ledger, anchor
        self.version = ledger.version
        self.gradient: Gradient | None = None  # of the backward that runs
        self.recorded = False

    def check_weight(self) -> None:
        """An error when a step was taken between forward and backward."""
        if self.version != self.ledger.version:
            raise RuntimeError(
                "the weight was changed by a step() after this forward pass, so its gradient can no longer be "
                "computed; run forward again"
            )

    def record(self, _: Tensor) -> None:
        """The hook: records this backward pass, or an error where it cannot train the layer."""
        gradient, self.gradient = self.gradient, None
        if self.recorded:
            raise RuntimeError(
                "second backward of one forward pass: its step is recorded already; run forward again, or use "
                "torch.autograd.grad for the gradient of hidden alone"
            )
        assert gradient is not None
        self.ledger.add(self.anchor, gradient)
        self.recorded = True


def recorded_loss(
    hidden: Tensor,  # (N, d)
    ids: Tensor,  # (N, K)
    weights: Tensor,  # (N, K)
    loss: SphericalLoss,
    own: Pass,
    reduction: str,
) -> Tensor:  # (), or (N,) in float64 for "none"
    """The loss; its backward records the step."""
    anchor = own.anchor.clone()
    anchor.register_hook(own.record)
    found: Any = _Loss.run(anchor, hidden, ids, weights, loss, own, reduction)
    return found[0]


class _Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    rows: Tensor  # (N, d), of the hidden states
    products: Tensor  # of the rows with the state
    ids: Tensor  # (N, K)
    found: RowDerivatives


class _Loss(HandWritten):
    """The loss's own derivatives are formed in the forward pass, of a few numbers a row."""

    @staticmethod
    def forward(
        anchor: Tensor,
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        loss: SphericalLoss,
        own: Pass,
        reduction: str,
    ) -> tuple[Tensor, _Kept]:
        state = own.state
        ids = ids.contiguous()
        with no_autocast(hidden.device.type):
            rows, products, scores, squared_norm, total = state.read_copy(hidden, ids)
        found = loss.derivatives(scores, weights, squared_norm, total, state.num_classes)
        reduced = reduce_loss(found.row_loss, None, reduction)
        kept = _Kept(rows, products, ids, found)
        return reduced if reduction == "none" else reduced.to(state.factor.dtype), kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, _Kept]) -> None:
        _, hidden, _, _, _, ctx.own, reduction = inputs
        _, ctx.kept = output
        ctx.share = max(len(hidden), 1) if reduction == "mean" else 1
        ctx.save_for_backward(hidden)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor, _: None
    ) -> tuple[Tensor | None, ...]:
        ctx.own.check_weight()
        with torch.no_grad(), no_autocast(upstream.device.type):
            ctx.own.gradient, by_hidden = _gradient(ctx.own.state, ctx.kept, upstream / ctx.share)
        by_hidden = refused(by_hidden, NO_SECOND, upstream, *ctx.saved_tensors)
        return torch.zeros_like(ctx.own.anchor), by_hidden, *[None] * 5  # pyright: ignore[reportReturnType]


def _gradient(
    state: FactoredState,
    kept: _Kept,
    share: Tensor,  # () or (N,), float64: what each row counts
) -> tuple[Gradient, Tensor]:  # and (N, d)
    """What the step needs, and the gradient of the hidden states for its owner to change:

    Z = G W = D H Q + sparse,    sparse = Y W + g_s total^T,    Y W = (Y F) U + y offset^T.
    """
    (rows, products, ids, found), d = kept, state.features
    by_score = ((share[:, None] if share.dim() else share) * found.by_score).to(products.dtype)
    by_norm = (share * found.by_norm).to(products.dtype)
    by_total = None if found.by_total is None else (share * found.by_total).to(products.dtype)
    if state.compiled():
        given = products, state.reading, state.factor, ids, by_score.contiguous(), by_norm, by_total
        by_hidden, sparse, copy = kernel.hidden_gradient(*given)
    else:
        sums = state.rows.target_sums(ids, by_score)
        sparse = torch.addr(sums @ state.map, by_score.sum(1), state.offset)
        if by_total is not None:
            sparse.addr_(by_total, state.total)
        by_hidden = torch.addcmul(sparse, by_norm[:, None], products[:, :d], value=2)
        copy = by_hidden.clone()
    return Gradient(rows, products, ids, by_score.contiguous(), by_norm, by_total, by_hidden, sparse), copy

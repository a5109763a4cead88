"""What a training-mode pass of `FactoredOutput` leaves for `FactoredSGD`, and how autograd carries it there.

One node, `_RowLosses`: the loss of each row and, backwards, the gradient of the hidden states. Its other input
is a copy of the layer's anchor, one for each pass, whose hook autograd calls only where it goes on to the anchor,
that is, when the gradient of the layer itself is needed: `loss.backward()` records the pass for the next step,
`torch.autograd.grad(loss, hidden)` does not.

The anchor's gradient stands for the weight's: a tiny mark. Whoever removes it (`zero_grad` of any kind) removes
the records, and whoever multiplies it (`clip_grad_norm_`, a loss scaler) scales the step. It is NaN where the
weight's is not finite, so that a loss scaler leaves the step out.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional.operators import outside_graphs
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import no_autocast
from lastlayer.functional.second_order import HandWritten, refused
from lastlayer.functional.spherical import RowDerivatives, SphericalLoss
from lastlayer.kernels import factored as kernel
from lastlayer.layers.factored.state import FactoredState

NO_SECOND = (
    "FactoredOutput forms its own gradients and cannot be differentiated twice; for second derivatives "
    "use lastlayer.functional.spherical_loss with layer.weight"
)
MARK = 2.0**-100  # too small to change the norm of any other gradient


@dataclass(frozen=True)
class Gradient:
    """One backward pass, or several at the same weight: what the step needs, N rows in all."""

    hidden: Tensor  # (N, d), H
    products: Tensor  # (N, 2 d + 2), of H with Q, U (that is T), offset (t) and total
    ids: Tensor  # (N, K)
    by_score: Tensor  # (N, K), dL/da
    by_norm: Tensor  # (N,), dL/dq
    by_total: Tensor | None  # (N,), dL/ds; None when the loss does not read the sum
    by_hidden: Tensor  # (N, d), Z
    sparse: Tensor  # (N, d), the part of Z that is not D H Q: Y W + g_s total^T

    def scaled(self, factor: float) -> "Gradient":
        """The gradient of `factor` times the loss."""
        return replace(
            self,
            by_score=self.by_score * factor,
            by_norm=self.by_norm * factor,
            by_total=None if self.by_total is None else self.by_total * factor,
            by_hidden=self.by_hidden * factor,
            sparse=self.sparse * factor,
        )

    @classmethod
    def joined(cls, parts: Sequence["Gradient"]) -> "Gradient":
        """Several passes as one of all their rows."""
        width = max(part.ids.shape[1] for part in parts)

        def rows(name: str) -> Any:
            found = [getattr(part, name) for part in parts]
            if name in ("ids", "by_score"):
                found = [F.pad(part, (0, width - part.shape[1])) for part in found]
            return None if found[0] is None else torch.cat(found)

        return parts[0] if len(parts) == 1 else cls(**{field.name: rows(field.name) for field in fields(cls)})


class Ledger:
    """The gradients recorded since the last step, valid while the anchor's `.grad` exists, and their optimizer."""

    def __init__(self) -> None:
        self.gradients: list[Gradient] = []
        self.mark = MARK  # the anchor's gradient as long as it is not scaled
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
        numbers = gradient.by_hidden
        if not (np.isfinite(numbers.numpy()) if numbers.is_cpu else numbers.isfinite()).all():
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

    def close(self) -> None:
        """After a step: the records are used up."""
        self.gradients, self.spent = [], True
        self.version += 1

    def forget(self, anchor: Tensor) -> None:
        """After the weight was replaced: what was recorded no longer fits it."""
        anchor.grad = None
        self.close()
        self.spent = False


class Pass:
    """One forward pass in training: what its backward pass needs of it, and whether that was recorded."""

    hidden: Tensor  # (N, d)
    products: Tensor  # (N, 2 d + 2)
    ids: Tensor  # (N, K)
    loss: RowDerivatives

    def __init__(self, state: FactoredState, ledger: Ledger, anchor: nn.Parameter) -> None:
        self.state, self.ledger, self.anchor = state, ledger, anchor
        self.version = ledger.version
        self.recorded = False
        self.gradient: Gradient | None = None  # of the backward that runs

    def forward(self, loss: SphericalLoss, hidden: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Reads the state."""
        self.hidden = _copied(hidden)  # as the loop may refill its buffer before the step
        self.ids = ids.contiguous()
        self.products, scores, squared_norm, total = self.state.read(self.hidden, self.ids)
        self.loss = loss.derivatives(scores, weights, squared_norm, total, self.state.num_classes)

    def backward(
        self,
        share: Tensor,  # (N,), float64: what each row counts
    ) -> Tensor:  # (N, d)
        """The gradient of the hidden states, and what the step needs:

        Z = G W = D H Q + sparse,    sparse = Y W + g_s total^T,    Y W = (Y F) U + y offset^T.
        """
        if self.version != self.ledger.version:
            raise RuntimeError(
                "the weight was changed by a step() after this forward pass, so its gradient can no longer be "
                "computed; run forward again"
            )
        state, ids, products = self.state, self.ids, self.products
        by_score = (share[:, None] * self.loss.by_score).to(products.dtype).contiguous()
        by_norm = (share * self.loss.by_norm).to(products.dtype)
        by_total = None if self.loss.by_total is None else (share * self.loss.by_total).to(products.dtype)
        if state.compiled():
            found = kernel.hidden_gradient(products, state.reading, state.factor, ids, by_score, by_norm, by_total)
            by_hidden, sparse = found
        else:
            sparse = torch.addr(state.target_sums(ids, by_score) @ state.map, by_score.sum(1), state.offset)
            if by_total is not None:
                sparse.addr_(by_total, state.total)
            by_hidden = torch.addcmul(sparse, by_norm[:, None], products[:, : state.features], value=2)
        self.gradient = Gradient(self.hidden, products, ids, by_score, by_norm, by_total, by_hidden, sparse)
        return _copied(by_hidden)  # as its owner may change it

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


def _copied(tensor: Tensor) -> Tensor:
    """On a CPU by numpy, on one thread: see "Threads" in docs/training_loops.md."""
    tensor = tensor.detach().resolve_neg()
    return torch.from_numpy(tensor.numpy().copy()) if tensor.is_cpu else tensor.clone()


@outside_graphs
def recorded_losses(
    own: Pass,
    loss: SphericalLoss,
    hidden: Tensor,  # (N, d)
    ids: Tensor,  # (N, K)
    weights: Tensor,  # (N, K)
) -> Tensor:  # (N,), float64
    """The loss of each row; its backward records the step."""
    if own.anchor.dtype == torch.float16:
        raise TypeError("a float16 FactoredOutput does not train: use layer.float() or layer.bfloat16()")
    if not ordinary(hidden, own.anchor):
        raise RuntimeError(
            "FactoredOutput of lastlayer cannot record a training step in torch.func, forward-mode AD, an "
            "exported program or on 'meta'; use layer.eval(), or spherical_loss of lastlayer.functional with "
            "layer.weight"
        )
    with torch.no_grad(), no_autocast(hidden.device.type):
        own.forward(loss, hidden, ids, weights)
    anchor = own.anchor.clone()
    anchor.register_hook(own.record)
    return _RowLosses.run(anchor, hidden, own)


class _RowLosses(HandWritten):
    @staticmethod
    def forward(anchor: Tensor, hidden: Tensor, own: Pass) -> Tensor:
        return own.loss.row_loss

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, hidden, ctx.own = inputs
        ctx.save_for_backward(hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.no_grad(), no_autocast(upstream.device.type):
            by_hidden = ctx.own.backward(upstream)
        return torch.zeros_like(ctx.own.anchor), refused(by_hidden, NO_SECOND, upstream, *ctx.saved_tensors), None

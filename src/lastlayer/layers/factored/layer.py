"""FactoredOutput: exact SGD of a layer with very many classes at a cost that does not depend on their number.

Vincent, de Brebisson and Bouthillier, "Efficient exact gradient update for training deep networks with very large
sparse targets" (NIPS 2015); de Brebisson and Vincent, "An exploration of softmax alternatives belonging to the
spherical loss family" (ICLR 2016).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.precision import no_autocast
from lastlayer.functional.reduce import at_kept, reduce_loss
from lastlayer.functional.results import ScoreTopK, TopK
from lastlayer.functional.selection import Selection
from lastlayer.functional.sparse_targets import sparse_targets
from lastlayer.functional.spherical import NormalizedLoss, SphericalLoss, SphericalSoftmax
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored.conditioning import Stabilizer
from lastlayer.layers.factored.optimizer import FactoredSGD
from lastlayer.layers.factored.record import Ledger, Pass, recorded_losses
from lastlayer.layers.factored.state import Consistency, FactoredState, in_range


class FactoredOutput(OutputLayer):
    """Equals `spherical_loss(hidden, weight, targets, bias, loss=loss)` trained by plain SGD, but an exact step
    costs O(d^2) an example instead of O(V d).

    The V outputs `o = W h + b` are never computed in training: the loss may read their squared norm, their sum
    and the few target outputs. From `W = F U` with a small `U (d, d)`, its inverse, and `Q = W^T W`:

        ||o||^2 = h^T Q h,    o_t = F_t (U h),    W - lr G^T H by updates of U, Q and the target rows of F

    Train it with `FactoredSGD`, which owns the step; the weight is state of the layer, not a parameter (one empty
    parameter, the anchor, stands for it in optimizers and schedulers). In `eval()` nothing is recorded, and
    gradients reach `hidden` alone.

    Time of a step on N examples: about `9 N d^2 + 5 N^2 d` multiply-adds, whatever V; memory `V d + 3 d^2`.
    `log_prob`, `topk` and `weight` cost what V classes cost. Repairs keep the state well conditioned at O(V)
    for each direction of the hidden space that training shrank some tenfold, and O(d) for each row that this
    changes, at first all V, later recent targets. Once in some 2 V examples Q is recomputed: O(V d^2).

    When not to use it: with the ordinary softmax (no `exp` is possible here), with momentum, Adam or elementwise
    clipping, or for few classes (a plain step is 3 V d multiply-adds an example). bfloat16 layers compute and keep
    their state in float32; float16 ones do not train.

    Args:
        in_features: d.
        num_classes: V.
        loss: `SquaredError()`, `SphericalSoftmax()`, `TaylorSoftmax()`, `ZLoss()`, or your own `SphericalLoss`.
            The normalised ones (spherical, Taylor) have probabilities; of the others `log_prob` raises, while
            `scores` and `topk` work.
        bias: adds one output bias a class, by a constant feature.
        reduction, ignore_index, device, dtype: as in every `OutputLayer`.

    Raises:
        TypeError: `loss` is not a `SphericalLoss`; training in float16; `log_prob` of a loss that has none.
        RuntimeError: backward in training mode with no `FactoredSGD`, twice for one forward, or after a step that
            came between.

    Example:
        >>> import torch
        >>> from lastlayer import FactoredOutput, FactoredSGD, SquaredError
        >>> layer = FactoredOutput(16, 100_000, loss=SquaredError())
        >>> optimizer = FactoredSGD(layer, lr=0.05)
        >>> hidden, targets = torch.ones(8, 16) / 4, torch.arange(8)
        >>> before = layer(hidden, targets)
        >>> before.backward()
        >>> optimizer.step()
        >>> bool(layer(hidden, targets) < before)
        True
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss: SphericalLoss | None = None,
        bias: bool = False,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        self.loss = SphericalSoftmax() if loss is None else loss
        if not isinstance(self.loss, SphericalLoss):
            raise TypeError(f"loss must be a SphericalLoss such as SquaredError(), got {loss!r}")
        self.has_bias = bias
        self.anchor = nn.Parameter(torch.zeros((), device=device, dtype=dtype))
        self._ledger = Ledger()
        self._stabilizer = Stabilizer()
        bound = 1 / math.sqrt(self.in_features)  # as nn.Linear, weight and bias alike
        shape = (self.num_classes, self.in_features + bias)
        self.state = FactoredState(torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound))

    def forward(
        self,
        hidden: Tensor,  # (..., d)
        targets: Tensor,  # (...), (..., K), or sparse (N, V)
        target_weights: Tensor | None = None,  # the shape of targets
    ) -> Tensor:  # (), or (...) for "none"
        """The training loss.

        Targets are one class a row; K classes a row, each counting `target_weights` (1 without), padded with
        `ignore_index`; or a sparse `(N, V)` matrix of values. Duplicates add. A row of nothing but
        `ignore_index` is ignored, an empty row of a matrix is a target of zeros.
        """
        rows, shape = self._rows(hidden), hidden.shape[:-1]
        ids, weights, kept = sparse_targets(targets, target_weights, shape, self.num_classes, self.ignore_index)
        row_loss = at_kept(self._target_losses, kept, rows, ids, weights)
        loss = reduce_loss(row_loss, kept, self.reduction).to(self.state.factor.dtype)
        return loss.reshape(shape) if self.reduction == "none" else loss

    def scores(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V)
        """The outputs themselves, `hidden @ weight.T + bias`: O(V d) an example."""
        rows = self._rows(hidden)
        with no_autocast(self.anchor.device.type):
            return self.state.outputs(self._featured(rows)).reshape(*hidden.shape[:-1], self.num_classes)

    def topk(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Tensor,  # (..., d)
        k: int,
        *,
        exclude: Tensor | None = None,  # (..., E)
        allowed: Tensor | None = None,  # (V,) bool, or (A,) class ids
    ) -> TopK | ScoreTopK:
        """The `k` most probable classes, or for a loss without probabilities those of the highest scores."""
        best = super().topk(hidden, k, exclude=exclude, allowed=allowed)
        return best if isinstance(self.loss, NormalizedLoss) else ScoreTopK(*best)

    @property
    def weight(self) -> Tensor:  # (V, d)
        """The weight, recomputed at O(V d^2): a copy, to change it use `set_weight`."""
        return self.state.weight()[:, : self.in_features].to(self.anchor.dtype)

    @property
    def bias(self) -> Tensor | None:  # (V,)
        """The bias, a copy as `weight` is; None without one."""
        return self.state.weight()[:, self.in_features].to(self.anchor.dtype) if self.has_bias else None

    @torch.no_grad()
    def set_weight(
        self,
        weight: Tensor,  # (V, d)
        bias: Tensor | None = None,  # (V,)
    ) -> None:
        """Replaces weight and bias (None: leaves the bias), and forgets recorded steps.

        No bias of -inf bars a class here; queries bar classes by `topk(hidden, k, exclude=..., allowed=...)`.

        Raises:
            TypeError, ValueError: something else than finite tensors of these shapes whose squares can be summed
                in the dtype of the state; the layer is unchanged then.
        """
        expected = (self.num_classes, self.in_features)
        for name, given in (("weight", weight), ("bias", bias)):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        if weight.shape != expected:
            raise ValueError(f"weight must have shape (V, d) = {expected}, got {tuple(weight.shape)}")
        if bias is not None and (not self.has_bias or bias.shape != expected[:1]):
            raise ValueError(f"bias must have shape {expected[:1]}, with bias=True; got {tuple(bias.shape)}")
        columns = self.state.own_rows(weight).to(self.anchor)
        if self.has_bias:
            last = self.state.weight()[:, self.in_features] if bias is None else self.state.own_rows(bias)
            columns = torch.cat([columns, last.to(self.anchor)[:, None]], 1)
        self._replace(self.state.like(columns.clone()))

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight, bias, None)`, copies; of the losses that rank classes by their score."""
        if isinstance(self.loss, NormalizedLoss):
            raise TypeError(
                f"{type(self.loss).__name__} does not rank classes by their output, so it has no linear_head()"
            )
        return self.weight, self.bias, None

    def head_version(self) -> tuple[int, torch.device, torch.dtype]:
        """What `linear_head()` returns differs only where this does: a screen of the layer is stale then."""
        return self._ledger.version, self.anchor.device, self.anchor.dtype

    def gram(self) -> Tensor:  # (d, d)
        """`W^T W` without the bias, kept by the layer: which a preview otherwise computes at O(V d^2)."""
        return self.state.gram[: self.in_features, : self.in_features].clone()

    def own_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """`FactoredSGD`, which makes the steps from then on."""
        return FactoredSGD(self, lr)

    def consistency(self) -> Consistency:
        """How far the parts of the state have drifted apart, measured from the weight itself: O(V d^2)."""
        return self.state.consistency()

    def stabilize(self) -> int:
        """All repairs at once, which otherwise happen when needed; how many directions were rescaled.

        Raises:
            RuntimeError: between backward and `step()`, whose record is of the state as it was.
        """
        self._ledger.apply_scaling(self.anchor)
        if self._ledger.gradients:
            raise RuntimeError("stabilize() between backward and step(): call step() or zero_grad() before it")
        self._ledger.version += 1
        return self._stabilizer.stabilize(self.state)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, loss={self.loss}, bias={self.has_bias}"

    # The hooks.

    def _log_prob(self, hidden: Tensor) -> Tensor:
        return self._normalized().log_prob(self.scores(hidden))

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        self._normalized()
        ids = targets[:, None]
        row_loss = self._read_losses(hidden, ids, torch.ones_like(ids, dtype=torch.float64))
        return -row_loss.to(self.state.factor.dtype)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        normalized = isinstance(self.loss, NormalizedLoss)
        return self._dense_topk(self._log_prob if normalized else self.scores, hidden, k, selection)

    def _normalized(self) -> NormalizedLoss:
        if not isinstance(self.loss, NormalizedLoss):
            raise TypeError(
                f"{type(self.loss).__name__} has no probabilities: use scores(hidden) or topk(hidden, k), or a "
                "normalised loss such as SphericalSoftmax()"
            )
        return self.loss

    def _target_losses(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:  # (N,), float64
        if not (self.training and torch.is_grad_enabled() and self.anchor.requires_grad):
            return self._read_losses(hidden, ids, weights)
        own = Pass(self.state, self._ledger, self.anchor)
        return recorded_losses(own, self.loss, self._featured(hidden), ids, weights)

    def _read_losses(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with no_autocast(self.anchor.device.type):
            _, scores, squared_norm, total = self.state.read(self._featured(hidden), ids)
        return self.loss.row_loss(scores, weights, squared_norm, total, self.num_classes)

    def _featured(self, rows: Tensor) -> Tensor:  # (N, d), or (N, d + 1) with the constant feature of the bias
        rows = rows.to(self.state.factor.dtype)
        if not self.has_bias:
            return rows
        return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], 1)  # len() would fix the batch of an export

    # Copies, moves and state dicts.

    def _replace(self, state: FactoredState) -> None:
        """Another weight; what was recorded of this one is forgotten.

        Raises:
            ValueError: the squares of the weight have no sum in the dtype of the state; nothing has changed then.
        """
        if not state.factor.is_meta and not in_range(state.gram):
            raise ValueError(
                f"weight and bias must be finite in {self.anchor.dtype}, and the sum of a column's squares in the "
                f"range of {state.factor.dtype}; a bias of -inf cannot bar a class of this layer, as the norm of "
                "all outputs would be infinite: use topk(..., exclude=, allowed=)"
            )
        self.state = state
        self._stabilizer = Stabilizer(automatic=self._stabilizer.automatic)
        self._ledger.forget(self.anchor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ledger": Ledger()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FactoredOutput":
        """Moves bit for bit; a new dtype builds the state from the cast weight."""
        before = self.anchor.dtype
        super()._apply(fn, recurse)
        with torch.no_grad():
            if self.anchor.dtype != before:
                self._replace(self.state.like(self.state.weight().to(self.anchor)))
            elif self.state.factor.is_meta and not self.anchor.is_meta:  # by `to_empty`: zeros until one is loaded
                self._replace(self.state.like(torch.zeros_like(self.state.factor, device=self.anchor.device)))
            else:
                self.state.to(self.anchor.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """An ordinary `weight`, and `bias`, as `nn.Linear` has."""
        destination[prefix + "weight"] = self.weight
        if self.has_bias:
            destination[prefix + "bias"] = self.bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        _, _, missing, unexpected, errors = args
        weight, bias = (state_dict.get(prefix + name) for name in ("weight", "bias"))
        missing += [prefix + "weight"] * (weight is None) + [prefix + "bias"] * (self.has_bias and bias is None)
        unexpected += [prefix + "bias"] * (bias is not None and not self.has_bias)
        if weight is not None:
            try:
                self.set_weight(weight, bias if self.has_bias else None)
            except ValueError as error:
                errors.append(f"{prefix}: {error}")

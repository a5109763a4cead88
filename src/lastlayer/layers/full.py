"""The exact softmax over all classes, in chunks that never hold all the logits."""

import torch
from torch import Tensor, nn

from lastlayer.functional.checks import check_fraction, check_not_negative
from lastlayer.functional.linear_chunks import mapped_logits
from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.normalizers import Normalizer
from lastlayer.functional.selection import Selection
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.parts import map_beside
from lastlayer.layers.softmax_head import SoftmaxHead


class FullSoftmax(SoftmaxHead):
    """`F.cross_entropy(nn.Linear(in_features, num_classes)(hidden), targets)` without the `(N, V)` logits.

    The model is `P(c | h) = softmax(f(weight @ h + bias))_c` with f the `logit_map`, or nothing. The loss equals
    `functional.linear_cross_entropy`, whose options the constructor takes.

    Cost of a training step: `6 N V d` operations (three matrix products); memory beyond the parameters and their
    gradients: one chunk of logits, about 130 MB, or 270 MB where V is large (twice that with a logit map). A query
    reads all of `weight`.

    With a `normalizer` (`Sparsemax()`, `Entmax(alpha)`, `TopKSoftmax(k)`) the probabilities are its own, and so is
    the loss. Those of classes far from the best are exactly 0: their `log_prob` and `target_log_prob` are -inf,
    without a gradient; `topk` returns none of them (index -1 where fewer than k are left), `sample` never draws
    one; a held-out perplexity is infinite as soon as one target has probability 0. A training step holds several
    `(N, V)` tensors: for some ten thousand classes, not for hundreds of thousands. There is no `linear_head()`, as
    a screen's probabilities are a softmax's.

    Not for hundreds of thousands of classes where an approximation or a hierarchy is accurate enough: this
    layer is the baseline for those.

    Args:
        in_features: d, the width of `hidden`.
        num_classes: V.
        bias: whether there is a bias for each class.
        logit_map: an increasing function of one logit; `topk` is taken on the raw logits, where a map that
            saturates cannot tie them.
        label_smoothing: as in `F.cross_entropy`; of the loss only.
        z_loss: adds `z_loss * lse ** 2`, which keeps the normaliser near 1; of the loss only.
        class_weights: `(V,)`, as `weight` in `F.cross_entropy`; of the loss only. A buffer in the state dict,
            which keeps its own precision (float32 at least) when the layer is cast.
        weight: an `nn.Parameter (V, d)` to use instead of a new one, such as that of an `nn.Embedding`: tied.
        normalizer: what makes probabilities of the (mapped) logits; None is the softmax. With one, targets are one
            class a row, and there is no `label_smoothing`, `z_loss` or `class_weights`.
        reduction, ignore_index, device, dtype: as in every `OutputLayer`.

    A state dict of `nn.Linear` loads as it is, and leaves `class_weights` as they are. Weights are initialised as
    `nn.Linear` does.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.

    >>> import torch, lastlayer
    >>> embedding = torch.nn.Embedding(1000, 16)
    >>> layer = lastlayer.FullSoftmax(16, 1000, bias=False, weight=embedding.weight)
    >>> hidden, targets = torch.randn(2, 5, 16), torch.randint(1000, (2, 5))
    >>> layer(hidden, targets).backward()
    >>> embedding.weight.grad.shape
    torch.Size([1000, 16])
    >>> layer.topk(hidden, 3).indices.shape
    torch.Size([2, 5, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        logit_map: LogitMap | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        class_weights: Tensor | None = None,
        weight: nn.Parameter | None = None,
        normalizer: Normalizer | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            bias=bias,
            class_weights=class_weights,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            device=device,
            dtype=dtype,
        )
        self.logit_map = map_beside(logit_map, self.weight)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.z_loss = check_not_negative("z_loss", z_loss)
        self.normalizer = normalizer
        if normalizer is not None:
            self._check_normalizer(normalizer)

    def forward(
        self,
        hidden: Tensor,  # (..., d)
        targets: Tensor,  # (...), or soft: (..., K), sparse (N, V), or floating (..., V)
        target_weights: Tensor | None = None,  # (..., K)
    ) -> Tensor:  # (), or (...) for "none"
        """The training loss of one class a row, or of soft targets: `functional.linear_cross_entropy`."""
        if self.normalizer is not None:
            if target_weights is not None:
                raise ValueError("target_weights must be None with a normalizer, whose loss is of one class a row")
            return super().forward(hidden, targets)
        self._rows(hidden)  # checked
        return self._cross_entropy(hidden, targets, target_weights)

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, target_weights: Tensor | None) -> Tensor:
        return linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            target_weights=target_weights,
            bias=self.bias,
            logit_map=self.logit_map,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            class_weights=self.class_weights,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight, bias, logit_map)`: the parameters themselves."""
        if self.normalizer is not None:
            raise TypeError(
                f"FullSoftmax with normalizer={self.normalizer} is no softmax: it has no linear_head()"
            )
        return super().linear_head()

    def _check_normalizer(self, normalizer: Normalizer) -> None:
        if not isinstance(normalizer, Normalizer):
            raise TypeError(f"normalizer must be a Normalizer such as Entmax(1.5), or None; got {normalizer!r}")
        normalizer.check(self.num_classes)
        for name in ("label_smoothing", "z_loss", "class_weights"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, float | int) and value == 0):
                raise ValueError(f"{name} must not be set with a normalizer: it is a term of the softmax's loss")

    def _logits(self, hidden: Tensor) -> Tensor:  # (N, V), float32 at least
        """What the normalizer takes."""
        return mapped_logits(hidden, self.weight, self.bias, self.logit_map)

    # The hooks: as in every softmax, or by the normalizer.

    def _row_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.normalizer is None:
            return super()._row_loss(hidden, targets)
        return self.normalizer.loss(self._logits(hidden), targets)

    def _log_prob(self, hidden: Tensor) -> Tensor:
        if self.normalizer is None:
            return super()._log_prob(hidden)
        return self.normalizer.log_prob(self._logits(hidden))

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self.normalizer is None:
            return super()._target_log_prob(hidden, targets)
        return self._score(hidden, targets[:, None])[:, 0]

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        if self.normalizer is None:
            return super()._score(hidden, ids)
        return OutputLayer._score(self, hidden, ids)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        if self.normalizer is None:
            return super()._topk(hidden, k, selection)
        return self._dense_topk(self._log_prob, hidden, k, selection)

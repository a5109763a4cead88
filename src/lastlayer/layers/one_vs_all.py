"""One sigmoid for each class: the output layer of multi-label classifiers."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.linear_chunks import mapped_logits
from lastlayer.functional.one_vs_all import RowTargets, one_vs_all_loss
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.reduce import at_kept, reduce_loss, row_shares
from lastlayer.functional.results import ScoreTopK
from lastlayer.functional.sampled_logits import sampled_logits
from lastlayer.functional.sampled_losses import accidental_hits
from lastlayer.functional.sparse_targets import sparse_targets
from lastlayer.layers.sampled.drawing import DrawingLayer
from lastlayer.layers.samplers.base import Sampler


class OneVsAll(DrawingLayer):
    r"""`F.binary_cross_entropy_with_logits(linear(hidden), y, pos_weight=...)` without the `(N, V)` logits.

    With dense targets y `(N, V)`, which are never made, the loss of a row is

        F.binary_cross_entropy_with_logits(logits, y, pos_weight=positive_weight, reduction="none").sum(-1)

    and "mean" is over the rows: the mean over rows and classes times V. All classes are taken in blocks, and for
    "mean" and "sum" the gradients are formed in the forward pass. Cost of a step: `6 N V d` operations; memory
    beyond parameters and gradients: one block of logits, some MB.

    With a `sampler` the negatives are sampled: each counts `1 / c` of its expected count c, so that their sum is
    that over all negatives on average, and a step costs `6 N (K + S) d`, whatever V is, with `sparse=True`.

    There are no probabilities that sum to one: `log_prob` raises, `scores` gives the logits, `topk` a `ScoreTopK`;
    `linear_head` is what a `ScreenedSoftmax` screens.

    When *not* to use it: where each row has exactly one class, a softmax learns faster.

    Args:
        in_features: d.
        num_classes: V.
        bias: whether there is a bias for each class; it starts at `-log V`, as nearly all labels are negative.
        positive_weight: of the positive terms, a number or `(V,)`; weights the frequent against the rare.
        sampler: of the negatives; None: all classes.
        num_samples: negatives of a set; with a sampler.
        sparse: row-sparse gradients for `weight` and `bias`; with a sampler.
        weight: an `nn.Parameter (V, d)` to use instead of a new one: tied.
        reduction, ignore_index, device, dtype: as everywhere.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; `num_samples` or `sparse` without a
            sampler, or a sampler without `num_samples`.

    Example:
        >>> layer = OneVsAll(16, 1000)
        >>> hidden = torch.randn(2, 16)
        >>> targets = torch.tensor([[3, 17, -100], [5, -100, -100]])  # padded with ignore_index
        >>> layer(hidden, targets).backward()
        >>> layer.topk(hidden, 5).indices.shape
        torch.Size([2, 5])
    """

    positive_weights: Tensor | None  # (V,)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        positive_weight: float | Tensor = 1.0,
        sampler: Sampler | None = None,
        num_samples: int | None = None,
        sparse: bool = False,
        weight: nn.Parameter | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            bias=bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            device=device,
            dtype=dtype,
        )
        if (sampler is None) != (num_samples is None):
            raise ValueError(f"sampler and num_samples go together, got {sampler!r} and {num_samples!r}")
        if sparse and sampler is None:
            raise ValueError(
                "sparse=True needs a sampler: with all classes as negatives no row has a gradient of 0"
            )
        self._start_bias(-math.log(self.num_classes))
        self._check_positive_weight(positive_weight)
        several = isinstance(positive_weight, Tensor)
        self.positive_weight = 1.0 if several else float(positive_weight)
        own = self._class_values("positive_weight", positive_weight) if several else None
        self.register_buffer("positive_weights", own, persistent=False)
        self.sampler, self.num_samples = None, None
        if sampler is not None and num_samples is not None:
            self._set_sampler(sampler, num_samples, sparse)

    def forward(
        self,
        hidden: Tensor,  # (..., d)
        targets: Tensor,  # (...), (..., K), or sparse (N, V)
        target_weights: Tensor | None = None,  # the shape of targets: y, from 0 to 1
    ) -> Tensor:  # (), or (...) for "none"
        """The training loss.

        Targets are the classes of a row, padded with `ignore_index`; or a sparse `(N, V)` matrix of y. A row of
        nothing but `ignore_index` is ignored; a row without any class is an empty row of a matrix.

        Raises:
            TypeError, ValueError, IndexError: targets of the wrong kind, shape or range, or y that are not from 0
                to 1 (of a class that is given twice the sum).
        """
        rows, shape = self._rows(hidden), hidden.shape[:-1]
        found = sparse_targets(targets, target_weights, shape, self.num_classes, self.ignore_index)
        if target_weights is None and targets.layout == torch.strided:
            found = found._replace(weights=found.weights.clamp(max=1))  # a class that is named twice is a target
        elif eager_on_cpu(found.weights) and bool(((found.weights < 0) | ~(found.weights <= 1)).any()):
            wrong = found.weights[(found.weights < 0) | ~(found.weights <= 1)][0].item()
            name = "targets" if target_weights is None else "target_weights"
            raise ValueError(f"{name} must be from 0 to 1 for each class of a row, got {wrong}")
        loss = self._loss_in_graphs(rows, *found)
        return loss.reshape(shape) if self.reduction == "none" else loss

    def scores(
        self,
        hidden: Tensor,  # (..., d)
    ) -> Tensor:  # (..., V), float32 at least
        """The logits of all classes; their sigmoids are the probabilities, each for itself."""
        rows = self._rows(hidden)
        return self._scores(rows).reshape(*hidden.shape[:-1], self.num_classes)

    def topk(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Tensor,  # (..., d)
        k: int,
        *,
        exclude: Tensor | None = None,  # (..., E)
        allowed: Tensor | None = None,  # (V,) bool, or (A,) class ids
    ) -> ScoreTopK:
        """The `k` classes of the highest logits, best first; see `OutputLayer.topk`."""
        return ScoreTopK(*super().topk(hidden, k, exclude=exclude, allowed=allowed))

    def score(
        self,
        hidden: Tensor,  # (..., d)
        ids: Tensor,  # (..., C), class ids, padded with ignore_index
    ) -> Tensor:  # (..., C), 0 where padded
        """The logits of given candidates, without the rest: `scores(hidden).gather(-1, ids)`; differentiable."""
        return super().score(hidden, ids)

    # The hooks.

    def _log_prob(self, hidden: Tensor) -> Tensor:
        raise TypeError(
            "OneVsAll has no probabilities that sum to one: use scores(hidden), whose sigmoids are each class's "
            "own, or topk(hidden, k)"
        )

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return sampled_logits(hidden, self.weight, self.bias, ids, ids.new_empty(0), sparse=self.sparse)[0]

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self._log_prob(hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        return mapped_logits(hidden, self.weight, self.bias, None)

    def _topk(self, hidden: Tensor, k: int, selection: Any) -> tuple[Tensor, Tensor]:
        return self._dense_topk(self._scores, hidden, k, selection)

    def _loss_of_batch(self, rows: Tensor, ids: Tensor, values: Tensor, kept: Tensor | None) -> Tensor:
        values = values.to(exact_dtype(rows.dtype))
        if self.sampler is not None or self.reduction == "none":
            row_losses = self._all_losses if self.sampler is None else self._sampled_losses
            return reduce_loss(at_kept(row_losses, kept, rows, ids, values), kept, self.reduction)
        if kept is not None and eager_on_cpu(kept):  # ignored rows cost nothing
            at = kept.nonzero().squeeze(1)
            rows, ids, values, kept = rows.index_select(0, at), ids[at], values[at], None
        kept = torch.ones_like(ids[:, 0], dtype=torch.bool) if kept is None else kept
        shares, lacking = row_shares(kept, self.reduction, values.dtype)
        return self._all_losses(rows, ids, values, shares) + lacking

    def _all_losses(
        self, rows: Tensor, ids: Tensor, values: Tensor, row_weights: Tensor | None = None
    ) -> Tensor:  # (N,), or () with weights
        """The losses over all classes, or their sum, each times its weight."""
        targets = RowTargets(ids, values, self._positive_weights_at(ids, values))
        return one_vs_all_loss(rows, self.weight, self.bias, targets, row_weights)

    def _sampled_losses(self, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:  # (N,)
        """The positive terms, and each negative divided by how often it is expected."""
        candidates, log_counts = self._draw(rows, ids, values)
        of_targets, of_candidates = sampled_logits(
            rows, self.weight, self.bias, ids, candidates, sparse=self.sparse
        )
        negatives = -F.logsigmoid(-of_candidates) * (-log_counts).exp().to(values.dtype)
        negatives = negatives.masked_fill(accidental_hits(ids, values, candidates), 0).sum(1)
        own = self._positive_weights_at(ids, values) * values * F.logsigmoid(of_targets) + (
            1 - values
        ) * F.logsigmoid(-of_targets)
        return negatives - own.masked_fill(values == 0, 0).sum(1)

    def _positive_weights_at(self, ids: Tensor, values: Tensor) -> Tensor:  # (N, K), in the dtype of values
        if self.positive_weights is None or not len(self.positive_weights):  # a rank may have no classes
            return torch.full_like(values, self.positive_weight)
        return self.positive_weights[ids].to(values.dtype)

    def _check_positive_weight(self, positive_weight: float | Tensor) -> None:
        values = torch.as_tensor(positive_weight, device="cpu")
        if not bool(((values >= 0) & values.isfinite()).all()):
            raise ValueError(f"positive_weight must be finite and at least 0, got {positive_weight!r}")

"""One sigmoid for each class: the output layer of multi-label classifiers."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional.checks import check_vector, eager_on_cpu
from lastlayer.functional.linear_twin import mapped_logits
from lastlayer.functional.one_vs_all import RowTargets, one_vs_all_loss
from lastlayer.functional.outside_graphs import outside_graphs
from lastlayer.functional.precision import as_exact, exact_dtype
from lastlayer.functional.reduce import at_kept, reduce_loss
from lastlayer.functional.results import ScoreTopK
from lastlayer.functional.sampled_logits import sampled_logits
from lastlayer.functional.sampled_losses import accidental_hits
from lastlayer.functional.sparse_targets import sparse_targets
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.parts import beside, draw, matrix_shapes, tied_or_new
from lastlayer.layers.sampled.drawing import Drawing, check_sampler
from lastlayer.layers.samplers.base import Sampler


class OneVsAll(OutputLayer):
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

    weight: nn.Parameter
    bias: nn.Parameter | None
    positive_weights: Tensor | None  # (V,)
    sampler: Sampler | None

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
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        if (sampler is None) != (num_samples is None):
            raise ValueError(f"sampler and num_samples go together, got {sampler!r} and {num_samples!r}")
        if sparse and sampler is None:
            raise ValueError(
                "sparse=True needs a sampler: with all classes as negatives no row has a gradient of 0"
            )
        self.weight = tied_or_new(weight, (self.num_classes, self.in_features), device, dtype)
        self.bias = nn.Parameter(self.weight.new_empty(self.num_classes)) if bias else None
        self._reset_bias()
        self.positive_weight = positive_weight if isinstance(positive_weight, (int, float)) else 1.0
        self.register_buffer("positive_weights", self._check_positive_weight(positive_weight), persistent=False)
        if sampler is not None:
            assert num_samples is not None
            check_sampler(sampler, self.num_classes, num_samples)
            sampler = sampler if self.weight.is_meta else sampler.to(self.weight.device)
        self.sampler, self.num_samples, self.sparse = sampler, num_samples, sparse
        self._drawing = Drawing()

    def reset_parameters(self) -> None:
        """Draws the weight (a tied one too) anew, as `nn.Linear`; biases give each class the probability 1 / V."""
        draw(self.weight, self.in_features)
        self._reset_bias()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            nn.init.constant_(self.bias, -math.log(self.num_classes))

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
        run = self._multi_label_loss if self._compiles() else self._loss_outside_graphs
        loss = run(rows, *found)
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

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight, bias, None)`: the parameters themselves."""
        return self.weight, self.bias, None

    # The hooks.

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        return matrix_shapes(self)

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

    def _compiles(self) -> bool:
        """Whether a compiled graph can hold the loss: Inductor has no sparse gradients."""
        return self.sampler is None or (self.sampler.compiles and not self.sparse)

    def _multi_label_loss(self, rows: Tensor, ids: Tensor, values: Tensor, kept: Tensor | None) -> Tensor:
        values = values.to(exact_dtype(rows.dtype))
        if self.sampler is not None or self.reduction == "none":
            return reduce_loss(at_kept(self._row_losses, kept, rows, ids, values), kept, self.reduction)
        if kept is not None and eager_on_cpu(kept):  # ignored rows cost nothing
            at = kept.nonzero().squeeze(1)
            rows, ids, values, kept = rows.index_select(0, at), ids[at], values[at], None
        counted = values.new_ones(len(rows)) if kept is None else kept.to(values.dtype)
        whole = counted.sum() if self.reduction == "mean" else counted.new_ones(())
        total = self._weighted_loss(rows, ids, values, (counted / whole).nan_to_num(0.0))
        return total + (whole / whole - 1)  # nan where a mean is over nothing

    _loss_outside_graphs = outside_graphs(_multi_label_loss)

    def _weighted_loss(self, rows: Tensor, ids: Tensor, values: Tensor, row_weights: Tensor) -> Tensor:  # ()
        """The sum of the losses of rows, each times its weight."""
        targets = RowTargets(ids, values, self._positive_weights_at(ids, values))
        return one_vs_all_loss(rows, self.weight, self.bias, targets, row_weights)

    def _row_losses(self, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:  # (N,)
        """With a sampler the positive terms, and each negative divided by how often it is expected."""
        if self.sampler is None or self.num_samples is None:
            targets = RowTargets(ids, values, self._positive_weights_at(ids, values))
            return one_vs_all_loss(rows, self.weight, self.bias, targets)
        candidates, log_counts = self._drawing.draw(
            self.sampler, self.num_samples, rows, ids, values, self.weight, self.bias, self.training
        )
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

    def _check_positive_weight(self, positive_weight: float | Tensor) -> Tensor | None:
        """The weights of the classes, or None where all have one."""
        if isinstance(positive_weight, Tensor):
            check_vector("positive_weight", positive_weight, self.num_classes)
            valid = bool(((positive_weight >= 0) & positive_weight.isfinite()).all())
        else:
            valid = 0 <= positive_weight < float("inf")
        if not valid:
            raise ValueError(f"positive_weight must be finite and at least 0, got {positive_weight!r}")
        if not isinstance(positive_weight, Tensor):
            return None
        return beside(as_exact(positive_weight.detach()), self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OneVsAll":
        """A cast of the layer is none of the positive weights, and a move through "meta" does not lose them."""
        kept = self.positive_weights
        super()._apply(fn, recurse)
        self.positive_weights = beside(kept, self.weight)
        return self

    def _derive(self) -> None:
        self._drawing.forget()

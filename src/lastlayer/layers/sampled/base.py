"""What sampled layers share: which classes a batch is trained on, and which corrections they need."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.reduce import at_kept, reduce_loss
from lastlayer.functional.sampled_logits import sampled_logits
from lastlayer.functional.sampled_losses import accidental_hits
from lastlayer.functional.soft_targets import check_target_weights
from lastlayer.functional.sparse_targets import sparse_targets
from lastlayer.layers.sampled.drawing import DrawingLayer
from lastlayer.layers.samplers.base import Sampler
from lastlayer.layers.softmax_head import SoftmaxHead


class Batch(NamedTuple):
    """The rows of a batch that are not ignored, and what was sampled for them."""

    hidden: Tensor  # (N, d)
    targets: Tensor  # (N, K)
    target_weights: Tensor  # (N, K), without class weights; 0 where there is no target
    candidate_log_counts: Tensor  # (S,) or (N, S)
    target_logits: Tensor  # (N, K)
    candidate_logits: Tensor  # (N, S), -inf where a candidate is set aside
    loss_weights: Tensor  # (N, K), with class weights
    noise_weights: Tensor | float  # (N,), the mean class weight of each row's targets
    examples: Tensor | None = None  # (N,), which training example each row is, where a layer wants to know


class SampledLayer(DrawingLayer, SoftmaxHead):
    """A linear layer that is evaluated as a full softmax, and trained on its targets and sampled candidates.

    A training step reads the rows of `weight` of these classes only, and with `sparse=True` its gradients hold no
    others, so that forward, backward and the step of `SGD` or `Adagrad` cost the same for any V. In training the
    sampler receives each batch's targets and the weight.

    Calling the layer gives the sampled loss, in `eval()` too: perplexities come from `target_log_prob`.

    Args:
        in_features: d.
        num_classes: V.
        sampler: a `Sampler` of as many classes.
        num_samples: candidates of a set.
        remove_hits: whether candidates that are a target of their row are set aside for it.
        sparse: row-sparse gradients for `weight` and `bias` (coalesced); `sparse_parameters()` splits the groups.
        bias: whether there is a bias for each class.
        class_weights: `(V,)`, as `weight` in `F.cross_entropy`; of the loss only.
        weight: an `nn.Parameter (V, d)` to use instead of a new one: tied.
        reduction, ignore_index, device, dtype: as everywhere.

    Raises:
        TypeError: a sampler that is not a `Sampler`.
        ValueError: a sampler of another number of classes, or an argument out of range.
    """

    target_once = False  # whether a target counts once, however often it would be drawn

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sampler: Sampler,
        num_samples: int,
        *,
        remove_hits: bool,
        sparse: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        self._set_sampler(sampler, num_samples, sparse)
        self.remove_hits = remove_hits or sampler.samples_targets

    def forward(
        self,
        hidden: Tensor,  # (..., d)
        targets: Tensor,  # (...), (..., K), or sparse (N, V)
        target_weights: Tensor | None = None,  # the shape of targets
    ) -> Tensor:  # (), or (...) for "none"
        """The training loss, from a fresh sample.

        Targets are one class a row; K classes a row, each counting `target_weights` (1 without), padded with
        `ignore_index`; or a sparse `(N, V)` matrix of values. Duplicates add. "mean" is over the rows that are not
        ignored, and with class weights and one class a row over their weights, as in `F.cross_entropy`.
        """
        rows, shape = self._rows(hidden), hidden.shape[:-1]
        ids, weights, kept = sparse_targets(targets, target_weights, shape, self.num_classes, self.ignore_index)
        check_target_weights("targets" if target_weights is None else "target_weights", weights)
        by_class_weight = self.class_weights is not None and target_weights is None and targets.shape == shape
        loss = self._loss_in_graphs(rows, ids, weights, kept, by_class_weight)
        return loss.reshape(shape) if self.reduction == "none" else loss

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_samples={self.num_samples}, sparse={self.sparse}"

    # The hook.

    @abstractmethod
    def _batch_loss(self, batch: Batch) -> Tensor:
        """The loss of every row, `(N,)`, from the uncorrected logits."""

    def _target_log_counts(self, batch: Batch) -> Tensor:  # (N, K), in the dtype of the logits
        """How often each target is expected in a set, or an error where that is never: no correction is finite."""
        count = self.sampler.log_inclusion if self.target_once else self.sampler.log_expected_counts
        log_counts = count(batch.targets, self.num_samples, batch.hidden)
        never = (log_counts == -torch.inf) & (batch.target_weights != 0)
        if eager_on_cpu(never) and bool(never.any()):
            wrong = int(batch.targets[never][0])
            raise ValueError(
                "targets must be classes that the sampler can draw, as their logits are corrected by how often; "
                f"class {wrong} is never drawn: give it a positive count (counts.clamp(min=1))"
            )
        return log_counts.to(batch.target_logits.dtype)

    # Written once for every sampled loss.

    def _loss_of_batch(
        self,
        rows: Tensor,
        ids: Tensor,
        weights: Tensor,
        kept: Tensor | None,
        by_class_weight: bool,
        examples: Tensor | None = None,
    ) -> Tensor:
        row_loss = at_kept(self._sampled_row_loss, kept, rows, ids, weights, examples)
        if by_class_weight and self.reduction == "mean":
            of_rows = self._class_weights_of(ids[:, 0]).to(row_loss.dtype)
            return row_loss.sum() / (of_rows if kept is None else of_rows * kept).sum()
        return reduce_loss(row_loss, kept, self.reduction)

    def _class_weights_of(self, ids: Tensor) -> Tensor:
        assert self.class_weights is not None
        return self.class_weights[ids]

    def _sampled_row_loss(
        self, rows: Tensor, ids: Tensor, weights: Tensor, examples: Tensor | None
    ) -> Tensor:  # (N,)
        """The loss of every row, from a fresh sample."""
        candidates, log_counts = self._draw(rows, ids, weights)
        of_targets, of_candidates = sampled_logits(
            rows, self.weight, self.bias, ids, candidates, sparse=self.sparse
        )
        weights = weights.to(of_targets.dtype)
        if self.remove_hits:
            of_candidates = of_candidates.masked_fill(accidental_hits(ids, weights, candidates), -torch.inf)
        loss_weights, noise_weights = weights, 1.0
        if self.class_weights is not None:
            loss_weights = weights * self.class_weights[ids].to(weights.dtype)
            whole = weights.sum(1)
            noise_weights = torch.where(whole == 0, 1.0, loss_weights.sum(1) / whole)
        batch = Batch(
            rows, ids, weights, log_counts.to(of_targets.dtype), of_targets, of_candidates,
            loss_weights, noise_weights, examples,
        )  # fmt: skip
        return self._batch_loss(batch)

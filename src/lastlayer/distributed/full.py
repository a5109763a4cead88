"""`FullSoftmax` with its classes divided among ranks."""

import torch
from torch import Tensor

from lastlayer.distributed.collectives import copied
from lastlayer.distributed.layer import ShardedLayer
from lastlayer.distributed.linear import (
    DividedHead,
    divided_cross_entropy,
    divided_log_prob,
    divided_sample,
    divided_score,
    divided_topk,
)
from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.selection import Selection
from lastlayer.functional.soft_targets import TargetRows, target_rows
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.softmax_head import SoftmaxHead


class ShardedSoftmaxHead(ShardedLayer, SoftmaxHead):
    """A sharded layer that is, once trained, a softmax over the logits of one matrix."""

    DIVIDED = ("weight", "bias", "class_weights")
    PARTIAL = ("logit_map.",)

    def _head(self) -> DividedHead:
        return DividedHead(self.weight, self.bias, self.logit_map, self.num_classes, self.ranks)

    def _log_prob(self, hidden: Tensor) -> Tensor:
        return divided_log_prob(self._head(), copied(hidden, self.ranks))

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return self._score(hidden, targets[:, None])[:, 0]

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return divided_score(self._head(), copied(hidden, self.ranks), ids)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        return self._differentiable(hidden, *divided_topk(self._head(), hidden, k, selection))

    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        return torch.cat([divided_sample(self._head(), rows, num_samples) for rows in self._row_chunks(hidden)])


class ShardedFullSoftmax(ShardedSoftmaxHead, FullSoftmax):
    """`FullSoftmax` over all ranks: the same loss, with the label smoothing of all classes.

    Of N rows a training step sends, by the counts of results: forward 3 N numbers (peak, mass and the targets'
    terms; 5 N with class weights) and backward N d, the gradient of the hidden states; all by all-reduce. Cost
    of a rank: `8 N V d / ranks` operations, as the backward pass forms the logits again; memory beyond its part
    of parameters and gradients: one chunk of logits.
    """

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, target_weights: Tensor | None) -> Tensor:
        rows, shape = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[:-1]
        target = target_rows(targets, target_weights, shape, self.num_classes, self.ignore_index)
        at = None
        if target.kept is not None and eager_on_cpu(rows) and not bool(target.kept.all()):  # they cost nothing
            at = target.kept.nonzero().squeeze(1)
            weights = None if target.weights is None else target.weights[at]
            rows, target = rows.index_select(0, at), TargetRows(target.ids[at], weights, None)
        names = ("label_smoothing", "z_loss", "class_weights", "reduction")
        options = {name: getattr(self, name) for name in names}
        loss = divided_cross_entropy(self._head(), copied(rows, self.ranks), target, **options)
        if self.reduction != "none":
            return loss
        if at is not None:
            loss = loss.new_zeros(shape.numel()).index_copy(0, at, loss)
        return loss.reshape(shape)

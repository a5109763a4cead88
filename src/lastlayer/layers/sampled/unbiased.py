"""Layers whose expected gradient is a bound's at any number of samples, by a number kept for each example."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_ids, check_positive
from lastlayer.functional.normalizer_bound import SLACK, least_normalizers, normalizer_bound
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.sparse_targets import sparse_targets
from lastlayer.layers.sampled.base import Batch, SampledLayer
from lastlayer.layers.samplers.base import Sampler


class UnbiasedLayer(SampledLayer):
    """The bound of `functional/normalizer_bound.py`, and its u, an estimate of `-log p_y` kept for each example.

    Args:
        in_features: d.
        num_classes: V.
        sampler: of the candidates, best with replacement, where their expected counts are exact.
        num_samples: S.
        num_examples: how many training examples there are; None keeps nothing.
        bias, sparse, class_weights, weight, reduction, ignore_index: see `SampledLayer`.
    """

    normalizers: Tensor | None  # (num_examples,), u of each

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sampler: Sampler,
        num_samples: int,
        *,
        num_examples: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, sampler, num_samples, remove_hits=True, **options)
        state = None
        if num_examples is not None:
            shape = (check_positive("num_examples", num_examples),)
            dtype = exact_dtype(self.weight.dtype)
            state = torch.full(shape, math.log(self.num_classes), device=self.weight.device, dtype=dtype)
        self.register_buffer("normalizers", state)

    def reset_parameters(self) -> None:
        """Draws weight and bias anew; the state of the examples is that of a new layer."""
        super().reset_parameters()
        if self.normalizers is not None:
            self.normalizers.fill_(math.log(self.num_classes))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Tensor,  # (..., d)
        targets: Tensor,  # (...), of any integer dtype
        examples: Tensor | None = None,  # (...), from 0 to num_examples - 1
    ) -> Tensor:  # (), or (...) for "none"
        """The estimated bound, from a fresh sample.

        Args:
            examples: which training example each row is: its u is used, and in training changed afterwards. None:
                u is the row's own `-log p_y`, so that the expected gradient is exactly the full softmax's, at the
                price of one of its three products with the whole weight.

        Raises:
            ValueError: examples without `num_examples`, or of another shape than targets.
            TypeError, IndexError: examples that are not ids below `num_examples`.
        """
        rows, shape = self._rows(hidden), hidden.shape[:-1]
        self._flatten(hidden, targets)  # one class a row, checked
        ids, weights, kept = sparse_targets(targets, None, shape, self.num_classes, self.ignore_index)
        own = None if examples is None else self._checked_examples(examples, shape)
        loss = self._loss_in_graphs(rows, ids, weights, kept, self.class_weights is not None, own)
        return loss.reshape(shape) if self.reduction == "none" else loss

    # The hook.

    @abstractmethod
    def _updated(
        self,
        examples: Tensor,  # (N,)
        normalizers: Tensor,  # (N,), u as used
        estimates: Tensor,  # (N,), of log(1 + sum) by this sample
        kept: Tensor,  # (N,), bool: whether the example was used
    ) -> Tensor:  # (N,)
        """u of these examples from now on."""

    def _batch_loss(self, batch: Batch) -> Tensor:
        ignored = batch.target_weights[:, 0] == 0  # of class 0, which may be barred
        of_targets, of_candidates = batch.target_logits[:, 0].masked_fill(ignored, 0), batch.candidate_logits
        with torch.no_grad():
            if batch.examples is None:
                used = -self._target_log_prob(batch.hidden.detach(), batch.targets[:, 0]).to(of_targets.dtype)
            else:
                assert self.normalizers is not None  # _checked_examples
                used = self.normalizers[batch.examples].to(of_targets.dtype)
                least = least_normalizers(of_targets, of_candidates)
                used = torch.where(used < least - SLACK, least, used)
        loss, estimates = normalizer_bound(of_targets, of_candidates, batch.candidate_log_counts, used)
        if batch.examples is not None and self.training:
            self._store(batch, used, estimates)
        return loss * batch.loss_weights[:, 0]

    @torch.no_grad()
    def _store(self, batch: Batch, used: Tensor, estimates: Tensor) -> None:
        """The state of the batch's examples after it."""
        assert self.normalizers is not None
        assert batch.examples is not None
        # An ignored row may name the example of another: it writes what the first row that is not ignored writes.
        kept = batch.target_weights[:, 0] > 0
        rows = torch.arange(len(kept), device=kept.device)
        rows = torch.where(kept, rows, kept.int().argsort(descending=True, stable=True)[:1])
        kept, examples = kept[rows], batch.examples[rows]  # all are kept, or none
        before = self.normalizers[examples]
        after = self._updated(examples, used[rows], estimates[rows], kept).to(before.dtype)
        self.normalizers[examples] = torch.where(kept, after, before)

    def _checked_examples(self, examples: Tensor, shape: torch.Size) -> Tensor:  # (N,)
        if self.normalizers is None:
            raise ValueError("examples must be None in a layer without num_examples, which keeps nothing for them")
        examples, _ = check_ids("examples", examples, len(self.normalizers), None, "numbers of examples")
        if examples.shape != shape:
            raise ValueError(
                f"examples must have the shape of targets, {tuple(shape)}; got {tuple(examples.shape)}"
            )
        return examples.reshape(-1)

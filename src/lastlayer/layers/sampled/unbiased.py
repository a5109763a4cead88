"""Losses without bias at any number of samples, by a number kept for each training example.

`AugmentReduce` (Ruiz et al. 2018) and `UMax` (Fagan and Iyengar 2018).
"""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_fraction, check_ids, check_not_negative, check_positive
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.sampled_losses import SLACK, least_normalizers, normalizer_bound
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


class AugmentReduce(UnbiasedLayer):
    r"""`u + exp(-u) (1 + sum over j of exp(o_j - o_y) / c_j) - 1`, with u a number kept for each training example.

    With o the logits, y the target, j the candidates without y, c their expected counts. Over the samples the mean
    of the loss is the bound `-log p_y <= u + exp(-u) (1 + sum over k != y of exp(o_k - o_y)) - 1` of all classes,
    and the mean of its gradient is the bound's, from one sample a row as from a thousand; at `u = -log p_y` it is
    the full softmax's. `SampledSoftmax` has a bias instead, which shrinks as the samples grow.

    After each use `exp(u)` moves to the sample's estimate by `(1 + uses) ** -decay`: a running average.

        layer(hidden, targets, examples)     # examples: which of the num_examples training examples each row is

    Without `examples` u is computed exactly, from all logits. u starts at `log V`. Where a sampled class shows
    that u is too low by more than 1, it is raised first, as in `UMax`: nothing overflows.

    Cost of a step: `6 N (1 + S) d` operations; nothing depends on V with `sparse=True`. State: 8 bytes for each
    training example.

    When *not* to use it: where examples are seen a few times only, as the gradient is near the softmax's where u
    is near `-log p_y`; where candidates are few and V large, as the variance grows with `1 / c`. `SampledSoftmax`
    then learns faster.

    Args:
        in_features: d.
        num_classes: V.
        sampler: of the candidates, with replacement; `Uniform` in the paper.
        num_samples: S.
        num_examples: how many training examples there are; None keeps nothing.
        decay: of the steps of the average, from 0 (the last estimate alone) to 1 (the plain mean). The paper's 0.9
            is for hundreds of uses: for some tens it forgets the sums of an untrained model too slowly.
        bias, sparse, class_weights, weight, reduction, ignore_index: see `SampledLayer`.

    Raises:
        TypeError, ValueError: a sampler that is not a `Sampler` or of other classes; an argument out of range.

    Source: F. J. R. Ruiz et al., "Augment and Reduce: stochastic inference for large categorical distributions",
    ICML 2018.

    Example:
        >>> import torch
        >>> from lastlayer import Uniform
        >>> layer = AugmentReduce(16, 1000, Uniform(1000), num_samples=50, num_examples=200, sparse=True)
        >>> rows = torch.randint(200, (32,))
        >>> hidden, targets = torch.randn(200, 16)[rows], torch.randint(1000, (200,))[rows]
        >>> layer(hidden, targets, rows).backward()
        >>> layer.topk(hidden, 5).indices.shape
        torch.Size([32, 5])
    """

    uses: Tensor | None  # (num_examples,), how often each was seen

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sampler: Sampler,
        num_samples: int,
        *,
        num_examples: int | None = None,
        decay: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, sampler, num_samples, num_examples=num_examples, **options)
        self.decay = check_fraction("decay", decay)
        state = self.normalizers
        self.register_buffer("uses", None if state is None else torch.zeros_like(state, dtype=torch.int32))

    def reset_parameters(self) -> None:
        """Draws weight and bias anew; no example was used."""
        super().reset_parameters()
        if self.uses is not None:
            self.uses.zero_()

    def _updated(self, examples: Tensor, normalizers: Tensor, estimates: Tensor, kept: Tensor) -> Tensor:
        assert self.uses is not None  # as normalizers are not
        share = (1 + self.uses[examples].to(normalizers.dtype)).pow(-self.decay)
        self.uses[examples] += kept.int()
        return torch.logaddexp(normalizers + torch.log1p(-share), estimates + share.log())


class UMax(UnbiasedLayer):
    r"""`u + exp(-u) (1 + sum over j of exp(o_j - o_y) / c_j) - 1`, with u a number kept for each training example.

    The loss of `AugmentReduce`, whose page says what its expected gradient is. Here u is a variable of the same
    problem: after each use it takes a step of stochastic gradient descent of size `rate`, but no further than to
    where this sample's loss is least. Where a sampled class j shows that u is too low by more than 1, u becomes
    `log(1 + exp(o_j - o_y))` before the loss is computed: without that the gradients of plain descent overflow.

        layer(hidden, targets, examples)     # examples: which of the num_examples training examples each row is

    Without `examples` u is computed exactly, from all logits. u starts at `log V`.

    Cost of a step: `6 N (1 + S) d` operations; nothing depends on V with `sparse=True`. State: 4 bytes for each
    training example.

    When *not* to use it: where examples are seen once or a few times, or candidates are few and V large; see
    `AugmentReduce`.

    Args:
        in_features: d.
        num_classes: V.
        sampler: of the candidates, with replacement.
        num_samples: S.
        num_examples: how many training examples there are; None keeps nothing.
        rate: of u's descent; 0 keeps u but for raising it.
        bias, sparse, class_weights, weight, reduction, ignore_index: see `SampledLayer`.

    Raises:
        TypeError, ValueError: a sampler that is not a `Sampler` or of other classes; an argument out of range.

    Source: F. Fagan, G. Iyengar, "Unbiased scalable softmax optimization", 2018.

    Example:
        >>> import torch
        >>> from lastlayer import Uniform
        >>> layer = UMax(16, 1000, Uniform(1000), num_samples=50, num_examples=200, sparse=True)
        >>> rows = torch.randint(200, (32,))
        >>> hidden, targets = torch.randn(200, 16)[rows], torch.randint(1000, (200,))[rows]
        >>> layer(hidden, targets, rows).backward()
        >>> layer.topk(hidden, 5).indices.shape
        torch.Size([32, 5])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        sampler: Sampler,
        num_samples: int,
        *,
        num_examples: int | None = None,
        rate: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(in_features, num_classes, sampler, num_samples, num_examples=num_examples, **options)
        self.rate = check_not_negative("rate", rate)

    def _updated(self, examples: Tensor, normalizers: Tensor, estimates: Tensor, kept: Tensor) -> Tensor:
        moved = normalizers - self.rate * (1 - (estimates - normalizers).exp())
        low, high = torch.minimum(normalizers, estimates), torch.maximum(normalizers, estimates)
        return torch.minimum(torch.maximum(moved, low), high)

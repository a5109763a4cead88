"""Augment & Reduce: an unbiased bound, with a running average of each example's normaliser (Ruiz et al. 2018)."""

from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_fraction
from lastlayer.layers.sampled.unbiased import UnbiasedLayer
from lastlayer.layers.samplers.base import Sampler


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

"""U-max: an unbiased bound, with a gradient step for each example's normaliser (Fagan and Iyengar 2018)."""

from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_not_negative
from lastlayer.layers.sampled.unbiased import UnbiasedLayer
from lastlayer.layers.samplers.base import Sampler


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

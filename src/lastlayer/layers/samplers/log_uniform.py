"""Ids sorted by frequency, drawn about as Zipf's law has them."""

import math
import warnings

import torch
from torch import Tensor

from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.clusters import by_falling_count
from lastlayer.functional.sampling import uniform_doubles
from lastlayer.layers.samplers.independent import IndependentSampler

# Targets after which it is decided whether ids look sorted, and the fewest classes for which that can be decided.
TARGETS_WATCHED, LEAST_WATCHED_CLASSES = 4096, 100


class LogUniform(IndependentSampler):
    """`q_k = log((k + 2) / (k + 1)) / log(V + 1)` for the class of rank k, from 0, by falling frequency.

    Needs no counts where ids are sorted by frequency, as most tokenizers of whole words leave them. Where they are
    not, `counts` defines the ranks: the sampler keeps the permutation. Without `counts` it watches the first
    targets of the training, and warns when these do not look sorted. O(1) a draw, in float64, as float32 cannot
    distinguish the last of a million classes from their neighbours.

    Not for subword tokens, whose ids are sorted by merges, not by frequency: use `Unigram(counts)`.

    Args:
        num_classes: V.
        counts: `(V,)`, how often each class occurs, where ids are not sorted by falling count.
        replacement, shared: whether a class may come twice; one set for all rows, or one for each.

    Raises:
        TypeError, ValueError: counts of the wrong kind, length or range.

    Source: the candidate sampler of the same name in TensorFlow.

    >>> sampler = LogUniform(3, counts=torch.tensor([5, 1, 30]))
    >>> [round(p, 3) for p in sampler.log_prob(torch.arange(3)).exp().tolist()]
    [0.292, 0.208, 0.5]
    """

    order: Tensor | None  # (V,), the class of each rank; None where ids are ranks
    log_probs: Tensor | None  # (V,), log q of each class

    def __init__(
        self, num_classes: int, *, counts: Tensor | None = None, replacement: bool = True, shared: bool = True
    ) -> None:
        super().__init__(num_classes, replacement=replacement, shared=shared)
        order = None if counts is None else by_falling_count(counts, self.num_classes)
        self.register_buffer("order", order, persistent=False)
        log_probs = None if order is None else self._of_ranks(order.argsort())
        self.register_buffer("log_probs", log_probs, persistent=False)
        watched = counts is None and self.num_classes >= LEAST_WATCHED_CLASSES
        self._to_watch = TARGETS_WATCHED if watched else 0
        self._log_ranks = 0.0

    def observe(self, targets: Tensor) -> None:
        """Warns once, after the first thousands of targets, where their ids do not look sorted by frequency.

        Under this distribution `log(rank + 1) / log(V + 1)` is 1/2 on average; of ids in no order it is nearly 1.
        """
        if self._to_watch <= 0 or not eager_on_cpu(targets):
            return
        self._to_watch -= targets.numel()
        self._log_ranks += float((targets.double() + 1).log().sum()) / math.log(self.num_classes + 1)
        if self._to_watch > 0:
            return
        found = self._log_ranks / (TARGETS_WATCHED - self._to_watch)
        unsorted = 1 - 1 / math.log(self.num_classes + 1)
        if found > (0.5 + unsorted) / 2:
            warnings.warn(
                "LogUniform expects class ids sorted by falling frequency, and the first "
                f"{TARGETS_WATCHED} targets are not (mean of log(id + 1) / log(V + 1): {found:.2f}; sorted ids "
                "have about 0.5): pass counts=, one count a class, or use Unigram(counts)",
                UserWarning,
                stacklevel=2,
            )

    def _draw(self, num_sets: int, num_samples: int, device: torch.device) -> Tensor:
        share = uniform_doubles((num_sets, num_samples), device)
        ranks = share.mul_(math.log(self.num_classes + 1)).exp_().long().sub_(1)
        ranks.clamp_(max=self.num_classes - 1)  # where rounding has reached V + 1
        return ranks if self.order is None else self.order[ranks]

    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`log q` of the classes' ranks."""
        return self._of_ranks(ids) if self.log_probs is None else self.log_probs[ids]

    def _of_ranks(self, ranks: Tensor) -> Tensor:
        share = ranks.double().add_(1).reciprocal_().log1p_()
        return share.div_(math.log(self.num_classes + 1)).log_().float()

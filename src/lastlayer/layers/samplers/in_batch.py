"""The targets of the batch's other rows as negatives: no weight is read that the batch does not read anyway."""

import torch
from torch import Tensor

from lastlayer.functional.clusters import check_counts
from lastlayer.layers.samplers.base import Candidates, Sampler


class InBatch(Sampler):
    """The targets of the batch; each row's own is an accidental hit for it, so its negatives are those of others.

    Targets come by their frequency, so q is the classes' frequencies: of `counts`, or else of the targets seen so
    far, counted as they stream (a batch is counted before it is sampled from, so that none has a count of 0).
    A set of `num_samples` is chosen from the batch without replacement of rows; a batch that has fewer targets
    gives all of them. The layer passes the targets by `observe`. O(1) a draw.

    Use it where reading a class's vector is expensive, as with an item encoder, or as the cheap half of a `Mixed`.
    Classes that are no target of the batch never get a negative term, so it needs large batches.

    Args:
        num_classes: V.
        counts: `(V,)`, how often each class occurs; None: counted from the targets.

    Raises:
        TypeError, ValueError: counts of the wrong kind, length or range, or all 0.

    Source: J. Yang et al., "Mixed negative sampling for learning two-tower neural networks in recommendations",
    2020; the correction is that of X. Yi et al., RecSys 2019.

    >>> sampler = InBatch(10)
    >>> sampler.observe(torch.tensor([3, 3, 7]))
    >>> ids, log_expected_counts = sampler.sample(3)
    >>> sorted(ids.tolist())
    [3, 3, 7]
    """

    samples_targets = True
    counts: Tensor  # (V,), float64: counted so far
    total: Tensor  # ()

    def __init__(self, num_classes: int, *, counts: Tensor | None = None) -> None:
        super().__init__(num_classes, shared=True)
        self.counted = counts is None
        if counts is None:
            counts = torch.zeros(self.num_classes, dtype=torch.float64)
        else:
            counts = check_counts(counts, self.num_classes)
            if not bool(counts.any()):
                raise ValueError("counts must hold a positive count, got none")
        self.register_buffer("counts", counts, persistent=self.counted)
        self.register_buffer("total", self.counts.sum(), persistent=self.counted)
        self._targets: Tensor | None = None

    @torch.no_grad()
    def observe(self, targets: Tensor) -> None:
        """The batch's targets, which `sample` draws from until the next batch."""
        self._targets = targets.detach().reshape(-1)
        if self.counted:
            ones = torch.ones((), dtype=torch.float64, device=self.counts.device).expand(len(self._targets))
            self.counts.index_add_(0, self._targets, ones)
            self.total += len(self._targets)

    @torch.no_grad()
    def sample(self, num_samples: int, hidden: Tensor | None = None) -> Candidates:
        """`num_samples` of the batch's targets, or all of them where there are fewer.

        Raises:
            RuntimeError: no batch was observed.
        """
        num_samples = self.check_num_samples(num_samples)
        targets = self._batch()
        if num_samples < len(targets):
            targets = targets[torch.randperm(len(targets), device=targets.device)[:num_samples]]
        return Candidates(targets, self.log_expected_counts(targets, num_samples))

    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The log of the classes' frequencies."""
        return (self.counts[ids] / self.total).log().float()

    def _num_draws(self, num_samples: int) -> float:
        """How many of a set's targets are of other rows, on average, as a row's own is removed from its set.

        A batch of one row has none to speak of.
        """
        rows = len(self._batch())
        return max(min(num_samples, rows) * (rows - 1) / max(rows, 1), 1e-30)

    def _batch(self) -> Tensor:
        if self._targets is None:
            raise RuntimeError("InBatch samples the targets of a batch: call observe(targets) first")
        return self._targets

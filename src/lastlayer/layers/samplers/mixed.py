"""Part of a set from one sampler, the rest from another."""

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count
from lastlayer.layers.samplers.base import Candidates, Sampler


class Mixed(Sampler):
    """`share * num_samples` ids of sampler `first`, rounded, and the rest of `second`; expected counts add up.

    The usual pair is `InBatch`, which costs no reads, with `Uniform` or `LogUniform`, which reaches the classes
    that are no target of the batch. A class may come once from each, also where both draw without replacement.

    Args:
        first, second: samplers of the same classes.
        share: of `first`, between 0 and 1, both exclusive.

    Raises:
        TypeError: arguments that are no samplers.
        ValueError: samplers of different numbers of classes, or a share out of range.

    Source: J. Yang et al., "Mixed negative sampling for learning two-tower neural networks in recommendations",
    2020.

    >>> from lastlayer import LogUniform, Uniform
    >>> sampler = Mixed(Uniform(100), LogUniform(100), 0.25)
    >>> ids, log_expected_counts = sampler.sample(8)
    >>> ids.shape
    torch.Size([8])
    """

    def __init__(self, first: Sampler, second: Sampler, share: float = 0.5) -> None:
        for name, part in (("first", first), ("second", second)):
            if not isinstance(part, Sampler):
                raise TypeError(f"{name} must be a Sampler, got {type(part).__name__}")
        if first.num_classes != second.num_classes:
            raise ValueError(
                "first and second must sample the same classes, got "
                f"num_classes={first.num_classes} and {second.num_classes}"
            )
        if not 0.0 < share < 1.0:
            raise ValueError(f"share must be between 0 and 1, both exclusive; got {share!r}")
        super().__init__(first.num_classes, shared=first.shared and second.shared)
        self.first, self.second, self.share = first, second, share
        self.follows_weight = first.follows_weight or second.follows_weight
        self.samples_targets = first.samples_targets or second.samples_targets

    @property
    def compiles(self) -> bool:
        """Where both parts do."""
        return self.first.compiles and self.second.compiles

    @torch.no_grad()
    def sample(self, num_samples: int, hidden: Tensor | None = None) -> Candidates:
        """The ids of `first`, then those of `second`; `num_samples` of at least 2."""
        leading = () if self.shared or hidden is None else hidden.shape[:-1]  # a part refuses where it needs some
        parts = [
            part.sample(count, hidden).ids
            for part, count in zip((self.first, self.second), self._split(num_samples), strict=True)
        ]
        ids = torch.cat([part.expand(*leading, part.shape[-1]) for part in parts], -1)
        return Candidates(ids, self.log_expected_counts(ids, num_samples, hidden))

    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`log(share q1 + (1 - share) q2)`."""
        one, other = (part.log_prob(ids, hidden).double().exp() for part in (self.first, self.second))
        return (self.share * one + (1 - self.share) * other).log().float()

    def log_expected_counts(self, ids: Tensor, num_samples: int, hidden: Tensor | None = None) -> Tensor:
        """The log of the sum of both parts' expected counts."""
        one, other = self._split(num_samples)
        return torch.logaddexp(
            self.first.log_expected_counts(ids, one, hidden), self.second.log_expected_counts(ids, other, hidden)
        )

    def log_inclusion(self, ids: Tensor, num_samples: int, hidden: Tensor | None = None) -> Tensor:
        """The log of the probability that either part holds the class."""
        one, other = self._split(num_samples)
        in_first = self.first.log_inclusion(ids, one, hidden).double().exp()
        in_second = self.second.log_inclusion(ids, other, hidden).double().exp()
        return (in_first + in_second - in_first * in_second).log().float()

    def check_num_samples(self, num_samples: int) -> int:
        """At least one of each part."""
        for part, count in zip((self.first, self.second), self._split(num_samples), strict=True):
            part.check_num_samples(count)
        return num_samples

    def observe(self, targets: Tensor) -> None:
        """Forwards to both samplers."""
        self.first.observe(targets)
        self.second.observe(targets)

    def update(self, weight: Tensor, bias: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Forwards to both samplers."""
        self.first.update(weight, bias, ids)
        self.second.update(weight, bias, ids)

    def extra_repr(self) -> str:
        return f"share={self.share}"

    def _split(self, num_samples: int) -> tuple[int, int]:
        num_samples = check_count("num_samples", num_samples, 2)
        of_first = min(max(round(self.share * num_samples), 1), num_samples - 1)
        return of_first, num_samples - of_first

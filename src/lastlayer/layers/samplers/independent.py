"""Samplers whose draws are independent and do not depend on the hidden state; the simplest is `Uniform`."""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count
from lastlayer.functional.ordinary import exporting
from lastlayer.functional.sampling import uniform_doubles
from lastlayer.layers.samplers.base import Candidates, Sampler


class IndependentSampler(Sampler):
    """Draws from one distribution q over the classes.

    With replacement the `m` draws of a set are independent, and class i is expected `m q_i` times. Without, ids
    are drawn one after another until m are distinct, and class i is expected `1 - (1 - q_i) ** T` times, with the
    number of draws T for which the expectations sum to m: the standard approximation of inclusion probabilities,
    exact where q is uniform or all classes are drawn. T costs a few passes over all classes, once for each m.

    A subclass writes `_draw` and `log_prob`.

    Args:
        num_classes: V.
        replacement: whether a class may be drawn twice into one set. Without, a set is more informative for its
            size, as frequent classes are not repeated.
        shared: one set for all rows, or one for each.
    """

    def __init__(self, num_classes: int, *, replacement: bool = True, shared: bool = True) -> None:
        super().__init__(num_classes, shared=shared)
        self.replacement = replacement
        self._draws_for: dict[int, float] = {}

    @property
    def compiles(self) -> bool:
        """With replacement; without, draws go on until enough are distinct."""
        return self.replacement

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        hidden: Tensor | None = None,  # (..., d); of its shape alone, where sets are not shared
    ) -> Candidates:
        """`num_samples` class ids a set, and the log of how often each is expected in a set.

        Raises:
            ValueError: `num_samples` below 1, or above the number of classes without replacement; no hidden state
                though each of its rows has a set of its own.
        """
        num_samples = self.check_num_samples(num_samples)
        if hidden is None and not self.shared:
            raise ValueError("hidden must be given, as shared=False draws one set for each of its rows")
        if not self.replacement and exporting():
            raise RuntimeError(
                f"{type(self).__name__}(replacement=False) of lastlayer cannot be exported: it draws until enough "
                "classes are distinct; use replacement=True"
            )
        leading = torch.Size() if self.shared or hidden is None else hidden.shape[:-1]
        device = self.anchor.device if hidden is None else hidden.device
        draw = self._draw if self.replacement else self._draw_distinct
        # The product, as numel() would fix the batch of an export.
        ids = draw(math.prod(leading), num_samples, device).reshape(*leading, num_samples)
        return Candidates(ids, self.log_expected_counts(ids, num_samples))

    def log_expected_counts(self, ids: Tensor, num_samples: int, hidden: Tensor | None = None) -> Tensor:
        """`log(num_samples * q)` with replacement, `log_inclusion` without."""
        count = super().log_expected_counts if self.replacement else self.log_inclusion
        return count(ids, num_samples)

    def check_num_samples(self, num_samples: int) -> int:
        """At most `num_classes` without replacement."""
        num_samples = check_count("num_samples", num_samples, 1)
        if not self.replacement and num_samples > self.num_classes:
            raise ValueError(
                f"num_samples must be at most num_classes={self.num_classes} without replacement, "
                f"got {num_samples}"
            )
        return num_samples

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, replacement={self.replacement}, shared={self.shared}"

    @abstractmethod
    def _draw(self, num_sets: int, num_samples: int, device: torch.device) -> Tensor:
        """Independent draws `(num_sets, num_samples)`."""

    def _draw_distinct(self, num_sets: int, num_samples: int, device: torch.device) -> Tensor:
        draws = self._num_draws(num_samples)
        if draws <= self.num_classes:
            return distinct_rows(lambda count: self._draw(num_sets, count, device), num_samples, draws)
        # Most classes are needed, and rejection would be slow: the largest log q + Gumbel noise are equivalent.
        scores = self.log_prob(torch.arange(self.num_classes, device=device))
        noise = uniform_doubles((num_sets, self.num_classes), device)
        return (scores - noise.log_().neg_().log_()).topk(num_samples).indices

    def _num_draws(self, num_samples: int) -> float:
        num_samples = self.check_num_samples(num_samples)
        if self.replacement:
            return num_samples
        if num_samples not in self._draws_for:
            log_prob = self.log_prob(torch.arange(self.num_classes, device=self.anchor.device))
            self._draws_for[num_samples] = num_draws_for(log_prob, num_samples)
        return self._draws_for[num_samples]


class Uniform(IndependentSampler):
    """`q_i = 1 / V`: `torch.randint(V, (num_samples,))`.

    The right choice where nothing is known of the classes, and the worst where a few of them are frequent: their
    terms of the sum are then hardly ever sampled. O(1) a draw.

    Args:
        num_classes: V.
        replacement, shared: whether a class may come twice; one set for all rows, or one for each.

    >>> sampler = Uniform(1000, replacement=False)
    >>> ids, log_expected_counts = sampler.sample(10)
    >>> len(set(ids.tolist())), round(float(log_expected_counts[0].exp()), 4)
    (10, 0.01)
    """

    def _draw(self, num_sets: int, num_samples: int, device: torch.device) -> Tensor:
        return torch.randint(self.num_classes, (num_sets, num_samples), device=device)

    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`-log V`."""
        return torch.full(ids.shape, -math.log(self.num_classes), dtype=torch.float32, device=ids.device)


def num_draws_for(
    log_prob: Tensor,  # (V,), log q
    num_samples: int,
) -> float:
    """T with `sum over i of 1 - (1 - q_i) ** T == num_samples`: about how many draws make so many distinct.

    The sum is concave in T, so Newton's method from T = num_samples rises to the solution and never passes it.

    Raises:
        ValueError: fewer than `num_samples` classes have a positive probability.
    """
    prob = log_prob.double().exp()
    possible = int((prob > 0).sum())
    if num_samples > possible:
        raise ValueError(
            f"num_samples must be at most the {possible} classes of positive probability without replacement, "
            f"got {num_samples}"
        )
    if num_samples == possible:
        return math.inf
    log_miss = torch.log1p(-prob.clamp(max=1 - 1e-16))
    draws = float(num_samples)
    for _ in range(100):
        missed = torch.exp(draws * log_miss)
        short = num_samples - float((1 - missed).sum())
        slope = float(-(missed * log_miss).sum())
        if short <= 1e-9 * num_samples or slope <= 0:
            break
        draws += short / slope
    return draws


def distinct_rows(
    draw: Callable[[int], Tensor],  # count to (R, count) independent draws
    num_samples: int,
    num_draws: float,  # about how many are needed
) -> Tensor:  # (R, num_samples)
    """The first `num_samples` distinct ids of each row, in the order in which they were drawn."""
    count = int(num_draws + 3 * math.sqrt(num_draws)) + 1
    ids = draw(count)
    while True:
        first = _first_occurrences(ids)
        if not len(ids) or int(first.sum(1).min()) >= num_samples:
            break
        ids = torch.cat([ids, draw(count)], 1)
    kept = first & (first.cumsum(1) <= num_samples)
    return ids[kept].reshape(len(ids), num_samples)


def _first_occurrences(ids: Tensor) -> Tensor:  # (R, K), bool
    """Where an id stands in its row for the first time."""
    ordered, places = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(first).scatter_(1, places, first)

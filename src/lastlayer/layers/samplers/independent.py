"""Samplers whose draws are independent, with and without replacement, and do not depend on the hidden state."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count
from lastlayer.functional.ordinary import exporting
from lastlayer.functional.sampling import uniform_doubles
from lastlayer.layers.samplers.base import Candidates, Sampler
from lastlayer.layers.samplers.distinct import distinct_rows, num_draws_for


class IndependentSampler(Sampler):
    """Draws from one distribution q over the classes.

    With replacement the `m` draws of a set are independent, and class i is expected `m q_i` times. Without, ids
    are drawn one after another until m are distinct, and class i is expected `1 - (1 - q_i) ** T` times, with the
    number of draws T for which the expectations sum to m: the standard approximation of inclusion probabilities,
    exact where q is uniform or all classes are drawn. T costs a few passes over all classes, once for each m.

    A subclass writes `_draw` and `_log_prob`.

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
        leading = torch.Size() if self.shared or hidden is None else hidden.shape[:-1]
        num_sets = math.prod(leading)  # numel() would fix the batch of an export
        device = self.anchor.device if hidden is None else hidden.device
        if self.replacement:
            ids, log_prob = self._draw(num_sets, num_samples, device)
            log_counts = log_prob + math.log(num_samples)
        elif exporting():
            raise RuntimeError(
                f"{type(self).__name__}(replacement=False) of lastlayer cannot be exported: it draws until enough "
                "classes are distinct; use replacement=True"
            )
        else:
            ids = self._draw_distinct(num_sets, num_samples, device)
            log_counts = self.log_inclusion(ids, num_samples)
        shape = (*leading, num_samples)
        return Candidates(ids.reshape(shape), log_counts.reshape(shape))

    @torch.no_grad()
    def log_prob(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """`log q` of class ids of any shape: of one draw, before any are set aside as repeated."""
        return self._log_prob(ids)

    def log_expected_counts(self, ids: Tensor, num_samples: int, hidden: Tensor | None = None) -> Tensor:
        """`log(num_samples * q)` with replacement, `log_inclusion` without."""
        if not self.replacement:
            return self.log_inclusion(ids, num_samples)
        return self.log_prob(ids) + math.log(self.check_num_samples(num_samples))

    def log_inclusion(self, ids: Tensor, num_samples: int, hidden: Tensor | None = None) -> Tensor:
        """`log(1 - (1 - q) ** T)`, where T is `num_samples` with replacement."""
        num_samples = self.check_num_samples(num_samples)
        log_prob = self.log_prob(ids)
        draws = num_samples if self.replacement else self._num_draws(num_samples)
        return log_of_any(log_prob, draws)

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

    # The hooks.

    @abstractmethod
    def _draw(self, num_sets: int, num_samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Independent draws `(num_sets, num_samples)` and their `log q`."""

    @abstractmethod
    def _log_prob(self, ids: Tensor) -> Tensor:
        """`log q` of ids of any shape, in float32 at least."""

    def _draw_distinct(self, num_sets: int, num_samples: int, device: torch.device) -> Tensor:
        draws = self._num_draws(num_samples)
        if draws <= self.num_classes:
            return distinct_rows(lambda count: self._draw(num_sets, count, device)[0], num_samples, draws)
        # Most classes are needed, and rejection would be slow: the largest log q + Gumbel noise are equivalent.
        scores = self._log_prob(torch.arange(self.num_classes, device=device))
        noise = uniform_doubles((num_sets, self.num_classes), device)
        return (scores - noise.log_().neg_().log_()).topk(num_samples).indices

    def _num_draws(self, num_samples: int) -> float:
        if num_samples not in self._draws_for:
            log_prob = self._log_prob(torch.arange(self.num_classes, device=self.anchor.device))
            self._draws_for[num_samples] = num_draws_for(log_prob, num_samples)
        return self._draws_for[num_samples]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draws_for": {}}


def log_of_any(
    log_prob: Tensor,  # log q
    draws: float,
) -> Tensor:  # the shape of log_prob
    """`log(1 - (1 - q) ** draws)`: of at least one in so many draws."""
    prob = log_prob.double().exp().clamp_(max=1.0)
    if math.isinf(draws):
        return torch.where(prob > 0, 0.0, -math.inf).to(log_prob.dtype)
    return torch.expm1(draws * torch.log1p(-prob)).neg_().log_().to(log_prob.dtype)

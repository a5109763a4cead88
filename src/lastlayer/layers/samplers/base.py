"""The contract of every sampler: class ids from a stated distribution, and the log of their expected counts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lastlayer.functional.checks import check_count, check_positive
from lastlayer.layers.parts import keep_buffers


class Candidates(NamedTuple):
    """Sampled classes: `(S,)` when the batch shares them, `(..., S)` with one set for each row."""

    ids: Tensor  # (S,) or (..., S), int64
    log_expected_counts: Tensor  # the shape of ids, float32 at least


class Sampler(nn.Module, ABC):
    """Draws class ids, with their expected counts, which correct a loss over some classes for all of them.

    | call | returns |
    |---|---|
    | `sampler.sample(num_samples, hidden)` | `Candidates(ids, log_expected_counts)` |
    | `sampler.log_expected_counts(ids, num_samples, hidden)` | the same log of any classes, such as the targets |
    | `sampler.log_inclusion(ids, num_samples, hidden)` | the log of the probability of being sampled at all |
    | `sampler.log_prob(ids, hidden)` | `log q` of one draw |

    `hidden (..., d)` is needed by samplers that draw one set for each row (`shared` is False), and `ids` are then
    `(..., C)` too; others take ids of any shape. Draws follow `torch.manual_seed`.

    A sampled layer passes to its sampler, before each training batch, the targets (`observe`) and its weight
    (`update`). Tables stay in their dtype when the layer's changes.

    Args:
        num_classes: V.
        shared: one set for all rows; otherwise one set for each row of `hidden`.
    """

    follows_weight = False  # whether `update` needs to be called
    samples_targets = False  # whether sets hold the batch's own targets
    anchor: Tensor  # the device where the sampler draws when there is no hidden state

    def __init__(self, num_classes: int, *, shared: bool) -> None:
        super().__init__()
        self.num_classes = check_positive("num_classes", num_classes)
        self.shared = shared
        self.register_buffer("anchor", torch.empty(0, device="cpu"), persistent=False)

    @property
    def compiles(self) -> bool:
        """Whether `torch.compile` takes `sample` whole.

        It is then a fixed number of operations, which depend on no state that `observe` or `update` changes.
        """
        return False

    @abstractmethod
    def sample(
        self,
        num_samples: int,
        hidden: Tensor | None = None,  # (..., d)
    ) -> Candidates:
        """`num_samples` class ids a set, and the log of how often each is expected in a set."""

    @abstractmethod
    def log_prob(
        self,
        ids: Tensor,
        hidden: Tensor | None = None,
    ) -> Tensor:  # the shape of ids, float32 at least
        """`log q` of class ids, in one draw."""

    def log_expected_counts(
        self,
        ids: Tensor,
        num_samples: int,
        hidden: Tensor | None = None,
    ) -> Tensor:  # the shape of ids
        """The log of how often each class is expected in one set: `log(T q)` of T independent draws."""
        return self.log_prob(ids, hidden) + math.log(self._num_draws(num_samples))

    def log_inclusion(
        self,
        ids: Tensor,
        num_samples: int,
        hidden: Tensor | None = None,
    ) -> Tensor:  # the shape of ids
        """The log of the probability that one set holds each class: `log(1 - (1 - q) ** T)`."""
        log_prob, draws = self.log_prob(ids, hidden), self._num_draws(num_samples)
        prob = log_prob.double().exp().clamp_(max=1.0)
        if math.isinf(draws):
            return torch.where(prob > 0, 0.0, -math.inf).to(log_prob.dtype)
        return torch.expm1(draws * torch.log1p(-prob)).neg_().log_().to(log_prob.dtype)

    def check_num_samples(self, num_samples: int) -> int:
        """`num_samples`, or a ValueError where no set can have so many."""
        return check_count("num_samples", num_samples, 1)

    def _num_draws(self, num_samples: int) -> float:
        """T, the independent draws that a set of `num_samples` amounts to."""
        return self.check_num_samples(num_samples)

    def observe(self, targets: Tensor) -> None:
        """Receives the targets `(N,)` of each training batch before sampling for it; most samplers ignore them."""

    def update(self, weight: Tensor, bias: Tensor | None = None, ids: Tensor | None = None) -> None:
        """Receives the weight before each training batch, of which the rows `ids` changed (None: any may)."""

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Sampler":
        """Moves the tables, and keeps their dtype: probabilities in bfloat16 would bias every correction."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        keep_buffers(self, before)
        return self

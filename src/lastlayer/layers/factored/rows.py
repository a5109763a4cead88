"""The rows of F, of which a pass and a step of `FactoredOutput` read and change those of the targets."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.ordinary import ordinary
from lastlayer.kernels import factored as kernel
from lastlayer.kernels.backends import factored_backend_for

CHUNK_NUMBERS = 1 << 22  # numbers of the (V, d) factor that one pass over its rows holds at once


class Rows:
    """F `(V, d)`, all of it in this process.

    All else of a state is small. A subclass whose rows are divided among processes overrides what reads or changes
    the rows of targets, and what is computed from all rows: `summed`, `largest`, `first` and `some`.

    Args:
        factor: F, kept and changed in place.
    """

    groups: tuple[Any, ...] = ()  # groups of processes that together hold this state, and make each step together
    copies: Any = None  # the one among them whose processes take batches of their own

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    @property
    def num_classes(self) -> int:
        """V, of all processes."""
        return self.factor.shape[0]

    @property
    def whole(self) -> bool:
        """Whether this process has all rows."""
        return True

    def like(self, factor: Tensor) -> "Rows":
        """The rows of another F of these classes, as `saved` gives it or a whole one."""
        return Rows(factor.to(self.factor.device))

    def saved(self) -> Tensor:  # (V, d)
        """What a checkpoint keeps: F itself, not copied."""
        return self.factor

    # The rows of targets.

    def target_scores(
        self,
        mapped: Tensor,  # (N, d), hidden @ U^T
        ids: Tensor,  # (N, K)
    ) -> Tensor:  # (N, K)
        """`F_t (U h)`, differentiable; rows of F are gathered in pieces."""
        factor, (count, d) = self.factor, (ids.shape[1], self.factor.shape[1])

        def of_rows(ids: Tensor, mapped: Tensor) -> Tensor:
            return (factor.index_select(0, ids.reshape(-1)).view(-1, count, d) * mapped[:, None]).sum(2)

        if not ordinary(ids, mapped):  # a split would fix the batch of an export
            return of_rows(ids, mapped)
        rows = max(1, CHUNK_NUMBERS // (count * d))
        pieces = [of_rows(*parts) for parts in zip(ids.split(rows), mapped.split(rows), strict=True)]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def target_sums(
        self,
        ids: Tensor,  # (N, K)
        by_score: Tensor,  # (N, K)
    ) -> Tensor:  # (N, d)
        """`Y F`."""
        return F.embedding_bag(ids, self.factor, per_sample_weights=by_score, mode="sum")

    def move(
        self,
        ids: Tensor,  # (N, K)
        by_score: Tensor,  # (N, K)
        solution: Tensor,  # (N, d), X
        rate: float,
    ) -> None:
        """`F <- F - rate Y^T X`."""
        if factored_backend_for(self.factor.device, self.factor.dtype) == "compiled":
            kernel.move_targets(self.factor, ids, by_score, solution, rate)
            return
        for classes, values in zip(ids.T, by_score.T, strict=True):  # one target of every row at a time
            self.factor.index_add_(0, classes, values[:, None] * solution, alpha=-rate)

    # What is computed from the rows of all processes.

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of what each has of its own rows."""
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, elementwise."""
        return tensor

    def first(self, tensor: Tensor) -> Tensor:
        """What the first process has, for decisions that all must make alike, whatever their rounding."""
        return tensor

    def some(self, count: int) -> Tensor:  # (from count to 2 count, d), or all of fewer
        """About `count` rows, evenly spaced."""
        return self.factor[:: max(1, self.num_classes // count)]

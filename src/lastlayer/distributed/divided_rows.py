"""The state of a `FactoredOutput` whose rows of F are divided among ranks: each reads and changes its own."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lastlayer.distributed.collectives import copied, from_first, summed
from lastlayer.distributed.ranks import Ranks, of_own_rows, own_rows
from lastlayer.layers.factored.state import CHUNK_NUMBERS, FactoredState


class DividedState(FactoredState):
    """This rank's rows of F, and all else of a state.

    Args:
        weight: `(W, d)`, the rows of its W classes.
        total: V.
        ranks: those that divide the rows.
        across: those that have the same rows, and take batches of their own; None: there are none.
    """

    def __init__(self, weight: Tensor, total: int, ranks: Ranks, across: Ranks | None) -> None:
        self._classes, self.ranks, self.across = total, ranks, across
        super().__init__(weight)

    def like(self, weight: Tensor) -> FactoredState:
        return DividedState(weight, self._classes, self.ranks, self.across)

    @property
    def groups(self) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tuple(ranks.group for ranks in (self.ranks, self.across) if ranks is not None)

    @property
    def copies(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.across is None else self.across.group

    @property
    def num_classes(self) -> int:
        return self._classes

    def compiled(self) -> bool:
        return False

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "factor": of_own_rows(self.factor, self._classes, self.ranks)}

    # The rows of targets: each has one owner.

    def target_scores(self, mapped: Tensor, ids: Tensor) -> Tensor:  # (N, d), (N, K) to (N, K)
        mapped, found = copied(mapped, self.ranks), []
        rows, columns, places = self._own_targets(ids)
        for row, place in self._pieces(rows, places):
            found.append(super().target_scores(mapped.index_select(0, row), place[:, None])[:, 0])
        own = mapped.new_zeros(ids.shape).index_put((rows, columns), torch.cat(found))
        return summed(own, self.ranks)

    def target_sums(self, ids: Tensor, by_score: Tensor) -> Tensor:  # (N, K) each, to (N, d)
        rows, columns, places = self._own_targets(ids)
        sums = by_score.new_zeros(len(ids), self.factor.shape[1])
        if len(places):
            counts = torch.bincount(rows, minlength=len(ids))
            sums = torch.nn.functional.embedding_bag(
                places,
                self.factor,
                offsets=counts.cumsum(0) - counts,
                per_sample_weights=by_score[rows, columns],
                mode="sum",
            )
        return summed(sums, self.ranks)

    def move(self, ids: Tensor, by_score: Tensor, solution: Tensor, rate: float) -> None:
        rows, columns, places = self._own_targets(ids)
        for row, place, value in self._pieces(rows, places, by_score[rows, columns]):
            if len(row):
                super().move(place[:, None], value[:, None], solution.index_select(0, row), rate)

    def _own_targets(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (n,) each
        """Of the n targets that this rank owns: the row and column of `ids`, in order, and the row of F."""
        own = self.ranks.span(self._classes)
        rows, columns = ((ids >= own.start) & (ids < own.stop)).nonzero().unbind(1)
        return rows, columns, ids[rows, columns] - own.start

    def _pieces(self, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """So many at a time that their rows of F are at most `CHUNK_NUMBERS`; once where there are none."""
        size = max(1, CHUNK_NUMBERS // self.factor.shape[1])
        return zip(*(part.split(size) for part in parts), strict=True)

    # Over all ranks; on "meta" there is nothing to send.

    def summed(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.is_meta else summed(tensor, self.ranks)

    def first(self, tensor: Tensor) -> Tensor:
        tensor = from_first(tensor, self.ranks)
        return tensor if self.across is None else from_first(tensor, self.across)

    def own_rows(self, tensor: Tensor) -> Tensor:
        return own_rows(tensor, self.ranks)

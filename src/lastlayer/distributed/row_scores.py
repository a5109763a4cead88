"""Sharded layers whose queries come from the log-probabilities that each rank has of its own classes."""

from abc import abstractmethod

import torch
from torch import Tensor

from lastlayer.distributed.collectives import gathered, summed
from lastlayer.distributed.layer import ShardedLayer
from lastlayer.distributed.queries import best_of_own, best_of_ranks, reordered, sample_of_ranks
from lastlayer.distributed.ranks import places_in
from lastlayer.functional.selection import Selection, topk_in_chunks

# Log-probabilities (n, w) of neighbouring rows of the layer, and which of its rows these are.
Part = tuple[Tensor, slice]


class RowScoredLayer(ShardedLayer):
    """Queries by `_own_scores`, some rows of the batch at a time: `topk` sends the k best of each rank."""

    @abstractmethod
    def _own_scores(self, hidden: Tensor) -> list[Part]:
        """The log-probabilities of this rank's classes (or scores), for hidden states `(n, d)` that all ranks
        hold."""

    def _part_spans(self) -> list[list[slice]]:
        """For each part the columns of every rank."""
        return [self.ranks.spans(self.num_classes)]

    def _class_order(self) -> tuple[Tensor | None, Tensor | None]:
        """The class at each row, and the row of each class; None where they are the same."""
        return None, None

    def _all_scores(self, hidden: Tensor) -> Tensor:  # (n, d) to (n, V)
        parts = zip(self._own_scores(hidden), self._part_spans(), strict=True)
        scores = torch.cat([gathered(own, spans, self.ranks) for (own, _), spans in parts], 1)
        _, rows = self._class_order()
        return scores if rows is None else scores.index_select(1, rows)

    def _some_scores(self, hidden: Tensor, ids: Tensor) -> Tensor:  # (N, d), (N, M) to (N, M)
        _, rows = self._class_order()
        slots = ids if rows is None else rows[ids]
        chunks = zip(self._row_chunks(hidden), self._row_chunks(slots), strict=True)
        return torch.cat([self._scores_at(*chunk) for chunk in chunks])

    def _scores_at(self, hidden: Tensor, slots: Tensor) -> Tensor:  # (n, d), (n, M) to (n, M)
        total: list[Tensor] = []
        for scores, own in self._own_scores(hidden):
            places, here = places_in(own, slots)
            at = scores.sum(1, keepdim=True)  # of no class: 0, through which the gradients of other ranks flow
            if scores.shape[1]:
                at = scores.gather(1, places)
            total.append(torch.where(here, at, 0.0))
        return summed(torch.stack(total).sum(0), self.ranks)

    def _log_prob(self, hidden: Tensor) -> Tensor:
        return self._all_scores(hidden)

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return self._some_scores(hidden, ids)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        order, rows = self._class_order()

        def of_chunk(part: Tensor, selected: Selection | None) -> tuple[Tensor, Tensor]:
            return best_of_ranks(*best_of_own(self._own_scores(part), k, selected), self.ranks)

        with torch.no_grad():
            scores, found = topk_in_chunks(of_chunk, self._row_chunks(hidden), reordered(selection, order, rows))
        return self._differentiable(hidden, scores, found if order is None else order[found])

    @torch.no_grad()
    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        drawn = []
        for part in self._row_chunks(hidden):
            scores, spans = zip(*self._own_scores(part), strict=True)
            slots = [torch.arange(own.start, own.stop, device=part.device) for own in spans]
            drawn.append(sample_of_ranks(torch.cat(scores, 1), torch.cat(slots), num_samples, self.ranks))
        order, _ = self._class_order()
        return torch.cat(drawn) if order is None else order[torch.cat(drawn)]

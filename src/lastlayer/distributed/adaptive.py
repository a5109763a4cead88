"""`AdaptiveSoftmax` with the classes of its head and of its tails divided among ranks."""

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.distributed.collectives import copied, copied_together, summed
from lastlayer.distributed.linear import DividedHead, Scored, divided_scores
from lastlayer.distributed.queries import log_softmax_of_ranks
from lastlayer.distributed.ranks import places_in
from lastlayer.distributed.row_scores import Part, RowScoredLayer
from lastlayer.functional.precision import as_exact
from lastlayer.layers.adaptive import AdaptiveSoftmax
from lastlayer.layers.base import OutputLayer


class ShardedAdaptiveSoftmax(RowScoredLayer, AdaptiveSoftmax):
    """`AdaptiveSoftmax` over all ranks: the head's rows are divided among them, and those of every tail.

    With n_i of the N rows in tail i, of width d_i, a training step sends, by the counts of results: forward `3
    (N + Σ n_i)` numbers and backward `N d + Σ n_i d_i`, by three all-reduces for head and tails together. The
    projections of the tails are on all ranks. Cost of a rank: that of `AdaptiveSoftmax` divided by the ranks, and
    a third more, as the backward pass forms the logits again.
    """

    @staticmethod
    def check(layer: Any) -> None:
        if layer.weight is not None:
            raise ValueError("layer must not have a weight tied to an embedding to be sharded")

    def _is_divided(self, name: str) -> bool:
        return name in ("head.weight", "head.bias") or re.fullmatch(r"tail\.\d+\.1\.weight", name) is not None

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return OutputLayer._loss(self, hidden, targets)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        ranks, tails, head_ids = self._places(targets)
        parts, places = [Scored(self._divided_head(), hidden, head_ids[:, None])], []
        for i, start in enumerate(self.cutoffs):
            at = (tails == i + 1).nonzero().squeeze(1)
            if len(at):
                project, _ = self._tail(i)
                ids = ranks.index_select(0, at) - start
                parts.append(Scored(self._divided_tail(i), project(hidden.index_select(0, at)), ids[:, None]))
                places.append(at)
        own = copied_together([part.hidden for part in parts], self.ranks)
        found = divided_scores([part._replace(hidden=rows) for part, rows in zip(parts, own, strict=True)])
        total = found[0][:, 0]
        for at, inside in zip(places, found[1:], strict=True):
            total = total.index_add(0, at, inside[:, 0])
        return total

    def _divided_head(self) -> DividedHead:
        size = self.cutoffs[0] + len(self.cutoffs)
        return DividedHead(self.head.weight, self.head.bias, None, size, self.ranks)

    def _divided_tail(self, i: int) -> DividedHead:
        size = [*self.cutoffs[1:], self.num_classes][i] - self.cutoffs[i]
        return DividedHead(self._tail(i)[1].weight, None, None, size, self.ranks)

    # Queries, over the rows of the layer: classes by rank.

    def _class_order(self) -> tuple[Tensor | None, Tensor | None]:
        return self.order, self._ranks

    def _part_spans(self) -> list[list[slice]]:
        head, size = self._divided_head(), self.cutoffs[0]
        of_head = [_below(own, size) for own in self.ranks.spans(head.num_classes)]
        return [of_head, *(self.ranks.spans(self._divided_tail(i).num_classes) for i in range(len(self.cutoffs)))]

    def _own_scores(self, hidden: Tensor) -> list[Part]:
        head, ranks = self._divided_head(), self.ranks
        logits = as_exact(F.linear(copied(hidden, ranks), head.weight, head.bias))
        log_prob, own = log_softmax_of_ranks(logits, ranks), _below(head.own, self.cutoffs[0])
        parts = [(log_prob[:, : own.stop - own.start], own)]
        of_tails = copied(self._of_tails(log_prob, head.own), ranks)
        for i, start in enumerate(self.cutoffs):
            project, classes = self._tail(i)
            within = log_softmax_of_ranks(as_exact(classes(copied(project(hidden), ranks))), ranks)
            own = self._divided_tail(i).own
            parts.append((within + of_tails[:, i, None], slice(start + own.start, start + own.stop)))
        return parts

    def _of_tails(self, log_prob: Tensor, own: slice) -> Tensor:  # (n, J)
        """The log-probability of each tail, from the ranks that hold the head's last rows."""
        size, count = self.cutoffs[0], len(self.cutoffs)
        entries = torch.arange(size, size + count, device=log_prob.device)
        places, here = places_in(own, entries)
        at = log_prob.sum(1, keepdim=True)  # of no class: 0, through which the gradients of other ranks flow
        if log_prob.shape[1]:
            at = log_prob[:, places]
        return summed(torch.where(here, at, 0.0), self.ranks)


def _below(rows: slice, size: int) -> slice:
    """Those of some rows that are below `size`."""
    return slice(min(rows.start, size), min(rows.stop, size))

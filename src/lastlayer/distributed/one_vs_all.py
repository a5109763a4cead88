"""`OneVsAll` with its classes divided among ranks."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.distributed.collectives import copied, summed
from lastlayer.distributed.ranks import places_in
from lastlayer.distributed.row_scores import Part, RowScoredLayer
from lastlayer.distributed.sampled import check_sampling, drawn_of_rank, logits_of_rank, no_logits
from lastlayer.functional.precision import as_exact
from lastlayer.functional.sampled_losses import accidental_hits
from lastlayer.layers.one_vs_all import OneVsAll


class ShardedOneVsAll(RowScoredLayer, OneVsAll):
    """`OneVsAll` over all ranks: each adds up the losses of its own classes.

    Of N rows a training step sends, by the counts of results: forward one number ("none", or with a sampler: N)
    and backward N d, the gradient of the hidden states; all by all-reduce. Cost of a rank: that of `OneVsAll`
    divided by the ranks. With a sampler every rank draws the same classes, and computes those of its own.
    """

    DIVIDED = ("weight", "bias", "positive_weights")
    check = staticmethod(check_sampling)

    def _compiles(self) -> bool:
        return False

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits of all classes, on every rank: sends as many numbers as it returns."""
        return self._run("scores", lambda: OneVsAll.scores(self, hidden), hidden=hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        return self._all_scores(hidden)

    def _sample(self, hidden: Tensor, num_samples: int) -> Tensor:
        return OneVsAll._sample(self, hidden, num_samples)

    def _own_scores(self, hidden: Tensor) -> list[Part]:
        scores = as_exact(F.linear(copied(hidden, self.ranks), self.weight))
        return [(scores if self.bias is None else scores + self.bias, self.ranks.span(self.num_classes))]

    def _log_prob(self, hidden: Tensor) -> Tensor:
        return OneVsAll._log_prob(self, hidden)

    def _all_losses(self, rows: Tensor, ids: Tensor, values: Tensor, row_weights: Tensor | None = None) -> Tensor:
        places, here = self._places(ids)
        own = super()._all_losses(copied(rows, self.ranks), places, values * here, row_weights)
        return summed(own, self.ranks)

    def _sampled_losses(self, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        return summed(self._own_sampled_losses(rows, ids, values), self.ranks)

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of this rank, 0 at the classes of others, and which classes are its own."""
        return places_in(self.ranks.span(self.num_classes), ids)

    def _own_sampled_losses(self, rows: Tensor, ids: Tensor, values: Tensor) -> Tensor:  # (N,)
        """Of this rank's classes alone: positive terms, and negatives divided by how often they are expected."""
        drawn = drawn_of_rank(self, rows, ids, values)
        places, here = self._places(ids)
        own_values = values * here
        rows = copied(rows, self.ranks)
        if not len(self.weight):
            return no_logits(rows, self.weight, self.bias, self.sparse)
        of_targets, of_candidates = logits_of_rank(self, rows, places, here, drawn)
        negatives = -F.logsigmoid(-of_candidates) * (-drawn.log_counts).exp().to(values.dtype)
        unused = accidental_hits(ids, values, drawn.ids) | ~drawn.here
        negatives = negatives.masked_fill(unused, 0).sum(1)
        weights = self._positive_weights_at(places, values)
        own = weights * own_values * F.logsigmoid(of_targets) + (1 - own_values) * F.logsigmoid(-of_targets)
        return negatives - torch.where(own_values == 0, 0.0, own).sum(1)

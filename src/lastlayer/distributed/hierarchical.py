"""`HierarchicalSoftmax` with its clusters, and the classes in them, divided among ranks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.distributed.collectives import copied, largest, summed
from lastlayer.distributed.linear import DividedHead, divided_log_prob, divided_score
from lastlayer.distributed.ranks import places_in
from lastlayer.distributed.row_scores import Part, RowScoredLayer
from lastlayer.distributed.sampled import no_logits
from lastlayer.functional.cluster_softmax import cluster_log_prob
from lastlayer.functional.partial_softmax import LEAST
from lastlayer.functional.precision import as_exact
from lastlayer.functional.sampled_logits import sampled_logits
from lastlayer.functional.segments import cluster_sums, row_clusters
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.hierarchical import HierarchicalSoftmax


class Pieces(NamedTuple):
    """The clusters that have rows on this rank: a neighbouring few, of which the first and last may have
    others."""

    own: slice  # the layer's rows of this rank
    clusters: slice  # those that have some of them
    offsets: Tensor  # (P + 1,), where the rows of each begin, among those of this rank


class ShardedHierarchicalSoftmax(RowScoredLayer, HierarchicalSoftmax):
    """`HierarchicalSoftmax` over all ranks: the rows of its classes, cluster after cluster, are divided among
    them, and those of the head.

    A cluster that begins on one rank and ends on another is computed in pieces. Of N rows a training step sends,
    by the counts of results: forward 6 N numbers (peak, mass and target's term of head and cluster), and C with a
    bias, whether the clusters have classes that are not barred; backward N d; all by all-reduce. Cost of a rank:
    that of the layer divided by the ranks, where targets are even; the head forms its logits again in the
    backward pass. Queries compute all classes, and send 3 N C numbers of clusters: their log-probabilities, and
    peaks and masses of the classes in them.
    """

    DIVIDED = ("head_weight", "head_bias", "weight", "bias")

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return OutputLayer._loss(self, hidden, targets)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        clusters, slots = self._clusters.index_select(0, targets), self._slots.index_select(0, targets)
        pieces, barred = self._pieces(), self._barred_clusters()
        hidden = copied(hidden, self.ranks)
        total = divided_score(self._divided_head(barred), hidden, clusters[:, None])[:, 0]
        return total + self._within(pieces, hidden, clusters, slots)

    def _within(self, pieces: Pieces, hidden: Tensor, clusters: Tensor, slots: Tensor) -> Tensor:  # (N,)
        """`log P(class | cluster)`, 0 where all of the cluster is barred.

        A rank that has a piece of the cluster gets its mass from one class in it, the target where it is there:
        with f the logit of that class, the log of the mass is f - `log P(class | piece)`.
        """
        first = self._first_of_piece(pieces, clusters)
        at = (first >= 0).nonzero().squeeze(1)
        target, has_target = places_in(pieces.own, slots[at])
        barred = has_target & self._is_barred(target)
        if len(at):
            rows, place = hidden.index_select(0, at), torch.where(has_target & ~barred, target, first[at])
            own = clusters[at] - pieces.clusters.start, pieces.offsets
            more = {"sparse": self.sparse, "memory": self._memory}
            log_prob = cluster_log_prob(rows, self.weight, self.bias, place, *own, **more)
            # its gradient is sparse: a dense one would be a second one of all classes
            none = place.new_empty(0)
            logits = sampled_logits(rows, self.weight, self.bias, place[:, None], none, sparse=True)[0][:, 0]
        else:  # gradients flow through it all the same, as they do on other ranks
            log_prob = logits = no_logits(hidden[:0], self.weight, self.bias, self.sparse)
        nothing = log_prob.new_zeros(len(slots))
        peak = largest((nothing + LEAST).index_copy(0, at, (logits - log_prob).detach()), self.ranks)[at]
        # A mass of 1 and the log-probability of what no other rank has, exactly; large logits cost it no digits.
        alone = self._has_whole(pieces)[clusters[at] - pieces.clusters.start]
        log_mass = torch.where(alone, 0.0, (logits - peak) - log_prob)
        of_target = torch.where(alone, log_prob, logits - peak)
        of_target = torch.where(has_target, of_target, 0.0).masked_fill(barred, -torch.inf)
        terms = [nothing.index_copy(0, at, term) for term in (log_mass.exp(), of_target)]
        mass, of_target = summed(torch.stack(terms), self.ranks)
        return of_target - mass.masked_fill(mass == 0, 1).log()

    def _first_of_piece(self, pieces: Pieces, clusters: Tensor) -> Tensor:  # (n,) to (n,)
        """The first row of this rank's piece of each cluster that is not barred; -1 where there is none."""
        first, stops = pieces.offsets[:-1], pieces.offsets[1:]
        if self.bias is not None:
            free = F.pad((self.bias.detach() > -torch.inf).nonzero()[:, 0], (0, 1), value=len(self.weight))
            first = free[torch.searchsorted(free, first)]
        of_pieces = F.pad(first.masked_fill(first >= stops, -1), (0, 1), value=-1)
        places, here = places_in(pieces.clusters, clusters)
        return of_pieces[places.masked_fill(~here, -1)]

    def _has_whole(self, pieces: Pieces) -> Tensor:  # (P,) bool
        """Which pieces are whole clusters."""
        sizes = self.offsets.diff()[pieces.clusters]
        return pieces.offsets.diff() == sizes

    def _is_barred(self, places: Tensor) -> Tensor:  # (n,) to (n,)
        if self.bias is None or not len(self.bias):
            return torch.zeros_like(places, dtype=torch.bool)
        return self.bias.detach()[places] == -torch.inf

    def _pieces(self) -> Pieces:
        own = self.ranks.span(self.num_classes)
        held = ((self.offsets[:-1] < own.stop) & (self.offsets[1:] > own.start)).nonzero().squeeze(1)
        clusters = slice(int(held[0]), int(held[-1]) + 1) if len(held) else slice(0, 0)
        offsets = self.offsets[clusters.start : clusters.stop + 1].clamp(own.start, own.stop) - own.start
        return Pieces(own, clusters, offsets)

    def _divided_head(self, barred: Tensor | None) -> DividedHead:
        bias, own = self.head_bias, self.ranks.span(self.num_clusters)
        if barred is not None and bias is not None:
            bias = bias.masked_fill(barred[own], -torch.inf)
        return DividedHead(self.head_weight, bias, None, self.num_clusters, self.ranks)

    def _barred_clusters(self) -> Tensor | None:  # (C,) bool
        if self.bias is None:
            return None
        own = self.ranks.span(self.num_classes)
        barred = F.pad((self.bias.detach() == -torch.inf).cumsum(0), (1, 0))
        counts = barred[self.offsets.clamp(own.start, own.stop) - own.start].diff()
        return summed(counts.int(), self.ranks) == self.offsets.diff()

    # Queries, over the rows of the layer: cluster after cluster.

    def _class_order(self) -> tuple[Tensor | None, Tensor | None]:
        return self.order, self._slots

    def _own_scores(self, hidden: Tensor) -> list[Part]:
        pieces = self._pieces()
        hidden = copied(hidden, self.ranks)
        head = copied(divided_log_prob(self._divided_head(self._barred_clusters()), hidden), self.ranks)
        logits = as_exact(F.linear(hidden, self.weight, self.bias))
        num_pieces = pieces.clusters.stop - pieces.clusters.start
        if not num_pieces:  # no class: the collectives of the others
            peak = log_sum = logits.sum(1, keepdim=True)[:, :0]
        else:
            peak, log_sum = cluster_sums(logits, pieces.offsets)
        log_sum = self._joined(pieces, peak, log_sum)
        shift = head[:, pieces.clusters] - log_sum.masked_fill(log_sum == -torch.inf, 0)
        if not num_pieces:
            return [(logits + shift.sum(1, keepdim=True), pieces.own)]
        own = row_clusters(pieces.offsets, logits.shape[1])
        return [(logits - peak.index_select(1, own) + shift.index_select(1, own), pieces.own)]

    def _joined(self, pieces: Pieces, peak: Tensor, log_sum: Tensor) -> Tensor:  # (n, P) each
        """The log of the mass of whole clusters, relative to the peak of the piece."""
        at, beside = pieces.clusters, (pieces.clusters.start, self.num_clusters - pieces.clusters.stop)
        exists = log_sum.detach() > -torch.inf
        peak = torch.where(exists, peak.detach(), LEAST)
        shift = peak - largest(F.pad(peak, beside, value=LEAST), self.ranks)[:, at]
        mass = torch.where(exists, (log_sum.masked_fill(~exists, 0) + shift).exp(), 0.0)
        total = summed(F.pad(mass, beside), self.ranks)
        joined = copied(total.masked_fill(total == 0, 1).log(), self.ranks)[:, at] - shift
        return torch.where(exists, joined, log_sum)

"""`HierarchicalSoftmax` with its clusters, and the classes in them, divided among ranks."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.distributed.collectives import copied, largest, summed
from lastlayer.distributed.linear import DividedHead, divided_log_prob, divided_score
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
    offsets: Tensor  # (P + 1,), where the rows of each begin on this rank
    split: Tensor  # (B,), the clusters with rows on several ranks, of all ranks


class ShardedHierarchicalSoftmax(RowScoredLayer, HierarchicalSoftmax):
    """`HierarchicalSoftmax` over all ranks: the rows of its classes, cluster after cluster, are divided among
    them, and those of the head.

    A cluster that begins on one rank and ends on another is computed in pieces. Of N rows, n of them with
    targets in such clusters (fewer than there are ranks), a training step sends, by the counts of results:
    forward `4 N + 3 n` numbers, and C with a bias, whether the clusters have classes that are not barred;
    backward N d; all by all-reduce. Cost of a rank: that of the layer divided by the ranks, where targets are
    even; the head forms its logits again in the backward pass. Queries compute all classes, and send the N C
    log-probabilities of clusters.
    """

    DIVIDED = ("head_weight", "head_bias", "weight", "bias")

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return OutputLayer._loss(self, hidden, targets)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        clusters, slots = self._clusters.index_select(0, targets), self._slots.index_select(0, targets)
        pieces, barred = self._pieces(), self._barred_clusters()
        hidden = copied(hidden, self.ranks)
        total = divided_score(self._divided_head(barred), hidden, clusters[:, None])[:, 0]
        split = torch.isin(clusters, pieces.split)
        absent = split.new_zeros(split.shape) if barred is None else barred[clusters]
        return total + self._of_clusters(pieces, hidden, clusters, slots, ~split & ~absent, split & ~absent)

    def _of_clusters(
        self, pieces: Pieces, hidden: Tensor, clusters: Tensor, slots: Tensor, whole: Tensor, split: Tensor
    ) -> Tensor:  # (N,), 0 at other rows
        """`log P(class | cluster)` where one rank has all of the cluster (`whole`), and where several do.

        Of the latter (`split`) each rank computes `log P(reference | piece)` of its piece, in the same pass.
        """
        of_split = split.nonzero().squeeze(1)
        references = self._references(pieces, clusters[of_split])
        used = references >= 0
        at = (whole & (slots >= pieces.own.start) & (slots < pieces.own.stop)).nonzero().squeeze(1)
        rows = torch.cat([at, of_split[used]])
        if len(rows):
            own_slots = torch.cat([slots[at], references[used]])
            log_prob = self._inside(pieces, hidden.index_select(0, rows), clusters[rows], own_slots)
        else:  # gradients flow through it all the same, as they do on other ranks
            log_prob = no_logits(hidden[:0], self.weight, self.bias, self.sparse)
        of_whole, of_references = log_prob.split([len(at), len(rows) - len(at)])
        found = summed(log_prob.new_zeros(len(hidden)).index_copy(0, at, of_whole), self.ranks)
        if not len(of_split):
            return found
        joined = self._split_clusters(pieces, hidden[of_split], slots[of_split], references, of_references)
        return found.index_copy(0, of_split, joined)

    def _split_clusters(
        self, pieces: Pieces, hidden: Tensor, slots: Tensor, references: Tensor, log_prob: Tensor
    ) -> Tensor:  # (n,)
        """`log P(class | cluster)` of clusters in pieces. One class of each piece, of the largest bias, is the
        reference of its mass: with f its logit, the log of the mass is f - `log P(reference | piece)`.
        """
        at = (references >= 0).nonzero().squeeze(1)
        nothing = log_prob.new_full(slots.shape, LEAST)
        peak, log_mass, target = nothing, nothing.index_copy(0, at, log_prob), torch.zeros_like(nothing)
        has_target = (slots >= pieces.own.start) & (slots < pieces.own.stop)
        if len(at):
            reference = references[at]
            places = torch.stack([reference, torch.where(has_target[at], slots[at], reference)], 1)
            logits = self._logits_at(hidden.index_select(0, at), places - pieces.own.start)
            peak = peak.index_copy(0, at, logits[:, 0].detach())
            relative = logits - logits[:, :1].detach()
            log_mass = log_mass.index_copy(0, at, relative[:, 0] - log_prob)
            target = target.index_copy(0, at, relative[:, 1])
        whole = largest(peak, self.ranks)
        shift = peak - whole
        parts = [(log_mass + shift).exp(), torch.where(has_target, target + shift, 0.0)]
        mass, at_target = summed(torch.stack(parts), self.ranks)
        return at_target - mass.log()

    def _logits_at(self, hidden: Tensor, places: Tensor) -> Tensor:  # (n, M)
        """Logits of a few of this rank's classes: a dense gradient would be a second one of all of them."""
        return sampled_logits(hidden, self.weight, self.bias, places, places.new_empty(0), sparse=True)[0]

    def _inside(self, pieces: Pieces, hidden: Tensor, clusters: Tensor, slots: Tensor) -> Tensor:  # (n,)
        """`log P(class | piece)` of rows of this rank."""
        return cluster_log_prob(
            hidden,
            self.weight,
            self.bias,
            slots - pieces.own.start,
            clusters - pieces.clusters.start,
            pieces.offsets,
            sparse=self.sparse,
            memory=self._memory,
        )

    def _references(self, pieces: Pieces, clusters: Tensor) -> Tensor:  # (n,) to (n,)
        """The row of the class with the largest bias in this rank's piece of each cluster; -1 where there is none,
        or all are barred."""
        starts, stops = pieces.offsets[:-1].tolist(), pieces.offsets[1:].tolist()
        bias = None if self.bias is None else self.bias.detach()
        found = []
        for start, stop in zip(starts, stops, strict=True):
            best = start if bias is None else start + int(bias[start:stop].argmax())
            found.append(-1 if bias is not None and bias[best] == -torch.inf else best + pieces.own.start)
        of_pieces = torch.tensor([*found, -1], dtype=torch.int64, device=pieces.offsets.device)
        here = (clusters >= pieces.clusters.start) & (clusters < pieces.clusters.stop)
        return of_pieces[torch.where(here, clusters - pieces.clusters.start, len(found))]

    def _pieces(self) -> Pieces:
        own = self.ranks.span(self.num_classes)
        starts, stops = self.offsets[:-1], self.offsets[1:]
        held = ((starts < own.stop) & (stops > own.start)).nonzero().squeeze(1)
        clusters = slice(int(held[0]), int(held[-1]) + 1) if len(held) else slice(0, 0)
        offsets = self.offsets[clusters.start : clusters.stop + 1].clamp(own.start, own.stop) - own.start
        edges = self.offsets.new_tensor([span.start for span in self.ranks.spans(self.num_classes)[1:]])
        split = ((starts[:, None] < edges) & (edges < stops[:, None])).any(1)
        return Pieces(own, clusters, offsets, split.nonzero().squeeze(1))

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
        if not len(pieces.split):
            return log_sum
        columns = pieces.split - pieces.clusters.start  # of the split clusters, among the pieces
        here = (columns >= 0) & (columns < log_sum.shape[1])
        own = columns[here]
        nothing = peak.detach().new_full((len(peak), len(columns)), LEAST)
        mine = log_sum[:, own]
        exists = mine.detach() > -torch.inf
        peaks = nothing.index_copy(1, here.nonzero()[:, 0], torch.where(exists, peak[:, own].detach(), LEAST))
        whole = largest(peaks, self.ranks)
        shift = (peaks - whole)[:, here]
        mass = torch.where(exists, (mine.masked_fill(~exists, 0) + shift).exp(), 0.0)
        total = summed(torch.zeros_like(nothing).index_copy(1, here.nonzero()[:, 0], mass), self.ranks)
        joined = copied(total.masked_fill(total == 0, 1).log(), self.ranks)[:, here] - shift
        return log_sum.index_copy(1, own, torch.where(exists, joined, mine))

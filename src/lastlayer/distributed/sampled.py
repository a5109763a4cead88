"""`SampledSoftmax` with its classes divided among ranks: each computes the samples that it owns."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.distributed.collectives import copied, largest, same_random_numbers, summed
from lastlayer.distributed.full import ShardedSoftmaxHead
from lastlayer.distributed.ranks import places_in
from lastlayer.functional.partial_softmax import LEAST
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.sampled_logits import sampled_logits
from lastlayer.functional.sampled_losses import accidental_hits
from lastlayer.layers.sampled.base import Batch
from lastlayer.layers.sampled.sampled_softmax import SampledSoftmax


class DrawnClasses(NamedTuple):
    """The candidates of a batch, of which this rank has some."""

    ids: Tensor  # (S,), those of this rank; or (N, S), all of them
    places: Tensor  # the same shape: their rows of this rank's weight, 0 for those of others
    here: Tensor  # the same shape, bool: whether this rank has them
    log_counts: Tensor  # the same shape


def check_sampling(layer: Any) -> None:
    """ValueError for what needs more than this rank's rows."""
    if layer.sampler is not None and layer.sampler.follows_weight:
        raise ValueError(
            f"layer must have a sampler that does not follow the weight to be sharded, such as LogUniform; got "
            f"{type(layer.sampler).__name__}, which needs all rows"
        )


def drawn_of_rank(layer: Any, rows: Tensor, ids: Tensor, weights: Tensor) -> DrawnClasses:
    """The candidates of `OneVsAll` or `SampledSoftmax` for a batch, the same on all ranks."""
    with same_random_numbers(layer.ranks, rows.device):
        candidates, log_counts = layer._draw(rows, ids, weights)
    places, here = places_in(layer.ranks.span(layer.num_classes), candidates)
    drawn = DrawnClasses(candidates, places, here, log_counts)
    return DrawnClasses(*(part[here] for part in drawn)) if candidates.dim() == 1 else drawn


def logits_of_rank(
    layer: Any,
    rows: Tensor,  # (N, d)
    places: Tensor,  # (N, K), rows of this rank's weight
    here: Tensor,  # (N, K), bool: whether this rank has the target
    drawn: DrawnClasses,
) -> tuple[Tensor, ...]:  # (N, K), (N, S)
    """The logits of targets and candidates; any number where another rank has the class.

    With row-sparse gradients those places take a row that is touched all the same, so that no other row is.
    """
    candidates, some = drawn.places, len(layer.weight) > 0
    if layer.sparse:
        touched = torch.cat([places[here], candidates[drawn.here]])[:1]
        some = len(touched) > 0
        if some:
            places, candidates = torch.where(here, places, touched), torch.where(drawn.here, candidates, touched)
    if some:
        return sampled_logits(rows, layer.weight, layer.bias, places, candidates, sparse=layer.sparse)
    zero = no_logits(rows, layer.weight, layer.bias, layer.sparse)[:, None]
    return zero.expand(places.shape), zero.expand(-1, candidates.shape[-1])


def no_logits(rows: Tensor, weight: Tensor, bias: Tensor | None, sparse: bool) -> Tensor:  # (N,)
    """Zeros that gradients of 0 flow through, to all that logits depend on, as on ranks that have some classes."""
    none = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    return sampled_logits(rows, weight, bias, none, none.new_empty(0), sparse=sparse)[0].sum(1)


class ShardedSampledSoftmax(ShardedSoftmaxHead, SampledSoftmax):
    """`SampledSoftmax` over all ranks: every rank draws the same classes, and computes those of its own.

    Of N rows a training step sends, by the counts of results: forward 3 N numbers (peak, mass and the targets'
    terms; 4 N with class weights, and N more for their mean) and backward N d, by all-reduce; and the state of
    the first rank's random numbers, some kB. Cost of a rank: `6 N (K + S) d / ranks` operations on average.
    """

    check = staticmethod(check_sampling)

    def _compiles(self) -> bool:
        return False

    def _class_weights_of(self, ids: Tensor) -> Tensor:
        places, here = self._head().places(ids)
        own = self.class_weights
        assert own is not None
        return summed(own[places] * here if len(own) else own.new_zeros(ids.shape), self.ranks)

    def _sampled_row_loss(self, rows: Tensor, ids: Tensor, weights: Tensor, examples: Tensor | None) -> Tensor:
        """With o the logits less the log counts, P the peak of the logits, M the mass of `exp(o - P)` and w the
        weights of the targets, `Σ_k w_k log M - Σ_k w_k (o_k - P)`."""
        batch, present = self._batch_of_rank(rows, ids, weights)
        logits = torch.cat([batch.target_logits.masked_fill(~present, -torch.inf), batch.candidate_logits], 1)
        least = logits.new_full((len(logits), 1), LEAST)
        peak = largest(torch.cat([logits.detach(), least], 1).amax(1, keepdim=True), self.ranks)
        of_targets, of_candidates = batch.target_logits - peak, batch.candidate_logits - peak
        if self.correction == "all":
            of_targets = of_targets - self._target_log_counts(batch)
        if self.correction != "none":
            of_candidates = of_candidates - batch.candidate_log_counts
        mass = torch.cat([of_targets.masked_fill(~present, -torch.inf), of_candidates], 1).exp().sum(1)
        own = batch.loss_weights
        parts = [mass, torch.where(own == 0, 0.0, own * of_targets).sum(1)]
        if self.class_weights is not None:
            parts.append(own.sum(1))
        sums = summed(torch.stack(parts), self.ranks)
        whole = batch.target_weights.sum(1) if self.class_weights is None else sums[2]
        return whole * sums[0].log() - sums[1]

    def _batch_of_rank(self, rows: Tensor, ids: Tensor, weights: Tensor) -> tuple[Batch, Tensor]:
        """The logits of this rank's classes, and which targets are of this rank."""
        drawn = drawn_of_rank(self, rows, ids, weights)
        places, here = self._head().places(ids)
        weights = weights.to(exact_dtype(rows.dtype))
        own_weights = weights * here
        rows = copied(rows, self.ranks)
        of_targets, of_candidates = logits_of_rank(self, rows, places, here, drawn)
        if self.class_weights is not None and len(self.weight):
            own_weights = own_weights * self.class_weights[places].to(weights.dtype)
        unused = ~drawn.here
        if self.remove_hits:
            unused = unused | accidental_hits(ids, weights, drawn.ids)
        batch = Batch(
            rows, ids, weights, drawn.log_counts.to(of_targets.dtype), of_targets,
            of_candidates.masked_fill(unused.expand_as(of_candidates), -torch.inf), own_weights, 1.0,
        )  # fmt: skip
        return batch, here & (weights != 0)

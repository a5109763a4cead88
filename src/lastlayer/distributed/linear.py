"""A softmax over the logits of one matrix whose rows, the classes, are divided among the ranks.

Every rank holds all hidden states and has the results of all rows. With P the largest logit of all ranks and m_r
the mass of a rank relative to it, the log-normaliser is `P + log Σ_r m_r`: of N rows, N numbers are sent for P
(a maximum) and N for the masses, with what the ranks know of the targets (a sum). Backward, the gradient of the
hidden states is a sum over the ranks: N d numbers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.distributed.collectives import gathered, largest, summed, summed_together
from lastlayer.distributed.queries import best_of_ranks, sample_of_ranks, selection_of
from lastlayer.distributed.ranks import Ranks, places_in
from lastlayer.functional.linear_chunks import mapped_logits
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.partial_softmax import PartialSoftmax, best_of_part, mapped, partial_softmax
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.selection import Selection
from lastlayer.functional.soft_targets import TargetRows

# The most logits that a rank holds at once, as a share of all N V, but where a part of a chunk is more.
MOST_LOGITS = 1 / 32


def least_chunks(ranks: Ranks) -> int:
    """Into how many chunks a rank's own logits are divided at least."""
    return math.ceil(1 / (MOST_LOGITS * ranks.size))


class DividedHead(NamedTuple):
    """This rank's rows of a linear head.

    The functions below take hidden states that are `copied`, so that their gradient is that of all ranks.
    """

    weight: Tensor  # (W, d)
    bias: Tensor | None  # (W,)
    logit_map: LogitMap | None
    num_classes: int  # V, of all ranks
    ranks: Ranks

    @property
    def own(self) -> slice:
        """The classes of this rank."""
        return self.ranks.span(self.num_classes)

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For class ids their rows here (0 where another rank has them), and whether this rank has them."""
        return places_in(self.own, ids)

    def partial(self, hidden: Tensor, rows: Tensor, weights: Tensor | None = None) -> PartialSoftmax:
        """`partial_softmax` of this rank's classes."""
        return partial_softmax(
            hidden,
            self.weight,
            self.bias,
            rows,
            logit_map=self.logit_map,
            weights=weights,
            least_chunks=least_chunks(self.ranks),
        )


class Scored(NamedTuple):
    """Hidden states, and some classes of each, by one of several heads over the same ranks."""

    head: DividedHead
    hidden: Tensor  # (n, d)
    ids: Tensor  # (n, M), valid classes


def divided_score(
    head: DividedHead,
    hidden: Tensor,  # (N, d)
    ids: Tensor,  # (N, M), valid classes
) -> Tensor:  # (N, M)
    """`log_prob.gather(1, ids)` over all ranks; `N (2 + M)` numbers are sent forward, N d backward."""
    return divided_scores([Scored(head, hidden, ids)])[0]


def divided_scores(parts: Sequence[Scored]) -> list[Tensor]:  # (n, M) each
    """`divided_score` of each, with one maximum and one sum over the ranks for all of them."""
    ranks = parts[0].head.ranks
    places = [part.head.places(part.ids) for part in parts]
    terms = [part.head.partial(part.hidden, rows) for part, (rows, _) in zip(parts, places, strict=True)]
    peaks = largest(torch.cat([term.peak for term in terms]), ranks).split([len(part.ids) for part in parts])
    own = []
    for term, peak, (_, here) in zip(terms, peaks, places, strict=True):
        shift = (term.peak - peak)[:, None]
        mass = (term.log_mass[:, None] + shift).exp()
        own.append(torch.cat([mass, torch.where(here, term.at + shift, 0.0)], 1))
    return [total[:, 1:] - total[:, :1].log() for total in summed_together(own, ranks)]


def divided_cross_entropy(
    head: DividedHead,
    hidden: Tensor,  # (N, d)
    target: TargetRows,  # N rows
    *,
    label_smoothing: float,
    z_loss: float,
    class_weights: Tensor | None,  # (W,), this rank's
    reduction: str,
) -> Tensor:  # (), or (N,) for "none"
    """`linear_cross_entropy` over all ranks, with the label smoothing of all V classes.

    With weights w of the targets, u of the classes, s the smoothing and M the mass relative to the peak P, a row's
    loss is

        a log M - l + z (P + log M)²     a = (1 - s) Σ_k w_k u_k + s / V Σ_c u_c
                                         l = (1 - s) Σ_k w_k u_k (f_k - P) + s / V Σ_c u_c (f_c - P)

    of which each rank forms the terms of its own classes. Forward 3 N numbers are sent, with class weights 5 N.
    """
    smoothing, exact = label_smoothing, exact_dtype(hidden.dtype)
    ids, target_weights, kept, dense = target
    counted = torch.ones(len(ids), dtype=exact, device=ids.device) if kept is None else kept.to(exact)
    if target_weights is None:
        ids, of_targets = ids.masked_fill(counted == 0, 0)[:, None], counted[:, None]
    else:
        of_targets = target_weights.to(exact) * counted[:, None]
    u = hidden.new_ones(len(head.weight), dtype=exact) if class_weights is None else class_weights.to(exact)

    # the weights of this rank's classes: `hard` at the targets, `of_all` at all
    rows, here = head.places(ids)
    hard = of_targets * here
    if len(u):
        hard = hard * u[rows]
    even = smoothing / head.num_classes
    of_all = u if smoothing else None
    of_dense = None
    if dense is not None:
        of_dense = dense.to(exact)[:, head.own] * u * counted[:, None]
        of_all = (1 - smoothing) * of_dense + even * u
    scale = counted * even if dense is None else counted
    terms = head.partial(hidden, rows, of_all)
    peak = largest(terms.peak, head.ranks)
    shift = terms.peak - peak

    # of each row: mass, l, Σ w u and, once, Σ u, of this rank's classes
    given = hard.sum(1) if of_dense is None else of_dense.sum(1)
    every = even * u.sum() * counted
    at = torch.where(hard == 0, 0.0, terms.at)
    linear = (
        (1 - smoothing) * (hard * at).sum(1) + scale * terms.weighted + ((1 - smoothing) * given + every) * shift
    )
    parts = [(terms.log_mass + shift).exp(), linear]
    if class_weights is not None:
        parts += [given, every]
    sums = summed(torch.stack(parts), head.ranks)
    if class_weights is None:
        given = of_targets.sum(1) if dense is None else (dense.to(exact) * counted[:, None]).sum(1)
        every = smoothing * counted
    else:
        given, every = sums[2], sums[3]
    log_mass, linear = sums[0].log(), sums[1]
    loss = ((1 - smoothing) * given + every) * log_mass - linear
    square = z_loss * counted * (peak + log_mass).square() if z_loss else None
    return _reduced(
        loss, square, given if target_weights is None and dense is None else counted, counted, reduction
    )


def _reduced(loss: Tensor, square: Tensor | None, share: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """A mean is over `share`, and that of the squares over the rows; nan over nothing."""
    if reduction != "mean":
        loss = loss if square is None else loss + square
        return loss if reduction == "none" else loss.sum()
    whole = share.sum()
    mean = loss.sum() * whole.reciprocal().nan_to_num(posinf=0.0) + (whole / whole - 1)
    return mean if square is None else mean + square.sum() / counted.sum().clamp(min=1)


def divided_log_prob(head: DividedHead, hidden: Tensor) -> Tensor:  # (N, d) to (N, V)
    """All log-probabilities, on every rank: the one call that sends N V numbers, as many as it returns."""
    own = mapped_logits(hidden, head.weight, head.bias, head.logit_map)
    return gathered(own, head.ranks.spans(head.num_classes), head.ranks).log_softmax(-1)


@torch.no_grad()
def divided_topk(
    head: DividedHead,
    hidden: Tensor,  # (N, d)
    k: int,
    selection: Selection | None,
) -> tuple[Tensor, Tensor]:  # (N, k) each
    """The best k of all ranks' k best, by their raw logits; `2 N k` numbers of each rank are sent, and 2 N."""
    own, ranks = head.own, head.ranks
    selected = selection_of(selection, own)
    found = best_of_part(
        hidden,
        head.weight,
        head.bias,
        k,
        logit_map=head.logit_map,
        selection=selected,
        least_chunks=least_chunks(ranks),
    )
    peak = largest(found.peak, ranks)
    log_mass = summed((found.log_mass + found.peak - peak).exp(), ranks).log()
    best, ids = best_of_ranks(found.logits, found.ids + own.start, ranks)
    return mapped(best, head.logit_map) - peak[:, None] - log_mass[:, None], ids


def divided_sample(head: DividedHead, hidden: Tensor, num_samples: int) -> Tensor:  # (N, d) to (N, num_samples)
    """Classes drawn over all ranks; see `sample_of_ranks`."""
    logits = mapped_logits(hidden, head.weight, head.bias, head.logit_map)
    classes = torch.arange(head.own.start, head.own.stop, device=logits.device)
    return sample_of_ranks(logits, classes, num_samples, head.ranks)

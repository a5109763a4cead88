"""The best classes of all ranks, draws from all, and a softmax over all, from what each rank has of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lastlayer.distributed.collectives import copied, from_first, gathered_alike, largest, summed
from lastlayer.distributed.ranks import Ranks
from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.partial_softmax import LEAST
from lastlayer.functional.sampling import classes_at, cumulative_weights, intervals_at, uniform_doubles
from lastlayer.functional.selection import Selection


def selection_of(selection: Selection | None, own: slice) -> Selection | None:
    """The selection among neighbouring classes."""
    if selection is None:
        return None
    exclude, barred = selection
    if exclude is not None:
        here = (exclude >= own.start) & (exclude < own.stop)
        exclude = torch.where(here, exclude - own.start, own.stop - own.start)
    return Selection(exclude, None if barred is None else barred[own])


def reordered(
    selection: Selection | None,
    order: Tensor | None,  # (V,), the class at each row; None: classes are rows
    rows: Tensor | None,  # (V,), the row of each class
) -> Selection | None:
    """The selection in terms of a layer's rows, in place of classes."""
    if selection is None or order is None or rows is None:
        return selection
    exclude, barred = selection
    if exclude is not None:
        exclude = torch.cat([rows, rows.new_tensor([len(rows)])])[exclude]
    return Selection(exclude, None if barred is None else barred[order])


def best_of_own(
    parts: Sequence[tuple[Tensor, slice]],  # scores (n, w) of neighbouring rows of the layer, and which these are
    k: int,
    selection: Selection | None,  # of the layer's rows
) -> tuple[Tensor, Tensor]:  # (n, k) each
    """The best of this rank's scores, in no order; -inf where there are fewer than k."""
    scores, rows = [], []
    for values, own in parts:
        selected = selection_of(selection, own)
        found = (values if selected is None else selected.bar(values)).topk(min(k, values.shape[1]))
        scores.append(found.values)
        rows.append(found.indices + own.start)
    missing = max(0, k - sum(part.shape[1] for part in scores))
    if missing:
        scores.append(scores[0].new_full((len(scores[0]), missing), -torch.inf))
        rows.append(rows[0].new_zeros(len(rows[0]), missing))
    best, order = torch.cat(scores, 1).topk(k)
    return best, torch.cat(rows, 1).gather(1, order)


@torch.no_grad()
def best_of_ranks(
    best: Tensor,  # (n, k), of this rank
    rows: Tensor,  # (n, k)
    ranks: Ranks,
) -> tuple[Tensor, Tensor]:  # (n, k) each, falling
    """The best k of all ranks' k best; `2 n k` numbers of each rank are sent."""
    scores = torch.cat(gathered_alike(best, ranks), 1)
    found, order = scores.topk(best.shape[1])
    return found, torch.cat(gathered_alike(rows, ranks), 1).gather(1, order)


def log_softmax_of_ranks(logits: Tensor, ranks: Ranks) -> Tensor:  # (n, W)
    """Of this rank's logits, the log-softmax over those of all ranks; 2 n numbers are sent, backward n."""
    peak = largest(_peak(logits), ranks)
    shifted = logits - peak
    mass = summed(shifted.exp().sum(1, keepdim=True), ranks)
    return shifted - copied(mass.log(), ranks)


def _peak(logits: Tensor) -> Tensor:  # (n, W) to (n, 1), also of no logits at all
    least = logits.new_full((len(logits), 1), LEAST)
    return torch.cat([logits.detach(), least], 1).amax(1, keepdim=True)


@torch.no_grad()
def sample_of_ranks(
    logits: Tensor,  # (n, W), of this rank's classes
    classes: Tensor,  # (W,)
    num_samples: int,
    ranks: Ranks,
) -> Tensor:  # (n, num_samples)
    """`sample_classes` over all ranks: with the first rank's random numbers, what one process draws with them.

    n numbers for a peak, n masses of each rank and `2 n num_samples` numbers are sent.
    """
    if not len(logits):
        return torch.empty(0, num_samples, dtype=torch.int64, device=logits.device)
    peak = largest(_peak(logits), ranks)
    some = bool(logits.shape[1])
    ends = cumulative_weights(logits, peak) if some else logits.new_zeros(len(logits), 1, dtype=torch.float64)
    mass = ends[:, -1:]
    masses = torch.cat(gathered_alike(mass, ranks), 1).cumsum(1)  # (n, R)
    total = masses[:, -1:]
    if eager_on_cpu(total) and not bool((total.isfinite() & (total > 0)).all()):
        raise ValueError("hidden must give finite logits to be sampled from; some row has NaN or infinite ones")
    uniform = uniform_doubles((len(logits), num_samples), logits.device)
    rank, place = intervals_at(masses, from_first(uniform, ranks) * total)
    drawn = torch.zeros_like(rank)
    if some:
        inside = classes_at(logits, peak, ends, torch.minimum(place, mass)).clamp(max=len(classes) - 1)
        drawn = torch.where(rank == ranks.rank, classes[inside], 0)  # of another rank's places any class
    return summed(drawn, ranks)

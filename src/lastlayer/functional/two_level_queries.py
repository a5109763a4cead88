"""The best classes of a two-level softmax, and samples from it: most of the clusters are not opened."""

from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.best_classes import LARGEST_SHARE, gathered_scores, merge
from lastlayer.functional.cluster_softmax import group_by_cluster
from lastlayer.functional.sampling import sample_classes
from lastlayer.functional.selection import Selection


def topk_two_level(
    hidden: Tensor,  # (N, d)
    head: Tensor,  # (N, C), log-probabilities of the clusters
    weight: Tensor,  # (V, d), cluster after cluster
    bias: Tensor | None,  # (V,), likewise
    offsets: Tensor,  # (C + 1,): cluster c holds the weight rows from offsets[c] up to offsets[c + 1]
    order: Tensor,  # (V,), the class of each weight row
    k: int,
    selection: Selection | None,
) -> tuple[Tensor, Tensor, Tensor]:  # log-probabilities and classes, (N, k) each, best first; rows given up
    """The k most probable classes, exactly: no class is more probable than its cluster.

    Each row opens its clusters by falling probability, about as many classes at first as there are clusters, then
    four times as many, and stops when no other cluster is more probable than its k-th best class so far. A row
    is given up when the clusters that are more probable hold, together, more than a sixteenth of all classes: the
    indices of those rows are returned, `(n,)`, and their entries of the other results are not valid. So no row
    visits more classes than `C` and an eighth of all, and nearly always far fewer. All rows are searched together.
    """
    num_classes, num_clusters = len(order), len(offsets) - 1
    if selection is not None and selection.barred is not None:  # clusters that hold no permitted class
        permitted = torch.nn.functional.pad((~selection.barred[order]).cumsum(0), (1, 0))[offsets].diff()
        head = head.masked_fill(permitted == 0, -torch.inf)
    bounds, clusters = head.sort(dim=1, descending=True)
    sizes = offsets.diff()[clusters]
    starts = sizes.cumsum(1) - sizes
    mask = None if selection is None else selection.mask(num_classes)
    best, classes = head.new_full((len(head), k), -torch.inf), order.new_zeros(len(head), k)
    active, given_up = torch.arange(len(head), device=head.device), [bounds[:, 0].isnan().nonzero()[:, 0]]
    opened, limit, most = 0, max(num_clusters, k), num_clusters + LARGEST_SHARE * num_classes
    while True:
        begin, bound, size = starts[active], bounds[active], sizes[active]
        wanted = (begin >= opened) & (bound > best[active, -1:])
        now = wanted & (begin < limit)
        cost = torch.where(wanted if opened else now, size, 0).sum(1)
        going = (cost > 0) & (cost <= most)
        given_up.append(active[cost > most])
        active, now, bound = active[going], now[going], bound[going]
        if not len(active):
            return best, classes, torch.cat(given_up)
        at, column = now.nonzero(as_tuple=True)
        own = mask if mask is None or len(mask) == 1 else mask[active]
        pairs = at, clusters[active[at], column], bound[at, column]
        found = _open(hidden[active], *pairs, weight, bias, offsets, order, own)
        best[active], classes[active] = merge((best[active], classes[active]), found)
        opened, limit, most = limit, 4 * limit, LARGEST_SHARE * num_classes


def _open(
    hidden: Tensor,  # (n, d)
    at: Tensor,  # (P,), the row of each pair of row and cluster, rising
    clusters: Tensor,  # (P,)
    bounds: Tensor,  # (P,), the cluster's log-probability
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    order: Tensor,
    mask: Tensor | None,  # (n, V) or (1, V), bool: classes that must not be returned
) -> tuple[Tensor, Tensor]:  # (n, w) each, -inf in unused places
    """Log-probabilities of all classes of some clusters of each row, side by side, and the classes."""
    begin, sizes = offsets[clusters], offsets.diff()[clusters]
    ends = sizes.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    pair = torch.repeat_interleave(sizes, output_size=total)  # of each class that is opened, (T,)
    of_row = sizes.new_zeros(len(hidden)).index_add_(0, at, sizes)
    width = int(of_row.max())
    running = torch.arange(total, device=at.device)
    place = running + (at * width - (of_row.cumsum(0) - of_row)[at])[pair]
    slot = running + (begin - (ends - sizes))[pair]
    slots = slot.new_zeros(len(hidden) * width).index_copy_(0, place, slot).view(len(hidden), width)
    logits = gathered_scores(hidden, weight, slots).flatten()[place]
    if bias is not None:
        logits = logits + bias[slot]
    peak = logits.new_full((len(at),), -torch.inf).scatter_reduce_(0, pair, logits, "amax")
    shifted = logits - peak[pair]
    log_sums = logits.new_zeros(len(at)).index_add_(0, pair, shifted.exp()).log_()
    values = shifted + (bounds - log_sums)[pair]
    opened = order[slot]
    if mask is not None:
        values = values.masked_fill(mask.expand(len(hidden), -1)[at[pair], opened], -torch.inf)
    log_prob = values.new_full((len(hidden) * width,), -torch.inf).index_copy_(0, place, values)
    return log_prob.view(len(hidden), width), order[slots]


def sample_two_level(
    head: Tensor,  # (N, C), log-probabilities of the clusters
    offsets: Tensor,  # (C + 1,)
    inner: Callable[
        [Tensor, int, int], Tensor
    ],  # rows (n,), first class and size of a cluster to logits (n, size)
    num_samples: int,
) -> Tensor:  # (N, num_samples), slots
    """A cluster for each sample, then a class within it; every (row, cluster) pair is opened once."""
    num_rows = len(head)
    if not num_rows:
        return offsets.new_empty(0, num_samples)
    clusters = sample_classes(head, num_samples)
    of_draw = torch.arange(num_rows, device=clusters.device).repeat_interleave(num_samples)
    pairs, draws = (clusters.reshape(-1) * num_rows + of_draw).sort(stable=True)
    pairs, counts = pairs.unique_consecutive(return_counts=True)
    slots = torch.empty_like(draws)
    place = 0
    for own, start, size in group_by_cluster(pairs // num_rows, offsets).each():
        wanted = counts[own]
        most, total = int(wanted.max()), int(wanted.sum())
        drawn = sample_classes(inner(pairs[own] % num_rows, start, size), most)
        used = torch.arange(most, device=drawn.device) < wanted[:, None]
        slots[draws[place : place + total]] = drawn[used] + start
        place += total
    return slots.reshape(num_rows, num_samples)

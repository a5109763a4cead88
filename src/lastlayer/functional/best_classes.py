"""The best classes found so far, and what every search for them shares."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.precision import as_exact

# Numbers of a gathered (rows, classes, d) that are held at once.
CHUNK_NUMBERS = 1 << 18
# A search gives up, for all log-probabilities of a row, where it would have to look at a larger share of the
# classes than this: rows of a weight that are gathered cost several times those that are read in turn.
LARGEST_SHARE = 1 / 16
# What all log-probabilities of a row cost for each class beside its d multiply-adds, in multiply-adds.
PER_CLASS = 64
# How many times as much a class costs that is looked at by itself.
GATHERED = 24


class SearchCost(NamedTuple):
    """What a search costs at least."""

    fixed: (
        int  # calls of PyTorch's operations, whatever the rows: as many multiply-adds of a product in their time
    )
    classes: int  # that each row looks at


def worth_searching(cost: SearchCost, num_rows: int, num_classes: int, width: int, k: int) -> bool:
    """Whether a search for the best k classes is at least no more than half as dear as all log-probabilities.

    Then one that gives up costs little beside the log-probabilities that follow it.
    """
    of_class = num_rows * (width + PER_CLASS)
    least = cost.fixed + GATHERED * of_class * cost.classes
    return k <= LARGEST_SHARE * num_classes and 2 * least <= of_class * num_classes


def gathered_scores(
    hidden: Tensor,  # (n, d)
    weight: Tensor,  # (V, d)
    places: Tensor,  # (n, w), rows of the weight
) -> Tensor:  # (n, w), float32 at least
    """`hidden[i] . weight[places[i, j]]`, some columns at a time."""
    num_rows, width = hidden.shape
    rows = as_exact(hidden)[:, None]
    parts = [
        (as_exact(weight.index_select(0, part.reshape(-1))).view(num_rows, -1, width) * rows).sum(2)
        for part in places.split(max(1, CHUNK_NUMBERS // max(1, num_rows * width)), 1)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def merge(
    best: tuple[Tensor, Tensor],  # log-probabilities, falling, and classes, (n, k) each
    more: tuple[Tensor, Tensor],  # further ones, in any order, (n, w) each
) -> tuple[Tensor, Tensor]:  # (n, k) each
    """The best of both, classes that are absent with -inf."""
    values, order = torch.cat([best[0], more[0]], 1).topk(best[0].shape[1])
    return values, torch.cat([best[1], more[1]], 1).gather(1, order)

"""The best classes found so far, and what every search for them shares."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.precision import as_exact

# Numbers of a gathered (rows, classes, d) that are held at once.
CHUNK_NUMBERS = 1 << 18
# A search gives a row up (all its log-probabilities are then computed) where it would have to visit a larger share
# of the classes than this: gathering rows of a weight costs several times as much as reading them in order.
LARGEST_SHARE = 1 / 16
# Cost of all log-probabilities of a row, for each class, in addition to its d multiply-adds, in multiply-adds.
PER_CLASS = 64
# How many times as much a class costs that is gathered on its own.
GATHERED = 24


class SearchCost(NamedTuple):
    """A lower bound on the cost of a search."""

    fixed: (
        int  # calls of PyTorch's operations, whatever the rows: as many multiply-adds of a product in their time
    )
    classes: int  # that each row visits


def worth_searching(cost: SearchCost, num_rows: int, num_classes: int, width: int, k: int) -> bool:
    """Whether a search for the best k classes costs, by its lower bound, at most half of all log-probabilities.

    Then a search that gives up adds little to the cost of the log-probabilities that follow it.
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

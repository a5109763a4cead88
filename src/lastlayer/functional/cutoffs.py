"""Where to cut classes sorted by frequency into a head and tails: the cost model of Grave et al., and its
optimum."""

import math
import operator
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lastlayer.functional.clusters import check_counts
from lastlayer.functional.linear_cross_entropy import linear_nll

GRID = 150  # cut-offs that are tried, evenly spaced in the logarithm


def check_cutoffs(cutoffs: Sequence[int], num_classes: int) -> list[int]:
    """`cutoffs` as a list, or an error unless they rise strictly within 1 to V - 1."""
    try:
        numbers = [operator.index(cutoff) for cutoff in cutoffs]
    except TypeError:
        raise TypeError(f"cutoffs must be a sequence of whole numbers, got {cutoffs!r}") from None
    edges = [0, *numbers, num_classes]
    if not numbers or any(low >= high for low, high in pairwise(edges)):
        raise ValueError(
            f"cutoffs must be one or more class numbers that rise strictly from 1 to num_classes - 1 = "
            f"{num_classes - 1}; got {numbers}"
        )
    return numbers


def default_cutoffs(
    counts: Tensor | None,  # (V,)
    num_classes: int,
    num_tails: int,  # 1 or 2
) -> list[int]:
    """Where the paper cuts text8: after V/20 and V/4 classes, of counts as Zipf's law has them.

    Of other counts, after as many as make up the same shares of them; but no later than at V/4 and V/2, or flat
    counts would make the head as expensive as a full softmax. Classes that never occur belong to the last tail.
    """
    if num_classes < 2:
        raise ValueError("num_classes must be at least 2 for AdaptiveSoftmax, which has a head and a tail; got 1")
    ends = [max(1, num_classes // part) for part in (20, 4)[:num_tails]]
    if counts is not None:
        falling = check_counts(counts).sort(descending=True).values
        zipf = 1 / torch.arange(1, num_classes + 1, dtype=torch.float64, device="cpu")
        shares = (zipf.cumsum(0) / zipf.sum())[torch.tensor(ends, device="cpu") - 1]
        reached = torch.searchsorted(falling.cumsum(0), shares * falling.sum() * (1 - 1e-9)) + 1
        latest = [max(1, num_classes // part) for part in (4, 2)]
        ends = [min(end, most) for end, most in zip(reached.tolist(), latest, strict=False)]
    return sorted({min(end, num_classes - 1) for end in ends})


def tail_widths(in_features: int, div_value: float, num_tails: int) -> list[int]:
    """`d / div_value^i`, rounded down, for i = 1, 2, ...; an error where one would be 0."""
    if not 1 <= div_value < math.inf:
        raise ValueError(f"div_value must be finite and at least 1, got {div_value}")
    widths = [int(in_features // div_value ** (i + 1)) for i in range(num_tails)]
    if 0 in widths:
        raise ValueError(
            f"in_features={in_features} with div_value={div_value} leaves no width for tail {widths.index(0) + 1} "
            f"of {num_tails}; use fewer cutoffs or a smaller div_value"
        )
    return widths


def measure_costs(width: int) -> tuple[float, float]:
    """`(c, λ)`: a step of n rows, k classes and this width takes about `c + λ n width k` seconds here."""
    rows, few, many = 256, 16, 2048
    hidden = torch.randn(rows, width, requires_grad=True)

    def seconds(num_classes: int) -> float:
        weight = torch.randn(num_classes, width, requires_grad=True)
        ids = torch.zeros(rows, dtype=torch.int64)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            linear_nll(hidden, weight, ids).backward()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    short, long = seconds(few), seconds(many)
    per_product = max(long - short, 1e-12) / (rows * width * (many - few))
    return max(short - per_product * rows * width * few, 0.0), per_product


def best_cutoffs(
    falling: Tensor,  # (V,), counts, highest first
    widths: Sequence[int],  # of the head, then of each tail
    batch_size: int,
    fixed: float,
    per_product: float,
) -> list[int]:
    """The cut-offs of least cost, one fewer than `widths`.

    The head costs `c + λ B d (k_h + J)`; a tail of width w over the ranks from a up to b, with share p of the
    counts, `c + λ B p w (d + b - a)`.
    """
    V, d, num_tails = len(falling), widths[0], len(widths) - 1
    grid = np.unique(np.geomspace(1, V - 1, GRID).round().astype(np.int64))
    if len(grid) < num_tails:
        grid = np.arange(1, V)
    edges = np.append(grid, V)
    total = float(falling.sum()) or 1.0
    share = np.append(0.0, falling.cumsum(0).numpy() / total)[edges]
    rate = per_product * batch_size
    best = np.append(fixed + rate * d * (grid + num_tails), np.inf)  # the head ends at each edge
    came_from = []
    for width in widths[1:]:
        mass, classes = share[None, :] - share[:, None], edges[None, :] - edges[:, None]
        of_tail = np.where(classes > 0, fixed + rate * mass * width * (d + classes), np.inf)
        cost = best[:, None] + of_tail
        came_from.append(cost.argmin(0))
        best = cost.min(0)
    cutoffs, at = [], len(edges) - 1
    for choice in reversed(came_from):
        at = int(choice[at])
        cutoffs.append(int(edges[at]))
    return cutoffs[::-1]

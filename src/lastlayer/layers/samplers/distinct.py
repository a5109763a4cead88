"""Sampling without replacement: draw one after another until enough are distinct."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def num_draws_for(
    log_prob: Tensor,  # (V,), log q
    num_samples: int,
) -> float:
    """T with `sum over i of 1 - (1 - q_i) ** T == num_samples`: about how many draws make so many distinct.

    The sum is concave in T, so Newton's method from T = num_samples rises to the solution and never passes it.

    Raises:
        ValueError: fewer than `num_samples` classes have a positive probability.
    """
    prob = log_prob.double().exp()
    possible = int((prob > 0).sum())
    if num_samples > possible:
        raise ValueError(
            f"num_samples must be at most the {possible} classes of positive probability without replacement, "
            f"got {num_samples}"
        )
    if num_samples == possible:
        return math.inf
    log_miss = torch.log1p(-prob.clamp(max=1 - 1e-16))
    draws = float(num_samples)
    for _ in range(100):
        missed = torch.exp(draws * log_miss)
        short = num_samples - float((1 - missed).sum())
        slope = float(-(missed * log_miss).sum())
        if short <= 1e-9 * num_samples or slope <= 0:
            break
        draws += short / slope
    return draws


def distinct_rows(
    draw: Callable[[int], Tensor],  # count to (R, count) independent draws
    num_samples: int,
    num_draws: float,  # about how many are needed
) -> Tensor:  # (R, num_samples)
    """The first `num_samples` distinct ids of each row, in the order in which they were drawn."""
    count = int(num_draws + 3 * math.sqrt(num_draws)) + 1
    ids = draw(count)
    while True:
        first = _first_occurrences(ids)
        if not len(ids) or int(first.sum(1).min()) >= num_samples:
            break
        ids = torch.cat([ids, draw(count)], 1)
    kept = first & (first.cumsum(1) <= num_samples)
    return ids[kept].reshape(len(ids), num_samples)


def _first_occurrences(ids: Tensor) -> Tensor:  # (R, K), bool
    """Where an id stands in its row for the first time."""
    ordered, places = ids.sort(dim=1, stable=True)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(first).scatter_(1, places, first)

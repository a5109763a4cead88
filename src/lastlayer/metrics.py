"""How good the best classes of each row are: the ranking metrics of recommenders and extreme classifiers.

All take the `indices (..., k)` that `topk` returns, best first (-1 where fewer are left), and `targets (..., K)`,
the right classes of each row padded with `ignore_index`, or `(...)` of one class a row; and give the mean over the
rows that have a target, as a tensor `()`, nan where none has. A class counts once, also where it is given twice.

>>> import torch
>>> from lastlayer import metrics
>>> indices, targets = torch.tensor([[4, 2, 9], [7, 5, 1]]), torch.tensor([2, 8])
>>> metrics.recall(indices, targets), metrics.reciprocal_rank(indices, targets)
(tensor(0.5000), tensor(0.2500))
"""

import math

import torch
from torch import Tensor

from lastlayer.functional.checks import check_positive
from lastlayer.functional.clusters import check_counts


def recall(
    indices: Tensor,  # (..., k)
    targets: Tensor,  # (...) or (..., K)
    *,
    ignore_index: int = -100,
) -> Tensor:  # ()
    """Recall@k: the share of a row's targets that are among its k; of one target a row the hit rate."""
    hits, counts = _hits(indices, targets, ignore_index)
    return _mean(hits.sum(-1) / counts, counts)


def precision(
    indices: Tensor,  # (..., k)
    targets: Tensor,  # (...) or (..., K)
    *,
    ignore_index: int = -100,
) -> Tensor:  # ()
    """P@k: the share of a row's k that are targets."""
    hits, counts = _hits(indices, targets, ignore_index)
    return _mean(hits.sum(-1) / indices.shape[-1], counts)


def reciprocal_rank(
    indices: Tensor,  # (..., k)
    targets: Tensor,  # (...) or (..., K)
    *,
    ignore_index: int = -100,
) -> Tensor:  # ()
    """MRR@k: one over the place of a row's first target, 0 where none is among the k."""
    hits, counts = _hits(indices, targets, ignore_index)
    return _mean((hits / _places(hits)).amax(-1), counts)


def ndcg(
    indices: Tensor,  # (..., k)
    targets: Tensor,  # (...) or (..., K)
    *,
    ignore_index: int = -100,
) -> Tensor:  # ()
    """NDCG@k: targets discounted by `log2(place + 1)`, over what the best order would reach with k classes."""
    hits, counts = _hits(indices, targets, ignore_index)
    discounts = 1 / torch.log2(_places(hits) + 1)
    ideal = (discounts * (_places(hits) <= counts[..., None])).sum(-1)
    return _mean((hits * discounts).sum(-1) / ideal, counts)


def propensities(
    counts: Tensor,  # (V,)
    num_rows: int,
    *,
    a: float = 0.55,
    b: float = 1.5,
) -> Tensor:  # (V,), float64
    """How likely a class's presence is recorded, by how often it occurs in `num_rows` training rows.

    `1 / (1 + c exp(-a log(n + b)))` with `c = (log num_rows - 1) (b + 1) ** a`; a and b as the authors choose them
    for most data.

    Source: H. Jain et al., "Extreme multi-label loss functions for recommendation, tagging, ranking and other
    missing label applications", KDD 2016.

    Raises:
        TypeError, ValueError: counts that are no counts; fewer than 3 rows, for which the formula gives none.
    """
    counts = check_counts(counts)
    if check_positive("num_rows", num_rows) < 3:
        raise ValueError(f"num_rows must be at least 3, got {num_rows}")
    c = (math.log(num_rows) - 1) * (b + 1) ** a
    return 1 / (1 + c * torch.exp(-a * torch.log(counts + b)))


def propensity_scored_precision(
    indices: Tensor,  # (..., k)
    targets: Tensor,  # (...) or (..., K)
    propensity: Tensor,  # (V,)
    *,
    ignore_index: int = -100,
) -> Tensor:  # ()
    """PSP@k: hits count one over their class's propensity, over what the best k of all rows would reach.

    Rare classes, which are recorded less often, weigh more. A ratio of sums over rows, as published figures are.
    """
    hits, _ = _hits(indices, targets, ignore_index)
    weights = 1 / propensity.to(hits)
    targets, distinct = _distinct(indices, targets, ignore_index)
    reached = (hits * weights[indices.clamp(min=0)]).sum()
    k = min(indices.shape[-1], targets.shape[-1])
    best = torch.where(distinct, weights[targets.clamp(min=0)], 0.0).topk(k).values.sum()
    return reached / best


def _hits(indices: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Which of the k are targets, `(..., k)` of 0 and 1; and how many targets each row has, `(...)`."""
    targets, distinct = _distinct(indices, targets, ignore_index)
    hits = ((indices[..., :, None] == targets[..., None, :]) & distinct[..., None, :]).any(-1)
    return hits.float(), distinct.sum(-1).float()


def _distinct(indices: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The targets as `(..., K)`, sorted, and which of these places hold a class for the first time."""
    if targets.shape == indices.shape[:-1]:
        targets = targets[..., None]
    if targets.shape[:-1] != indices.shape[:-1]:
        raise ValueError(
            f"targets must have the rows of indices, shape {tuple(indices.shape[:-1])} or one more dimension; "
            f"got {tuple(targets.shape)}"
        )
    targets = targets.sort(-1).values
    distinct = targets != ignore_index
    distinct[..., 1:] &= targets[..., 1:] != targets[..., :-1]
    return targets, distinct


def _places(hits: Tensor) -> Tensor:  # (k,), from 1
    return torch.arange(1, hits.shape[-1] + 1, device=hits.device, dtype=hits.dtype)


def _mean(of_rows: Tensor, counts: Tensor) -> Tensor:
    return of_rows[counts > 0].mean()

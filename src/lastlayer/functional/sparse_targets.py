"""Sparse targets in one form: a few class ids a row, each with a weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_targets, eager_on_cpu


class SparseTargets(NamedTuple):
    """The rows of a sparse `(N, V)` matrix; padding has weight 0."""

    ids: Tensor  # (N, K), valid class ids, none twice with a weight in one row
    weights: Tensor  # (N, K), float64
    kept: Tensor | None  # (N,), bool: rows that are not ignored; None where all are known to be kept


def sparse_targets(
    targets: Tensor,  # (...), (..., K), or sparse (N, V)
    target_weights: Tensor | None,  # the shape of targets
    shape: torch.Size,  # of the rows: (...)
    num_classes: int,
    ignore_index: int,
) -> SparseTargets:
    """`targets` as ids and weights, with duplicates within a row added up.

    A row is ignored when all its ids are `ignore_index`; an empty row of a sparse matrix is a target of zeros.

    Raises:
        TypeError: not a tensor, ids that are not integers, a dense matrix of values, or weights that require a
            gradient.
        ValueError: shapes that do not fit, or weights together with a matrix that has its own.
        IndexError: an id out of range.
    """
    if isinstance(targets, Tensor) and targets.layout != torch.strided:
        return _from_matrix(targets, target_weights, shape, num_classes)
    if isinstance(targets, Tensor) and targets.is_floating_point():
        raise TypeError(
            f"targets must be class ids of an integer dtype, or a sparse (N, {num_classes}) matrix of values "
            f"(targets.to_sparse()); got a dense {targets.dtype} tensor"
        )
    several = isinstance(targets, Tensor) and targets.dim() == len(shape) + 1 and targets.shape[:-1] == shape
    targets, some_ignored = check_targets(targets, targets.shape if several else shape, num_classes, ignore_index)
    if several and targets.shape[-1] == 0:  # K = 0: every row is ignored
        targets, some_ignored = targets.new_full((*shape, 1), ignore_index), True
        target_weights = None if target_weights is None else target_weights.new_zeros(targets.shape)
    ids = targets.reshape(shape.numel(), targets.shape[-1]) if several else targets.reshape(-1, 1)
    if target_weights is None:
        weights = torch.ones(ids.shape, dtype=torch.float64, device=ids.device)
    else:
        _check_weights(target_weights, targets)
        weights = target_weights.reshape(ids.shape).double()
    kept = None
    if some_ignored:
        present = ids != ignore_index
        if not eager_on_cpu(ids) or not bool(present.all()):
            ids, weights = ids.masked_fill(~present, 0), torch.where(present, weights, 0.0)
            kept = present.any(1)
    return SparseTargets(*(merge_duplicates(ids, weights) if ids.shape[1] > 1 else (ids, weights)), kept)


def merge_duplicates(
    ids: Tensor,  # (N, K)
    weights: Tensor,  # (N, K)
) -> tuple[Tensor, Tensor]:
    """The same rows, sorted by id, with the weights of equal ids added up in the first of them."""
    ids, order = ids.sort(1)
    weights = weights.gather(1, order)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    start = torch.where(first, torch.arange(ids.shape[1], device=ids.device), 0).cummax(1).values
    return ids, torch.zeros_like(weights).scatter_add_(1, start, weights)


def _check_weights(target_weights: Tensor, targets: Tensor) -> None:
    if not isinstance(target_weights, Tensor) or not target_weights.is_floating_point():
        raise TypeError("target_weights must be a floating-point Tensor")
    if target_weights.requires_grad:
        raise TypeError("target_weights must not require a gradient: none is computed; pass them detached")
    if target_weights.shape != targets.shape:
        raise ValueError(
            f"target_weights must have targets' shape {tuple(targets.shape)}, got {tuple(target_weights.shape)}"
        )


def _from_matrix(
    matrix: Tensor,  # sparse (N, V)
    target_weights: Tensor | None,
    shape: torch.Size,
    num_classes: int,
) -> SparseTargets:
    if target_weights is not None:
        raise ValueError("target_weights must be None when targets are a sparse matrix, which has its own values")
    expected = (shape.numel(), num_classes)
    if len(shape) != 1 or matrix.shape != expected:
        raise ValueError(
            f"targets as a sparse matrix must have shape (N, V) = {expected} with hidden (N, d); "
            f"got {tuple(matrix.shape)}"
        )
    if matrix.requires_grad:
        raise TypeError("targets must not require a gradient: none is computed; pass them detached")
    entries = matrix.detach().to_sparse_coo().coalesce()  # duplicates added up, rows in order
    row, column = entries.indices()
    counts = torch.bincount(row, minlength=shape.numel())
    width = max(1, int(counts.max())) if len(row) else 1
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    ids = torch.zeros(shape.numel(), width, dtype=torch.int64, device=row.device)
    weights = torch.zeros(ids.shape, dtype=torch.float64, device=row.device)
    ids[row, place] = column
    weights[row, place] = entries.values().double()
    return SparseTargets(ids, weights, None)

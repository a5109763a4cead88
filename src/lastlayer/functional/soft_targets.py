"""Targets of a cross-entropy in every form: a class a row, a few weighted ones, or a distribution over all."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_targets, eager_on_cpu
from lastlayer.functional.sparse_targets import sparse_targets


class TargetRows(NamedTuple):
    """The targets of N rows: some classes, or all."""

    ids: Tensor  # (N,) or (N, K), class ids
    weights: Tensor | None  # (N, K), float64, 0 in unused places; None: 1 for each class
    kept: Tensor | None  # (N,), bool: rows that are not ignored; None: all
    dense: Tensor | None = None  # (N, V), a weight for every class, instead


def target_rows(
    targets: Tensor,  # (...), (..., K), (..., V) floating, or sparse (N, V)
    target_weights: Tensor | None,  # the shape of targets
    shape: torch.Size,  # of the rows: (...)
    num_classes: int,
    ignore_index: int,
) -> TargetRows:
    """The targets, checked, over flat rows.

    Raises:
        TypeError: targets or weights of the wrong kind, or that require a gradient.
        ValueError: shapes that do not fit; weights that are negative or not finite.
        IndexError: an id out of range.
    """
    if not isinstance(targets, Tensor) or (target_weights is None and targets.shape == shape):
        ids, _ = check_targets(targets, shape, num_classes, ignore_index)
        ids = ids.reshape(-1)
        return TargetRows(ids, None, ids != ignore_index)
    if targets.is_floating_point() and targets.layout == torch.strided:
        return _dense_rows(targets, target_weights, shape, num_classes)
    if targets.layout == torch.strided and target_weights is None and targets.dim() != len(shape) + 1:
        check_targets(targets, shape, num_classes, ignore_index)  # whose error names the shape
    ids, weights, kept = sparse_targets(targets, target_weights, shape, num_classes, ignore_index)
    check_target_weights("targets" if target_weights is None else "target_weights", weights)
    return TargetRows(ids, weights, kept)


def _dense_rows(targets: Tensor, target_weights: Tensor | None, shape: torch.Size, num_classes: int) -> TargetRows:
    if target_weights is not None:
        raise ValueError("target_weights must be None when targets are weights of all classes themselves")
    if targets.dim() != len(shape) + 1:
        raise TypeError(
            f"targets must be class ids of an integer dtype, or weights of all classes (..., {num_classes}); got "
            f"{targets.dtype} of shape {tuple(targets.shape)}"
        )
    if targets.shape != (*shape, num_classes):
        raise ValueError(
            f"targets as weights of all classes must have shape {(*shape, num_classes)}, "
            f"got {tuple(targets.shape)}"
        )
    if targets.requires_grad:
        raise TypeError("targets must not require a gradient: none is computed; pass them detached")
    check_target_weights("targets", targets)
    nothing = torch.empty(shape.numel(), 0, dtype=torch.int64, device=targets.device)
    return TargetRows(nothing, nothing.double(), None, targets.reshape(-1, num_classes))


def check_target_weights(name: str, weights: Tensor) -> None:
    """An error where weights are negative or not finite, and may be read without a synchronisation."""
    if not eager_on_cpu(weights) or not weights.numel():
        return
    least, most = (bound.item() for bound in weights.aminmax())
    if not 0 <= least <= most < float("inf"):  # nan is neither
        wrong = most if least >= 0 else least
        raise ValueError(f"{name} must be weights that are finite and at least 0 (of any sum), got {wrong}")

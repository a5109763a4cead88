"""The second moment of hidden states: all that a calibrated preview needs to know of them, and its rotation."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.gram import (
    Rotation,
    calibrated_rotation,
    gram_matrix,
    principal_rotation,
    shrunk_moment,
)

LEAST_SHARE = 1e-6  # of the largest one: a smaller one counts as this


class SecondMoment(NamedTuple):
    """Mean of `h h^T` over some hidden states, and how many there were."""

    moment: Tensor  # (d, d), float64
    rows: int


Calibration = Tensor | Iterable[Tensor] | SecondMoment


def second_moment(calibration: Calibration) -> SecondMoment:
    """Reads hidden states: one tensor `(..., d)`, or batches of them, each read once and not kept.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than two rows, widths that differ, NaN or infinity, or nothing but zeros.
    """
    if isinstance(calibration, SecondMoment):
        return _sound(calibration)
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be hidden states or batches of them, got {calibration!r}")
    batches = [calibration] if isinstance(calibration, Tensor) else calibration
    total: Tensor | None = None
    count = 0
    for batch in batches:
        rows = _checked(batch)
        if total is not None and len(total) != rows.shape[-1]:
            raise ValueError(f"calibration batches must be of one width, got {len(total)} and {rows.shape[-1]}")
        gram = gram_matrix(rows)
        total = gram if total is None else total + gram
        count += len(rows)
    return _sound(SecondMoment(torch.empty(0, 0) if total is None else total / max(1, count), count))


def _sound(calibration: SecondMoment) -> SecondMoment:
    moment, count = calibration
    if count < 2:
        raise ValueError(f"calibration must hold at least 2 hidden states, got {count}")
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"calibration must have a (d, d) second moment, got {tuple(moment.shape)}")
    if not bool(moment.isfinite().all()):
        raise ValueError("calibration must be finite, got NaN or infinity among its hidden states")
    if not bool(moment.trace() > 0):
        raise ValueError("calibration must not be all zero")
    return calibration


def _checked(batch: Tensor) -> Tensor:  # (n, d)
    if not isinstance(batch, Tensor) or not batch.is_floating_point():
        what = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(
            f"calibration must be a floating-point tensor of hidden states or batches of them, got {what}"
        )
    if batch.dim() < 2 or batch.shape[-1] == 0:
        raise ValueError(f"calibration must have shape (..., d) with rows, got {tuple(batch.shape)}")
    return batch.reshape(-1, batch.shape[-1])


def rotation_of(
    weight: Tensor,  # (V, d)
    calibration: SecondMoment | None,
    gram: Tensor | None = None,  # (d, d), weight.T @ weight where it is at hand
) -> Rotation:
    """The rotation of a weight, plain or calibrated: a Gram matrix, if none is given, and a d x d eigenproblem."""
    width = weight.shape[-1]
    if gram is not None and gram.shape != (width, width):
        raise ValueError(f"gram must have shape (d, d) = {(width, width)}, got {tuple(gram.shape)}")
    gram = gram_matrix(weight) if gram is None else gram.detach().double()
    if not bool(gram.isfinite().all()):
        raise ValueError("gram must be finite, got NaN or infinity")
    if calibration is None:
        return principal_rotation(gram)
    moment = calibration.moment.to(gram.device)
    moment = moment / (
        moment.trace() / len(moment)
    )  # the rotation's scale is free: no power of 10 under- or overflows
    if moment.shape != gram.shape:
        raise ValueError(f"calibration must have the weight's width {len(gram)}, got {len(moment)}")
    return calibrated_rotation(gram, shrunk_moment(moment, calibration.rows))


def shares_of(rotation: Rotation) -> Tensor:  # (d,), float64
    """Root mean squares of the logits' parts by rotated coordinate, for hidden states of second moment c I."""
    shares = rotation.squares.clamp(min=0).sqrt()
    return shares.clamp(min=LEAST_SHARE * float(shares[0])) if shares[0] > 0 else torch.ones_like(shares)

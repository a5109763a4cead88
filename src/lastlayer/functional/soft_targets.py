"""Targets of a cross-entropy in every form: a class a row, a few weighted ones, or a distribution over all."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import check_targets, eager_on_cpu
from lastlayer.functional.linear_chunks import LinearChunks
from lastlayer.functional.sparse_targets import sparse_targets


class TargetRows(NamedTuple):
    """The targets of N rows: some classes, or all."""

    ids: Tensor  # (N,) or (N, K), class ids
    weights: Tensor | None  # (N, K), float64, 0 in unused places; None: 1 for each class
    kept: Tensor | None  # (N,), bool: rows that are not ignored; None: all
    dense: "DenseRows | None" = None  # a weight for every class, instead


class DenseRows:
    """`(N, V)` weights of the caller, read by rows."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def begin(self, chunks: LinearChunks, rows: slice) -> None:
        """Before the parts of a chunk."""

    def part(self, part: slice, exact: torch.dtype) -> tuple[Tensor, Tensor | float]:
        """`(n, V)` weights of some rows, and what to add to their losses."""
        return self.values[part].to(exact), 0.0

    def whole(self, exact: torch.dtype) -> tuple[Tensor, Tensor | float]:
        """`part` of all rows, by PyTorch's own operations."""
        return self.values.to(exact), 0.0


class TeacherRows(DenseRows):
    """The softmax of another layer's logits, computed alongside the student's, a chunk at a time.

    What is added to a row's cross-entropy is the negative entropy of the teacher, which makes it a divergence.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> None:
        self.head = hidden, weight, bias
        self.temperature = temperature
        self.chunks: LinearChunks | None = None

    def begin(self, chunks: LinearChunks, rows: slice) -> None:
        """Multiplies the teacher's rows of the chunk."""
        if self.chunks is None:
            self.chunks = LinearChunks(*self.head, None, chunks.hidden.dtype)
        self.chunks.multiply(rows)

    def part(self, part: slice, exact: torch.dtype) -> tuple[Tensor, Tensor | float]:
        assert self.chunks is not None
        return self._of(self.chunks.logits(part), exact)

    @torch.no_grad()
    def whole(self, exact: torch.dtype) -> tuple[Tensor, Tensor | float]:
        return self._of(F.linear(*self.head).to(exact), exact)

    def _of(self, logits: Tensor, exact: torch.dtype) -> tuple[Tensor, Tensor]:
        log_prob = (logits / self.temperature).log_softmax(1).to(exact)
        prob = log_prob.exp()
        return prob, (prob * log_prob.clamp_(min=-1e4)).sum(1)  # a class of probability 0 adds 0, not nan


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


def all_classes(dense: DenseRows, rows: Tensor) -> TargetRows:
    """The targets of `len(rows)` rows by `dense` alone."""
    nothing = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    return TargetRows(nothing, nothing.double(), None, dense)


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
    rows = targets.reshape(-1, num_classes)
    return all_classes(DenseRows(rows), rows)


def check_target_weights(name: str, weights: Tensor) -> None:
    """An error where weights are negative or not finite, and may be read without a synchronisation."""
    if not eager_on_cpu(weights) or not weights.numel():
        return
    least, most = (bound.item() for bound in weights.aminmax())
    if not 0 <= least <= most < float("inf"):  # nan is neither
        wrong = most if least >= 0 else least
        raise ValueError(f"{name} must be weights that are finite and at least 0 (of any sum), got {wrong}")

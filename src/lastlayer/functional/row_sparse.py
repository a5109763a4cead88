"""Gradients of a matrix of which only some rows were touched: sparse in the rows, coalesced by construction."""

import sys
from collections import deque

import numpy as np
import torch
from torch import Tensor, nn

# Below this the C library reuses freed memory by itself.
LEAST_KEPT_BYTES = 1 << 20
# The rows of the latest gradients that were made, held so that no other tensor can lie at their addresses.
_increasing: deque[Tensor] = deque(maxlen=8)


def row_sparse(
    rows: Tensor,  # (R,), increasing
    values: Tensor,  # (R, ...)
    num_rows: int,
) -> Tensor:  # (num_rows, ...), sparse
    """A tensor of `num_rows` rows that is `values` at `rows` and 0 elsewhere; nothing of that size is made.

    `rows` are strictly increasing, so the tensor is coalesced as it stands: an explicit `coalesce()` sorts and
    copies, and costs more than the SGD step that follows it.
    """
    shape = (num_rows, *values.shape[1:])
    _increasing.append(rows)
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)


def keep_coalesced(parameter: nn.Parameter) -> None:
    """Has the first row-sparse gradient that `parameter` accumulates keep its mark of being coalesced.

    Autograd takes over the tensor that backward returns but drops the mark, and Adagrad would sort it again.
    """
    parameter.register_post_accumulate_grad_hook(_mark_if_increasing)


def _mark_if_increasing(parameter: Tensor) -> None:
    grad = parameter.grad
    if grad is not None and grad.is_sparse and not grad.is_coalesced():
        rows = grad._indices()
        # Not where two gradients were added up: their rows are a new tensor.
        if any(rows.data_ptr() == made.data_ptr() and rows.shape[1] == len(made) for made in tuple(_increasing)):
            grad._coalesced_(True)


class GradientMemory:
    """Memory for the values of one gradient, lent again once nobody holds the gradient any more.

    Filling fresh memory costs several times what filling it again does (page faults). A gradient belongs to
    whoever holds it, so the memory is lent only when no tensor uses it: every loan is a storage that holds one
    reference to the array behind it, and Python counts those.
    """

    def __init__(self) -> None:
        self._array = None

    def __deepcopy__(self, memo: object) -> "GradientMemory":
        return GradientMemory()

    def __reduce__(self) -> tuple[type["GradientMemory"], tuple[()]]:
        return GradientMemory, ()

    def lend(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of `shape`, dtype and device as `like`."""
        numel = 1
        for size in shape:
            numel *= size
        num_bytes = numel * like.element_size()
        if like.device.type != "cpu" or num_bytes < LEAST_KEPT_BYTES:
            return like.new_empty(shape)
        lent = self._array is not None and sys.getrefcount(self._array) > 2  # this attribute, and the argument
        if lent:
            return like.new_empty(shape)
        if self._array is None or not num_bytes <= self._array.nbytes <= 4 * num_bytes:
            self._array = np.empty(num_bytes + num_bytes // 8, dtype=np.uint8)
        return torch.from_numpy(self._array)[:num_bytes].view(like.dtype).view(shape)

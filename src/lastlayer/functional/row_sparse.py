"""Gradients of a matrix of which only some rows were touched: sparse in the rows, coalesced by construction."""

import math
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_KEPT_BYTES = 1 << 20  # below this the C library reuses freed memory by itself


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
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)


class GradientMemory:
    """A buffer that is reused for the values of successive gradients.

    Filling fresh memory costs several times what filling it again does (page faults). The
    buffer is released when the last tensor that uses it is freed, by a finalizer of the array that the tensor was
    made from, and only then reused. While a gradient is referenced, the next one gets another buffer.
    """

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []  # one block at most

    def __deepcopy__(self, memo: object) -> "GradientMemory":
        return GradientMemory()

    def __reduce__(self) -> tuple[type["GradientMemory"], tuple[()]]:
        return GradientMemory, ()

    def allocate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of `shape`, dtype and device as `like`."""
        num_bytes = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or num_bytes < LEAST_KEPT_BYTES:
            return like.new_empty(shape)
        try:  # no check first: another thread may take the block in between
            block = self._free.pop()
        except IndexError:
            block = None
        if block is None or not num_bytes <= block.nbytes <= 4 * num_bytes:
            block = np.empty(num_bytes + num_bytes // 8, dtype=np.uint8)
        array = block[:num_bytes]
        weakref.finalize(array, self._release, block).atexit = False
        return torch.from_numpy(array).view(like.dtype).view(shape)

    def _release(self, block: NDArray[np.uint8]) -> None:
        self._free[:] = [block]

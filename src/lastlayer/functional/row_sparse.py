"""Gradients of a matrix of which only some rows were touched: sparse in the rows, coalesced by construction."""

import torch
from torch import Tensor


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

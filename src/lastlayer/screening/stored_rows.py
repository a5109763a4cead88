"""How a preview keeps its rows: numbers, their rounding, and the scores of all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.screening.exact import CAST_ROWS, rounding_share

STORAGES = ("float32", "bfloat16")


def store_rows(rows: Tensor, storage: str | None, dtype: torch.dtype) -> "FloatRows":
    """`rows (V, w)` in float64, kept as `storage` says (None: as the working dtype)."""
    return FloatRows(rows, dtype if storage in (None, "float32") else getattr(torch, storage), dtype)


class FloatRows:
    """Rows in a floating-point dtype; products are summed in the working dtype."""

    def __init__(
        self,
        rows: Tensor,  # (V, w), float64
        storage: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        self.stored = rows.to(storage)
        self.dtype = dtype
        self.bytes_read = self.stored.nbytes
        rounded = torch.linalg.vector_norm(rows - self.stored.double(), dim=-1)
        share = rounding_share(rows.shape[-1], dtype)
        self.of_classes = (rounded + share * torch.linalg.vector_norm(rows, dim=-1)).to(dtype)[None]  # (1, V)

    def of_rows(self, hidden: Tensor) -> Tensor:  # (N, w) -> (N, 1)
        """What `of_classes` is multiplied by to bound the error of `scores`."""
        return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)

    def scores(
        self,
        hidden: Tensor,  # (N, w)
        bias: Tensor | None,  # (V,)
    ) -> Tensor:  # (N, V)
        """`hidden @ rows.T + bias`."""
        hidden = hidden.to(self.dtype)
        if self.stored.dtype == self.dtype:
            return F.linear(hidden, self.stored, bias)
        scores = hidden.new_empty(len(hidden), len(self.stored))
        for start in range(0, len(self.stored), CAST_ROWS):
            block = self.stored[start : start + CAST_ROWS].to(self.dtype)
            torch.matmul(hidden, block.T, out=scores[:, start : start + CAST_ROWS])
        return scores if bias is None else scores.add_(bias)

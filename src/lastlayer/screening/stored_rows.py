"""How a preview keeps its rows: numbers, their rounding, and the scores of all of them."""

import torch
from torch import Tensor

from lastlayer.screening.exact import CAST_ROWS, rounding_share
from lastlayer.screening.quantised import Int8Rows

STORAGES = ("float32", "bfloat16", "int8")


def store_rows(rows: Tensor, storage: str | None, dtype: torch.dtype) -> "FloatRows | Int8Rows":
    """`rows (V, w)` in float64, kept as `storage` says (None: as the working dtype)."""
    if storage == "int8":
        return Int8Rows(rows, dtype)
    return FloatRows(rows, dtype if storage in (None, "float32") else getattr(torch, storage), dtype)


class FloatRows:
    """Rows in a floating-point dtype; products are summed in the working dtype."""

    def __init__(
        self,
        rows: Tensor,  # (V, w), float64
        storage: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        stored = rows.to(storage)
        self.columns = stored.T.contiguous()  # (w, V): sums over the width then run beside each other
        self.dtype = dtype
        self.bytes_read = self.columns.nbytes
        rounded = torch.linalg.vector_norm(rows - stored.double(), dim=-1)
        share = rounding_share(rows.shape[-1], dtype)
        self.of_classes = (rounded + share * torch.linalg.vector_norm(rows, dim=-1)).to(dtype)[None]  # (1, V)

    def of_rows(self, hidden: Tensor) -> Tensor:  # (N, w) -> (N, 1)
        """What `of_classes` is multiplied by to bound the error of `scores`."""
        return torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)

    def scores(
        self,
        hidden: Tensor,  # (N, w)
        bias: Tensor,  # (V,)
    ) -> Tensor:  # (N, V)
        """`hidden @ rows.T + bias`, summed in the working dtype."""
        hidden = hidden.to(self.dtype)
        if self.columns.dtype == self.dtype:
            return torch.addmm(bias, hidden, self.columns)
        scores = hidden.new_empty(len(hidden), self.columns.shape[-1])
        for start in range(0, scores.shape[-1], CAST_ROWS):
            block = self.columns[:, start : start + CAST_ROWS].to(self.dtype)
            torch.matmul(hidden, block, out=scores[:, start : start + CAST_ROWS])
        return scores.add_(bias)

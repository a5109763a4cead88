"""How a preview keeps its rows: numbers, their rounding, and the scores of all of them."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.screening.exact import CAST_ROWS, rounding_share
from lastlayer.screening.quantised import Int8Rows
from lastlayer.screening.summary import BLOCK, Summary, kernels

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
        bias: Tensor,  # (V,)
    ) -> Tensor:  # (N, V)
        """`hidden @ rows.T + bias`, summed in the working dtype."""
        hidden = hidden.to(self.dtype)
        if self.stored.dtype == self.dtype:
            return F.linear(hidden, self.stored, bias)
        scores = hidden.new_empty(len(hidden), len(self.stored))
        for start in range(0, len(self.stored), CAST_ROWS):
            block = self.stored[start : start + CAST_ROWS].to(self.dtype)
            torch.matmul(hidden, block.T, out=scores[:, start : start + CAST_ROWS])
        return scores.add_(bias)

    def scan(
        self,
        hidden: np.ndarray,  # (w,) float32
        norm: float,  # of hidden
        bias: np.ndarray,  # (V,) float32
        workers: int,
    ) -> tuple[Summary, tuple[float, ...]]:
        """Scores of one hidden state, summarised in the same pass, and `of_rows`."""
        room = Summary.empty(1, len(self.stored))
        bits = self.stored.dtype == torch.bfloat16
        stored = self.stored.view(torch.int16) if bits else self.stored
        kernels().scan_float(stored.numpy(), hidden, bias, BLOCK, workers, *room.row())
        return room, (norm,)

    def summary(
        self,
        hidden: Tensor,  # (N, w)
        bias: Tensor,  # (V,) float32
        workers: int,
    ) -> tuple[Summary, Tensor]:
        """Scores summarised for the fused kernels, and `of_rows`."""
        return Summary.of(self.scores(hidden, bias)), self.of_rows(hidden)

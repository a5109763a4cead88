"""Rows and hidden states in whole numbers, multiplied exactly; the rounding is bounded, not hoped."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.kernels.screening import BLOCK, WHOLE
from lastlayer.screening.exact import CAST_ROWS, rounding_share

WIDTH_UNIT = 64  # widths are padded to what the longest vector instruction reads
AT_ONCE = 8192  # rows multiplied at once: their products stay in the cache
EXACT_WIDTH = 2048  # products of 8-bit and 7-bit numbers that float32 sums exactly: 2048 * 127 * 64 < 2^24
MOST = 127
LEAST_STEP = torch.finfo(torch.float32).tiny  # a smaller one is imprecise


class Whole(NamedTuple):
    """Vectors as `step * (128 high + low)` with whole `|high|, |low| <= 64`: 14 bits a number."""

    high: Tensor  # (N, w), whole numbers
    low: Tensor  # (N, w), whole numbers
    step: Tensor  # (N, 1), float32
    left_over: Tensor  # (N, 1), float64: norm of what the whole numbers do not hold


def whole_numbers(vectors: Tensor) -> Whole:
    """`vectors (N, w)` rounded to whole numbers of a step each, up to WHOLE."""
    vectors = vectors.double()
    most = vectors.abs().amax(dim=-1, keepdim=True)
    step = (most / WHOLE).clamp(min=LEAST_STEP).float()
    number = (vectors / step).round()
    high = (number / 128).round()
    left_over = torch.linalg.vector_norm(vectors - number * step.double(), dim=-1, keepdim=True)
    return Whole(high, number - 128 * high, step, left_over)


class IntegerRows(ABC):
    """Rows as integers of at most 8 bits, each row with its own scale, and their products with hidden states."""

    scale: Tensor  # (V,), float32
    width: int  # of the stored rows: that of hidden states, padded
    dtype: torch.dtype  # of scores

    @abstractmethod
    def integers(self, start: int, stop: int) -> Tensor:  # (stop - start, width), int8
        """Some rows; `start` is a multiple of BLOCK, `stop` may lie beyond the last."""

    def scores(
        self,
        hidden: Tensor,  # (N, w)
        bias: Tensor,  # (V,)
    ) -> Tensor:  # (N, V)
        """`hidden @ rows.T + bias`, but for the rounding of both. The plain twin of the compiled scan.

        Whole numbers are multiplied in float32, by so many at once that their sums are exact.
        """
        whole, classes = whole_numbers(hidden), len(self.scale)
        padding = (0, self.width - hidden.shape[-1])
        both = F.pad(torch.cat([whole.high, whole.low]).float(), padding)
        scores = hidden.new_empty(len(hidden), classes, dtype=self.dtype)
        for start in range(0, classes, AT_ONCE):
            rows = self.integers(start, start + AT_ONCE).float()
            parts = zip(both.split(EXACT_WIDTH, dim=1), rows.split(EXACT_WIDTH, dim=1), strict=True)
            products = sum(left.mm(right.T).to(self.dtype) for left, right in parts)
            assert isinstance(products, Tensor)
            high, low = products.tensor_split(2)
            at = slice(start, start + AT_ONCE)
            scores[:, at] = low.add_(high, alpha=128).mul_(whole.step).mul_(self.scale[at])
        return scores.add_(bias)


class Int8Rows(IntegerRows):
    """Rows as `scale_i * q_i` in int8, each with its own scale.

    With `h'` the whole numbers of a hidden state `h`, Cauchy and Schwarz bound

        |w_i . h - scale_i q_i . h'|  <=  ||w_i - scale_i q_i|| ||h||  +  ||scale_i q_i|| ||h - h'||

    and both norms of each row are kept.
    """

    def __init__(
        self,
        rows: Tensor,  # (V, w)
        dtype: torch.dtype,
    ) -> None:
        classes, width = rows.shape
        self.filled, self.width = width, -(-width // WIDTH_UNIT) * WIDTH_UNIT
        padded = -(-classes // BLOCK) * BLOCK
        self.stored = torch.zeros(padded, self.width, dtype=torch.int8, device=rows.device)
        self.scale = torch.empty(classes, dtype=torch.float32, device=rows.device)
        norms = torch.empty(2, classes, dtype=torch.float64, device=rows.device)
        for start in range(0, classes, CAST_ROWS):
            at = slice(start, start + CAST_ROWS)
            block = rows[at].double()
            most = block.abs().amax(dim=-1, keepdim=True)
            scale = (most / MOST).clamp(min=LEAST_STEP).float()
            rounded = (block / scale).round().clamp(-MOST, MOST)
            self.stored[start : start + len(block), :width] = rounded.to(torch.int8)
            self.scale[at] = scale[:, 0]
            rounded *= scale
            norms[0, at] = torch.linalg.vector_norm(block - rounded, dim=-1)
            norms[1, at] = torch.linalg.vector_norm(rounded, dim=-1)
        norms[0] += rounding_share(8, torch.float32) * norms[1]  # scores are put together in float32
        self.dtype = dtype
        self.of_classes = rounded_up(norms).to(dtype)  # (2, V)
        self.bytes_read = self.stored.nbytes + self.scale.nbytes

    def of_rows(self, hidden: Tensor) -> Tensor:  # (N, w) -> (N, 2)
        """What `of_classes` is multiplied by to bound the error of `scores`."""
        norm = torch.linalg.vector_norm(hidden.double(), dim=-1, keepdim=True)
        return torch.cat([norm, whole_numbers(hidden).left_over], dim=-1)

    def integers(self, start: int, stop: int) -> Tensor:
        return self.stored[start : min(stop, len(self.scale))]

    def columns(self) -> Tensor:  # (w, V), int8
        """The integers without their padding, transposed."""
        return self.stored[: len(self.scale), : self.filled].T


def rounded_up(norms: Tensor) -> Tensor:
    """So that rounding to float32 does not make a bound smaller."""
    return norms * (1 + 2 * torch.finfo(torch.float32).eps)

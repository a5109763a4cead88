"""Int8Rows: rows and hidden states in 8-bit integers, multiplied exactly; the rounding is bounded, not hoped."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.screening.exact import CAST_ROWS, rounding_share
from lastlayer.screening.summary import BLOCK, Summary, kernels

WIDTH_UNIT = 64  # widths are padded to what one AVX512 instruction reads
COLUMNS_UNIT = 16  # and on a GPU the number of right-hand vectors to what `torch._int_mm` takes
AT_ONCE = 8192  # rows multiplied at once on a CPU: their products stay in the cache
MOST = 127


class TwoParts(NamedTuple):
    """Vectors as `step_high * high + step_low * low`, both int8; the low step is 254 times finer."""

    high: Tensor  # (N, w), int8
    low: Tensor  # (N, w), int8
    step_high: Tensor  # (N, 1), float32
    step_low: Tensor  # (N, 1), float32
    left_over: Tensor  # (N, 1), float64: norm of what neither part holds


def split_in_two(hidden: Tensor) -> TwoParts:
    """`hidden (N, w)` rounded to int8, and its remainder again."""
    high, step_high, rest = _rounded(hidden.double())
    low, step_low, rest = _rounded(rest)
    return TwoParts(high, low, step_high, step_low, torch.linalg.vector_norm(rest, dim=-1, keepdim=True))


def _rounded(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`vectors (N, w)` as int8 with a step each, the steps, and what is left over."""
    most = vectors.abs().amax(dim=-1, keepdim=True)
    step = torch.where(most > 0, most / MOST, 1.0).float()
    part = (vectors / step).round().clamp(-MOST - 1, MOST)
    return part.to(torch.int8), step, vectors - part * step.double()


class IntegerRows(ABC):
    """Rows as integers of at most 8 bits, each row with its own scale, and their products with hidden states."""

    scale: Tensor  # (V,), float32
    width: int  # of the stored rows: that of hidden states, padded
    dtype: torch.dtype  # of scores

    @abstractmethod
    def integers(self, start: int, stop: int) -> Tensor:  # (stop - start, width), int8
        """Some rows; `start` is a multiple of BLOCK, `stop` may lie beyond the last."""

    def _right(self, parts: TwoParts) -> Tensor:  # (width, M), int8
        """All high parts, then all low ones, as columns that rows are multiplied with; padded."""
        both = torch.cat([parts.high, parts.low])
        columns = -len(both) % COLUMNS_UNIT if both.is_cuda else 0
        return F.pad(both, (0, self.width - both.shape[-1], 0, columns)).T

    def scores(
        self,
        hidden: Tensor,  # (N, w)
        bias: Tensor,  # (V,)
    ) -> Tensor:  # (N, V)
        """`hidden @ rows.T + bias`, but for the rounding of both."""
        parts, count, classes = split_in_two(hidden), len(hidden), len(self.scale)
        right, scores = self._right(parts), hidden.new_empty(count, classes, dtype=self.dtype)
        # on a GPU as few steps as hold no more numbers than the scores themselves
        step = max(AT_ONCE, scores.numel() // right.shape[1] // BLOCK * BLOCK) if hidden.is_cuda else AT_ONCE
        for start in range(0, classes, step):
            at = slice(start, start + step)
            products = _int_mm(self.integers(start, start + step), right).T
            sums = parts.step_high * products[:count]
            sums += parts.step_low * products[count : 2 * count]
            scores[:, at] = sums.mul_(self.scale[at])
        return scores.add_(bias)

    def summarised(
        self,
        parts: TwoParts,
        bias: Tensor,  # (V,) float32
        workers: int,
    ) -> Summary:
        """`scores` of hidden states in two parts, summarised for the fused kernels."""
        room = Summary.empty(len(parts.high), len(self.scale))
        others = self.scale.numpy(), bias.numpy(), parts.step_high[:, 0].numpy(), parts.step_low[:, 0].numpy()
        right = self._right(parts)
        for start in range(0, len(self.scale), AT_ONCE):
            products = _int_mm(self.integers(start, start + AT_ONCE), right).numpy()
            kernels().combine_int8(workers, products, start, *others, BLOCK, *room)
        return room


class Int8Rows(IntegerRows):
    """Rows as `scale_i * q_i` in int8, each with its own scale.

    With `h'` the two int8 parts of a hidden state `h`, Cauchy and Schwarz bound

        |w_i . h - scale_i q_i . h'|  <=  ||w_i - scale_i q_i|| ||h||  +  ||scale_i q_i|| ||h - h'||

    and both norms of each row are kept.
    """

    def __init__(
        self,
        rows: Tensor,  # (V, w)
        dtype: torch.dtype,
    ) -> None:
        classes, width = rows.shape
        self.width = -(-width // WIDTH_UNIT) * WIDTH_UNIT
        self.stored = torch.zeros(classes, self.width, dtype=torch.int8, device=rows.device)
        self.scale = torch.empty(classes, dtype=torch.float32, device=rows.device)
        norms = torch.empty(2, classes, dtype=torch.float64, device=rows.device)
        for start in range(0, classes, CAST_ROWS):
            at = slice(start, start + CAST_ROWS)
            block = rows[at].double()
            most = block.abs().amax(dim=-1, keepdim=True)
            scale = torch.where(most > 0, most / MOST, 1.0).float()
            rounded = (block / scale).round().clamp(-MOST, MOST)
            self.stored[at, :width] = rounded.to(torch.int8)
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
        return torch.cat([norm, split_in_two(hidden).left_over], dim=-1)

    def integers(self, start: int, stop: int) -> Tensor:
        return self.stored[start:stop]

    def kept(self) -> tuple[np.ndarray, ...]:
        """The rows as the fused kernels take them, and room for a hidden state in two parts."""
        return self.stored.numpy(), self.scale.numpy(), *np.zeros((2, self.width), dtype=np.int8)

    def summary(
        self,
        hidden: Tensor,  # (N, w)
        bias: Tensor,  # (V,) float32
        workers: int,
    ) -> tuple[Summary, Tensor]:
        """Scores summarised for the fused kernels, and `of_rows`."""
        run = kernels()
        if run.HAS_AMX:
            room, of_rows = Summary.empty(len(hidden), len(self.stored)), np.empty((len(hidden), 2))
            given = self.stored.numpy(), self.scale.numpy(), bias.numpy()
            run.scan_int8_rows(workers, hidden.float().numpy(), *given, BLOCK, of_rows, *room)
            return room, torch.from_numpy(of_rows)
        parts = split_in_two(hidden)
        norm = torch.linalg.vector_norm(hidden.double(), dim=-1, keepdim=True)
        return self.summarised(parts, bias, workers), torch.cat([norm, parts.left_over], dim=-1)


def _int_mm(left: Tensor, right: Tensor) -> Tensor:
    return torch._int_mm(left, right)  # pyright: ignore[reportPrivateImportUsage]


def rounded_up(norms: Tensor) -> Tensor:
    """So that rounding to float32 does not make a bound smaller."""
    return norms * (1 + 2 * torch.finfo(torch.float32).eps)

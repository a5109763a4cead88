"""The loss of rows of logits and, in their place, its gradient: in PyTorch, and fused by numba on a CPU.

With f a row's logits, y its class and u the class weights, the loss of a row is

    hard (lse - f_y) + soft (Σ_c u_c lse - Σ_c u_c f_c) + square lse²

and so its gradient with respect to f_c is

    p_c (hard + soft Σ_c u_c + 2 square lse) - hard [c = y] - soft u_c
"""

import importlib.util
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lastlayer.kernels.arrays import array_of
from lastlayer.kernels.threads import at_once

# Below this many logits the plain version is as quick, and numba need not be imported.
LEAST_LOGITS = 1 << 19


class RowTerms(NamedTuple):
    """The coefficients of some rows' loss; None where there is no such term."""

    ids: Tensor  # (n,) valid classes y
    hard: Tensor  # (n,)
    soft: Tensor | None  # (n,)
    square: Tensor | None  # (n,)
    class_weights: Tensor | None  # (V,) u; None: all 1

    def of(self, rows: slice) -> "RowTerms":
        """Those of some of the rows."""
        soft, square = (None if part is None else part[rows] for part in (self.soft, self.square))
        return RowTerms(self.ids[rows], self.hard[rows], soft, square, self.class_weights)

    def scaled(self, scale: Tensor) -> "RowTerms":
        """The terms of `scale * loss`, `scale` one number or one a row."""
        soft, square = (None if part is None else part * scale for part in (self.soft, self.square))
        return self._replace(hard=self.hard * scale, soft=soft, square=square)


def plain(
    values: Tensor,  # (n, V) mapped logits; overwritten, by their gradient if `form`
    terms: RowTerms,
    form: bool,
) -> Tensor:  # (n,) the loss of every row
    """The reference, for any dtype and device."""
    ids, hard, soft, square, weights = terms
    at_target = values.gather(1, ids[:, None])[:, 0]
    weighted = total = torch.zeros((), dtype=values.dtype, device=values.device)
    if soft is not None:
        weighted = values.sum(1) if weights is None else values @ weights
        total = total + values.shape[1] if weights is None else weights.sum()

    peak = values.amax(1)
    mass = values.sub_(peak[:, None]).exp_().sum(1)
    normalizer = peak + mass.log()

    loss, of_normalizer = hard * (normalizer - at_target), hard
    if soft is not None:
        loss = loss + soft * (total * normalizer - weighted)
        of_normalizer = of_normalizer + soft * total
    if square is not None:
        loss = loss + square * normalizer.square()
        of_normalizer = of_normalizer + 2 * square * normalizer
    if form:
        values.mul_((of_normalizer / mass)[:, None])
        values.scatter_add_(1, ids[:, None], -hard[:, None])
        if soft is not None:
            values.sub_(soft[:, None] if weights is None else torch.outer(soft, weights))
    return loss


@cache
def numba_is_there() -> bool:
    """Whether numba can be imported."""
    return importlib.util.find_spec("numba") is not None


def can_fuse(device: torch.device, dtype: torch.dtype, num_logits: int) -> bool:
    """Whether `fused` serves for so many logits in `dtype`, and is worth its start."""
    return (
        device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and num_logits >= LEAST_LOGITS
        and not torch.compiler.is_compiling()
        and numba_is_there()
    )


class KernelMap(NamedTuple):
    """A logit map as a kernel takes it: which, its numbers, and for PLIF its lines."""

    kernel: str = "plain_rows"
    numbers: tuple[float, ...] = ()
    lines: Tensor | None = None  # (K, 2) float32: slope and offset of each segment
    counted: bool = False  # whether the sums over segments are wanted


NO_MAP = KernelMap()


def fused(
    logits: Tensor,  # (n, V) float32 or bfloat16, without the bias; overwritten by their gradient if `form`
    bias: Tensor | None,  # (V,) float32
    terms: RowTerms,  # no `soft`
    form: bool,
    logit_map: KernelMap = NO_MAP,
) -> tuple[Tensor, Tensor | None]:  # the loss of every row (n,); sums (K, 2) float64 over PLIF's segments
    """The same in one visit to each row; rows are shared among as many threads as PyTorch uses."""
    from lastlayer.kernels import softmax_rows_numba

    kernel = getattr(softmax_rows_numba, logit_map.kernel)
    count, num_classes = logits.shape
    bias = terms.hard.new_zeros(num_classes, dtype=torch.float32) if bias is None else bias
    square = torch.zeros_like(terms.hard) if terms.square is None else terms.square
    loss = torch.empty_like(terms.hard)
    stored = logits.view(torch.int16) if logits.dtype == torch.bfloat16 else logits
    of_rows = [part.numpy() for part in (stored, terms.ids, terms.hard, square, loss)]
    added = array_of(bias)  # a parameter's, where no cast was needed
    numbers = [np.float32(number) for number in logit_map.numbers]

    threads = min(torch.get_num_threads(), count)
    edges = np.linspace(0, count, threads + 1).astype(int)

    def work(part: int) -> Tensor | None:
        rows = slice(edges[part], edges[part + 1])
        values, ids, hard, squares, losses = (array[rows] for array in of_rows)
        common = values, added, ids, hard, squares, form, np.empty(num_classes, np.float32), losses
        if logit_map.lines is None:
            kernel(*common, *numbers)
            return None
        sums = torch.zeros_like(logit_map.lines, dtype=torch.float64)
        kernel(*common, logit_map.lines.numpy(), *numbers, sums.numpy(), logit_map.counted)
        return sums

    first, *others = at_once(work, threads)
    for part in others:
        first = first if first is None or part is None else first.add_(part)
    return loss, first

"""The loss of rows of logits and, in their place, its gradient: in PyTorch, and in `csrc/softmax_rows.cpp`.

With f a row's logits, y its class and u the class weights, the loss of a row is

    hard (lse - f_y) + soft (Σ_c u_c lse - Σ_c u_c f_c) + square lse²

and so its gradient with respect to f_c is

    p_c (hard + soft Σ_c u_c + 2 square lse) - hard [c = y] - soft u_c
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.kernels.engine import Kernel

# rows, bias, ids, hard, square, loss; n, V, form, in bfloat16; the map's kind, numbers, lines, K, sums
_SOFTMAX_ROWS = Kernel("softmax_rows", "ppppppnnnnnffpnp")


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
    peak = values.amax(1)
    values.sub_(peak[:, None])  # first of all: a large common part of the logits must cost no digits
    at_target = values.gather(1, ids[:, None])[:, 0]
    weighted = total = torch.zeros((), dtype=values.dtype, device=values.device)
    if soft is not None:
        weighted = values.sum(1) if weights is None else values @ weights
        total = total + values.shape[1] if weights is None else weights.sum()

    mass = values.exp_().sum(1)
    log_mass = mass.log()

    loss, of_normalizer = hard * (log_mass - at_target), hard
    if soft is not None:
        loss = loss + soft * (total * log_mass - weighted)
        of_normalizer = of_normalizer + soft * total
    if square is not None:
        normalizer = peak + log_mass
        loss = loss + square * normalizer.square()
        of_normalizer = of_normalizer + 2 * square * normalizer
    if form:
        values.mul_((of_normalizer / mass)[:, None])
        values.scatter_add_(1, ids[:, None], -hard[:, None])
        if soft is not None:
            values.sub_(soft[:, None] if weights is None else torch.outer(soft, weights))
    return loss


class KernelMap(NamedTuple):
    """A logit map as the compiled kernel takes it: which, its numbers, and for PLIF its lines."""

    kind: str = "identity"  # one of KINDS
    numbers: tuple[float, ...] = ()  # of soft_cap its cap, of plif its bound and the width of a segment
    lines: Tensor | None = None  # (K, 2) float32: slope and offset of each segment
    counted: bool = False  # whether the sums over segments are wanted


KINDS = ("identity", "sigsoftmax", "soft_cap", "plif")  # as in csrc/softmax_rows.cpp
NO_MAP = KernelMap()


def fused(
    logits: Tensor,  # (n, V) float32 or bfloat16, without the bias; overwritten by their gradient if `form`
    bias: Tensor | None,  # (V,) float32
    terms: RowTerms,  # no `soft`
    form: bool,
    logit_map: KernelMap = NO_MAP,
) -> tuple[Tensor, Tensor | None]:  # the loss of every row (n,); sums (K, 2) float64 over PLIF's segments
    """The same by the compiled engine, with a logit map, in one visit to each row; the sums only if `counted`."""
    count, num_classes = logits.shape
    assert logits.is_contiguous()
    assert terms.soft is None
    hard = terms.hard.contiguous()
    bias = hard.new_zeros(num_classes) if bias is None else bias.contiguous()
    square = torch.zeros_like(hard) if terms.square is None else terms.square.contiguous()
    loss = torch.empty_like(hard)
    first, second, *_ = (*logit_map.numbers, 0.0, 0.0)
    lines, sums = logit_map.lines, None
    if lines is not None and logit_map.counted:
        sums = torch.zeros_like(lines, dtype=torch.float64)
    _SOFTMAX_ROWS(
        logits, bias, terms.ids.contiguous(), hard, square, loss,
        count, num_classes, form, logits.dtype == torch.bfloat16,
        KINDS.index(logit_map.kind), first, second, lines, 0 if lines is None else len(lines), sums,
    )  # fmt: skip
    return loss, sums

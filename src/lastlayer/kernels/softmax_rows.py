"""The loss of rows of logits and, in their place, its gradient: in PyTorch, and in `csrc/softmax_rows.cpp`.

With f a row's logits, y its class and u the class weights, the loss of a row is

    hard (lse - f_y) + soft (Σ_c u_c lse - Σ_c u_c f_c) + square lse²

and so its gradient with respect to f_c is

    p_c (hard + soft Σ_c u_c + 2 square lse) - hard [c = y] - soft u_c

A row may have several classes y, each with its own `hard`; or weights of all classes, which are `hard` of each.
The plain form takes these.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.kernels.engine import Kernel

# rows, bias, ids, hard, square, loss; n, V, form, in bfloat16; the map's kind, numbers, lines, K, sums
_SOFTMAX_ROWS = Kernel("softmax_rows", "ppppppnnnnnffpnp")


class RowTerms(NamedTuple):
    """The coefficients of some rows' loss; None where there is no such term."""

    ids: Tensor  # (n,) or (n, K) valid classes y
    hard: Tensor  # the shape of ids
    soft: Tensor | None = None  # (n,)
    square: Tensor | None = None  # (n,)
    class_weights: Tensor | None = None  # (V,) u; None: all 1
    dense: Tensor | None = None  # (n, V) weights of all classes, of any dtype
    dense_scale: Tensor | None = None  # (n,) what these are multiplied by

    def of(self, rows: slice) -> "RowTerms":
        """Those of some of the rows."""
        ids, hard, *others = self
        soft, square, _, dense, dense_scale = (None if part is None else part[rows] for part in others)
        return RowTerms(ids[rows], hard[rows], soft, square, self.class_weights, dense, dense_scale)

    def scaled(self, scale: Tensor) -> "RowTerms":
        """The terms of `scale * loss`, `scale` one number or one a row."""
        _, hard, soft, square, _, _, dense_scale = self
        soft, square, dense_scale = (
            None if part is None else part * scale for part in (soft, square, dense_scale)
        )
        hard = hard * (scale[:, None] if scale.dim() and hard.dim() > 1 else scale)
        return self._replace(hard=hard, soft=soft, square=square, dense_scale=dense_scale)


def plain(
    values: Tensor,  # (n, V) mapped logits; overwritten by their gradient if `form`
    terms: RowTerms,
    form: bool,
) -> Tensor:  # (n,) the loss of every row
    """The reference, for any dtype and device; differentiable, if not `form`."""
    ids, hard, soft, square, weights, dense, dense_scale = terms
    if ids.dim() == 1:
        ids, hard = ids[:, None], hard[:, None]
    peak = values.detach().amax(1)
    # first of all: a large common part of the logits must cost no digits
    values = values.sub_(peak[:, None]) if form else values - peak[:, None]
    at_targets = values.gather(1, ids).masked_fill(hard == 0, 0)  # where nothing counts, not 0 times -inf
    weighted = total = of_dense = torch.zeros((), dtype=values.dtype, device=values.device)
    if soft is not None:
        weighted = values.sum(1) if weights is None else values @ weights
        total = total + values.shape[1] if weights is None else weights.sum()
    if dense is not None and dense_scale is not None:
        dense = dense.to(values.dtype) * dense_scale[:, None]
        dense = dense if weights is None else dense * weights
        of_dense = (dense * values.masked_fill(dense == 0, 0)).sum(1)

    mass = (values.exp_() if form else values.exp()).sum(1)
    log_mass = mass.log()

    loss, of_normalizer = (hard * (log_mass[:, None] - at_targets)).sum(1), hard.sum(1)
    if soft is not None:
        loss = loss + soft * (total * log_mass - weighted)
        of_normalizer = of_normalizer + soft * total
    if dense is not None:
        whole = dense.sum(1)
        loss = loss + whole * log_mass - of_dense
        of_normalizer = of_normalizer + whole
    if square is not None:
        normalizer = peak + log_mass
        loss = loss + square * normalizer.square()
        of_normalizer = of_normalizer + 2 * square * normalizer
    if form:
        values.mul_((of_normalizer / mass)[:, None])
        values.scatter_add_(1, ids, -hard)
        if soft is not None:
            values.sub_(soft[:, None] if weights is None else torch.outer(soft, weights))
        if dense is not None:
            values.sub_(dense)
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
    terms: RowTerms,  # one class a row; no `soft`, no `dense`
    form: bool,
    logit_map: KernelMap = NO_MAP,
) -> tuple[Tensor, Tensor | None]:  # the loss of every row (n,); sums (K, 2) float64 over PLIF's segments
    """The same by the compiled engine, with a logit map, in one visit to each row; the sums only if `counted`."""
    count, num_classes = logits.shape
    assert logits.is_contiguous()
    assert terms.soft is None
    assert terms.dense is None
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

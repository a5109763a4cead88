"""Many independent softmaxes, each of some rows of a batch over its own rows of one weight."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.groups import Groups
from lastlayer.kernels import backends
from lastlayer.kernels import grouped as kernels
from lastlayer.kernels.backends import grouped_softmax_backend_for, softmax_rows_backend_for
from lastlayer.kernels.softmax_rows import RowTerms, fused


class Softmaxes(NamedTuple):
    """The groups of a batch, and by which code they are computed."""

    table: Tensor  # (G, 4), of `Groups`
    compact: bool
    num_residuals: int
    compiled: bool

    @classmethod
    def of(cls, groups: Groups, hidden: Tensor, weight: Tensor, *, compact: bool = False) -> "Softmaxes":
        """Plans the work; `compact` gradients hold the groups' rows only, one group after the other."""
        backend = grouped_softmax_backend_for(hidden.device, hidden.dtype, weight.dtype)
        compiled = backend == "compiled" and weight.is_contiguous()
        return cls(groups.table, compact, groups.num_logits, compiled)

    def forward(
        self,
        rows: Tensor,  # (N, d), sorted by group
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        slots: Tensor,  # (N,), the weight row of each target
        log_prob: Tensor,  # (N,), gains the log-softmax at the targets
        slope: Tensor | None,  # (N, d), gains residual @ weight
        *,
        slope_is_new: bool,  # and becomes it
    ) -> Tensor:  # flat, group after group
        """Residuals `softmax(rows @ weight.T + bias) - one_hot(target)` of every group."""
        residual = log_prob.new_empty(self.num_residuals)
        if self.compiled:
            arrays = (rows, weight, None if bias is None else bias.contiguous(), slots, residual, log_prob, slope)
            kernels.softmax_forward(self.table, backends.GROUP_WORK, *arrays, slope_is_new=slope_is_new)
            return residual
        for row, count, start, size, place, _ in self._each_group():
            own = slice(row, row + count)
            block = weight.narrow(0, start, size).to(rows.dtype)
            flat = residual.narrow(0, place, count * size).view(count, size)
            _multiply(rows[own], block.T, flat)
            own_bias = None if bias is None else bias.detach().narrow(0, start, size).to(flat.dtype)
            log_prob[own] += _to_residuals(flat, own_bias, slots[own] - start)
            if slope is not None:
                slope[own].addmm_(flat.to(rows.dtype), block, beta=0 if slope_is_new else 1)
        return residual

    def backward(
        self,
        rows: Tensor,  # (N, d), sorted by group
        residual: Tensor,  # flat, from the forward pass
        scale: Tensor,  # (N,), sorted by group
        of_weight: Tensor,  # (R, d), written at the groups' rows
        of_bias: Tensor,  # (R,), likewise
    ) -> None:
        """Writes the gradients of weight and bias, `(scale * residual).T @ rows` and its sums, each row once."""
        if self.compiled:
            arrays = (rows, residual, scale, of_weight, of_bias)
            kernels.softmax_backward(self.table, backends.GROUP_WORK, *arrays, compact=self.compact)
            return
        exact = rows.dtype == residual.dtype  # then the scale goes to the narrower factor; else it is rounded once
        scaled = rows * scale[:, None] if exact else rows
        for row, count, _, size, place, out in self._each_group():
            own = slice(row, row + count)
            factors = residual.narrow(0, place, count * size).view(count, size).T
            left = factors if exact else (factors * scale[own]).to(rows.dtype)
            _multiply(left, scaled[own], of_weight.narrow(0, out, size))
            of_bias.narrow(0, out, size).copy_(factors @ scale[own])

    def _each_group(self) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Row, count, start and size of each, its place among the residuals, its first row in the gradients."""
        place = out = 0
        for row, count, start, size in self.table.tolist():
            yield row, count, start, size, place, out if self.compact else start
            place, out = place + count * size, out + size


def _multiply(left: Tensor, right: Tensor, into: Tensor) -> None:
    """`into` becomes `left @ right`, of which it may be the float32 form of a product in half precision."""
    if into.dtype == left.dtype:
        torch.mm(left, right, out=into)
    else:
        into.copy_(left @ right)


def _to_residuals(
    products: Tensor,  # (n, size); become softmax(products + bias) - one_hot(targets)
    bias: Tensor | None,  # (size,)
    targets: Tensor,  # (n,)
) -> Tensor:  # (n,), the log-softmax at the targets
    if softmax_rows_backend_for(products.device, products.dtype) == "compiled":
        terms = RowTerms(targets, torch.ones_like(targets, dtype=products.dtype), None, None, None)
        return fused(products, bias, terms, True)[0].neg_()
    if bias is not None:
        products += bias
    log_prob = torch.log_softmax(products, 1, out=products)
    picked = log_prob.gather(1, targets[:, None])
    log_prob.exp_().scatter_add_(1, targets[:, None], torch.full_like(picked, -1))
    return picked[:, 0]

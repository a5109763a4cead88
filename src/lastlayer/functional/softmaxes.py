"""Many softmaxes side by side, each of some rows of a batch over its own rows of one weight."""

import functools
import importlib.util
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lastlayer.functional.groups import Groups
from lastlayer.kernels import grouped as kernels
from lastlayer.kernels.arrays import arrays_of
from lastlayer.kernels.backends import softmax_rows_backend_for
from lastlayer.kernels.grouped import GroupArrays
from lastlayer.kernels.softmax_rows import RowTerms, fused

# PyTorch's matrix product beats the compiled loops on groups with at least so many rows of the batch, unless the
# whole product is too small to be worth a call; and on any that has so many multiply-adds that all threads share
# it.
MANY_ROWS = 16
LEAST_WORK = 1 << 18
WORK_FOR_ALL_THREADS = 1 << 23


class Softmaxes(NamedTuple):
    """The groups of a batch, and who computes each: small ones the compiled loops, where these can run."""

    small: GroupArrays
    large: list[tuple[int, ...]]  # the same fields, a tuple a group
    num_residuals: int

    @classmethod
    def of(cls, groups: Groups, hidden: Tensor, weight: Tensor, *, compact: bool = False) -> "Softmaxes":
        """Plans the work; `compact` gradients hold the groups' rows only, one group after the other."""
        numbers = groups.counts * groups.sizes
        ends = numbers.cumsum()
        outs = groups.sizes.cumsum() - groups.sizes if compact else groups.starts
        arrays = GroupArrays(groups.rows, groups.counts, groups.starts, groups.sizes, ends - numbers, outs)
        total = int(ends[-1]) if len(ends) else 0
        if can_compile(hidden, weight):
            work = numbers * hidden.shape[1]
            small = (work < LEAST_WORK) | (groups.counts < MANY_ROWS) & (work < WORK_FOR_ALL_THREADS)
        else:
            small = np.zeros(len(numbers), dtype=bool)
        if small.all():
            return cls(arrays, [], total)
        large = [tuple(numbers) for numbers in zip(*(array[~small].tolist() for array in arrays), strict=True)]
        return cls(GroupArrays(*(array[small] for array in arrays)), large, total)

    def forward(
        self,
        rows: Tensor,  # (N, d), sorted by group
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        slots: Tensor,  # (N,), the weight row of each target
        log_prob: Tensor,  # (N,), gains the log-softmax at the targets
        slope: Tensor,  # (N, d), or (0, d) for none; gains residual @ weight
    ) -> Tensor:  # flat, a group after the other
        """Residuals `softmax(rows @ weight.T + bias) - one_hot(target)` of every group."""
        residual = log_prob.new_empty(self.num_residuals)
        if len(self.small.rows):
            arrays = (rows, weight, rows[:0, 0] if bias is None else bias, slots, residual, log_prob, slope)
            kernels.softmax_forward(self.small, *arrays_of(*arrays), threads=torch.get_num_threads())
        for row, count, start, size, place, _ in self.large:
            own = slice(row, row + count)
            block = weight.narrow(0, start, size).to(rows.dtype)
            flat = residual.narrow(0, place, count * size).view(count, size)
            _multiply(rows[own], block.T, flat)
            own_bias = None if bias is None else bias.detach().narrow(0, start, size).to(flat.dtype)
            log_prob[own] += _to_residuals(flat, own_bias, slots[own] - start)
            if len(slope):
                slope[own].addmm_(flat.to(rows.dtype), block)
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
        if len(self.small.rows):
            arrays = (rows, residual, scale, of_weight, of_bias)
            kernels.softmax_backward(self.small, *arrays_of(*arrays), threads=torch.get_num_threads())
        if not self.large:
            return
        exact = rows.dtype == residual.dtype  # then the scale goes to the narrower factor; else it is rounded once
        scaled = rows * scale[:, None] if exact else rows
        for row, count, _, size, place, out in self.large:
            own = slice(row, row + count)
            factors = residual.narrow(0, place, count * size).view(count, size).T
            left = factors if exact else (factors * scale[own]).to(rows.dtype)
            _multiply(left, scaled[own], of_weight.narrow(0, out, size))
            of_bias.narrow(0, out, size).copy_(factors @ scale[own])


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


def can_compile(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the compiled loops take these tensors; else PyTorch's operations do all the work."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.float32, torch.float64)
        and weight.is_contiguous()
        and _numba_is_there()
    )


@functools.cache
def _numba_is_there() -> bool:
    return importlib.util.find_spec("numba") is not None

"""A logistic regression for every class, without the `(N, V)` logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.linear_chunks import linear_logits
from lastlayer.functional.one_pass import one_pass_loss
from lastlayer.functional.operators import make_operator
from lastlayer.functional.ordinary import exporting
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.functional.second_order import Tensors

# Numbers of one block of logits, and the fewest classes that one has.
BLOCK_NUMBERS, LEAST_CLASSES = 1 << 20, 256
# From this value on softplus(x) equals x in floating point.
LARGE = {torch.float32: 20.0, torch.float64: 40.0}


class RowTargets(NamedTuple):
    """The classes of each row that are not plain negatives, none twice with a value in one row."""

    ids: Tensor  # (N, K), valid class ids
    values: Tensor  # (N, K): y of each pair, from 0 to 1; 0 where there is no target
    weights: Tensor  # (N, K): the weight of each pair's positive term


def one_vs_all_loss(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    targets: RowTargets,
    row_weights: Tensor | None = None,  # (N,): the sum of weighted losses; None: the loss of every row
) -> Tensor:  # () or (N,)
    """The binary cross-entropies of a row with all classes, added up.

    Equals, for dense targets y `(N, V)` and a positive weight u,

        logits = F.linear(hidden, weight, bias)
        F.binary_cross_entropy_with_logits(logits, y, reduction="none", pos_weight=u).sum(1)

    Every class is taken as a negative first, in blocks of classes; the few pairs that are not are corrected in
    the block of their class. With `row_weights` the gradients are formed in the forward pass, while a block's
    logits are in memory; otherwise, and in compiled graphs, the backward pass recomputes the blocks.
    """
    dtype = product_dtype(hidden)
    if torch.compiler.is_compiling() and not exporting():
        with no_autocast(hidden.device.type):
            losses = _OPERATOR(hidden.to(dtype), weight, bias, *targets)
        return losses if row_weights is None else (losses * row_weights).sum()
    inputs, reduced = (hidden, weight, bias), row_weights is not None
    return one_pass_loss(_OneVsAll(targets, dtype), inputs, row_weights, reduced=reduced, constants=targets)


class _OneVsAll(NamedTuple):
    """`RowLosses` of hidden, weight and bias."""

    targets: RowTargets
    dtype: torch.dtype  # of the products

    def plain(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By PyTorch's own operations, on the whole `(N, V)` tensor."""
        logits, _ = linear_logits(hidden, weight, bias, None, (), self.dtype)
        losses = F.softplus(logits, threshold=LARGE[logits.dtype]).sum(1)
        if weight.shape[0]:  # a rank may have no classes
            ids, values, weights = self.targets
            change = _change(logits.gather(1, ids), values.to(logits.dtype), weights.to(logits.dtype))
            losses = losses + change.masked_fill(values == 0, 0).sum(1)
        return losses

    def run(
        self, inputs: tuple[Any, ...], shares: Tensor | None, wanted: Sequence[bool] | None
    ) -> tuple[Tensor, Tensors | None]:
        """Block by block."""
        return _pass(*inputs, targets=self.targets, dtype=self.dtype, shares=shares, wanted=wanted)


def _change(at: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """`(1 - y) softplus(s) + u y softplus(-s)`, less the `softplus(s)` of each pair as a negative."""
    large = LARGE[at.dtype]
    return values * (weights * F.softplus(-at, threshold=large) - F.softplus(at, threshold=large))


def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: RowTargets,
    dtype: torch.dtype,
    shares: Tensor | None,
    wanted: Sequence[bool] | None,
) -> tuple[Tensor, Tensors | None]:
    rows, exact = hidden.to(dtype), exact_dtype(dtype)
    losses = rows.new_zeros(len(rows), dtype=exact)
    shares = torch.ones_like(losses) if shares is None else shares.to(exact)
    weighted = (rows * shares[:, None]).to(rows.dtype)  # the narrow factor of the products
    of_hidden = of_weight = of_bias = None
    if wanted is not None:
        of_hidden = torch.zeros_like(rows, dtype=exact) if wanted[0] else None
        of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[1] else None
        of_bias = torch.empty_like(bias) if wanted[2] and bias is not None else None
    step = max(LEAST_CLASSES, BLOCK_NUMBERS // max(1, len(rows)))
    product = rows.new_empty(len(rows) * min(step, len(weight)))
    for start in range(0, len(weight), step):
        classes = slice(start, start + step)
        block = weight[classes].to(rows.dtype)
        logits = product[: len(rows) * len(block)].view(len(rows), len(block))
        logits = torch.mm(rows, block.T, out=logits).to(exact)
        if bias is not None:
            logits += bias[classes]
        places, values, weights = _pairs(targets, start, len(block), exact)
        at = logits[places]
        losses += F.softplus(logits, threshold=LARGE[exact]).sum(1)
        losses.index_add_(0, places[0], _change(at, values, weights))
        if wanted is None:
            continue
        # of a negative sigmoid(s), of a target (1 - y) sigmoid(s) - u y sigmoid(-s)
        logits.sigmoid_()
        logits[places] = (1 - values) * at.sigmoid() - weights * values * (-at).sigmoid()
        gradient = logits.to(rows.dtype)
        if of_hidden is not None:
            of_hidden += gradient @ block
        if of_weight is not None:
            of_weight[classes] = gradient.T @ weighted
        if of_bias is not None:
            of_bias[classes] = logits.T @ shares
    if of_hidden is not None:
        of_hidden = of_hidden.mul_(shares[:, None]).to(hidden.dtype)
    return losses * shares, None if wanted is None else (of_hidden, of_weight, of_bias)


def _pairs(
    targets: RowTargets, start: int, count: int, exact: torch.dtype
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """The targets among some classes: their places in the block, values and weights."""
    ids, values, weights = targets
    here = (values != 0) & (ids >= start) & (ids < start + count)
    rows, columns = here.nonzero(as_tuple=True)
    at = rows, columns
    return (rows, ids[at] - start), values[at].to(exact), weights[at].to(exact)


def _forward(rows: Tensor, weight: Tensor, bias: Tensor | None, *targets: Tensor) -> Tensor:
    return _pass(rows, weight, bias, RowTargets(*targets), rows.dtype, None, None)[0]


def _backward(
    upstream: Sequence[Tensor],
    wanted: Sequence[bool],
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *targets: Tensor,
) -> Tensors:
    return _pass(rows, weight, bias, RowTargets(*targets), rows.dtype, upstream[0], wanted)[1] or ()


_OPERATOR = make_operator(
    "one_vs_all",
    "Tensor rows, Tensor weight, Tensor? bias, Tensor ids, Tensor values, Tensor weights",
    _forward,
    leaves=3,
    empty=lambda rows, *_: rows.new_empty(rows.shape[0], dtype=exact_dtype(rows.dtype)),
    gradient=_backward,
)

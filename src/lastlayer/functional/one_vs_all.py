"""A logistic regression for every class, without the `(N, V)` logits."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.functional.second_order import HandWritten, gradients

# Numbers of one block of logits, and the fewest classes that one has.
BLOCK_NUMBERS, LEAST_CLASSES = 1 << 20, 256
# From this value on softplus(x) equals x in floating point.
LARGE = {torch.float32: 20.0, torch.float64: 40.0}


class Positives(NamedTuple):
    """The classes of each row that are not plain negatives, by increasing class id."""

    rows: Tensor  # (P,)
    ids: Tensor  # (P,)
    values: Tensor  # (P,): y of each pair, above 0
    weights: Tensor  # (P,): the weight of each pair's positive term


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


def find_positives(
    ids: Tensor,  # (N, K)
    values: Tensor,  # (N, K), 0 where there is no target
    positive_weight: Tensor | float,  # (V,), or one number
) -> Positives:
    """The pairs of row and class in sparse targets."""
    try:
        rows, places = values.nonzero(as_tuple=True)
    except RuntimeError as failure:  # NotImplementedError is one
        raise RuntimeError(
            "a one-versus-all loss of lastlayer reads the class ids of each row, which is not possible inside "
            "torch.func.vmap or on 'meta'; use F.binary_cross_entropy_with_logits(layer.scores(hidden), targets)"
        ) from failure
    classes = ids[rows, places]
    classes, order = classes.sort(stable=True)
    rows, found = rows[order], values[rows, places][order]
    of_pairs = positive_weight[classes] if isinstance(positive_weight, Tensor) else positive_weight
    return Positives(rows, classes, found, torch.ones_like(found) * of_pairs)


def one_vs_all_loss(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    positives: Positives,
    row_weights: Tensor | None = None,  # (N,): the sum of weighted losses; None: the loss of every row
) -> Tensor:  # () or (N,)
    """The binary cross-entropies of a row with all classes, added up.

    Equals, for dense targets y `(N, V)` and a positive weight u,

        logits = F.linear(hidden, weight, bias)
        F.binary_cross_entropy_with_logits(logits, y, reduction="none", pos_weight=u).sum(1)

    Every class is taken as a negative first, in blocks of classes; the few pairs that are not are corrected in
    the block of their class. With `row_weights` the gradients are formed in the forward pass, while a block's
    logits are in memory; otherwise the backward pass recomputes the blocks.
    """
    dtype = product_dtype(hidden)
    with no_autocast(hidden.device.type):
        if not ordinary(hidden, weight, bias, *positives, row_weights):
            return _plain(positives, row_weights, dtype, hidden, weight, bias)
        wanted = None  # no gradient is formed in the forward pass
        if torch.is_grad_enabled() and row_weights is not None:
            wanted = _Wanted(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        found: Any = _OneVsAll.apply(hidden, weight, bias, positives, row_weights, dtype, wanted)
        return found[0]


def _plain(
    positives: Positives,
    row_weights: Tensor | None,
    dtype: torch.dtype,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The same by PyTorch's own operations, on the whole `(N, V)` tensor."""
    exact = exact_dtype(dtype)
    logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(exact)
    if bias is not None:
        logits = logits + bias.to(exact)
    rows, ids, values, weights = positives
    at, large = logits[rows, ids], LARGE[exact]
    change = values.to(exact) * (
        weights.to(exact) * F.softplus(-at, threshold=large) - F.softplus(at, threshold=large)
    )
    row_loss = F.softplus(logits, threshold=large).sum(1).index_add(0, rows, change)
    return row_loss if row_weights is None else (row_loss * row_weights).sum()


class _OneVsAll(HandWritten):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positives: Positives,
        row_weights: Tensor | None,
        dtype: torch.dtype,
        wanted: _Wanted | None,  # which gradients to form already
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        form = wanted is not None and any(wanted)
        blocks = _Blocks(hidden, weight, bias, positives, dtype)
        row_loss, formed = blocks.run(wanted if form else None, row_weights)
        return row_loss if row_weights is None else (row_loss * row_weights).sum(), formed if form else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, ctx.positives, ctx.row_weights, ctx.dtype, _ = inputs
        _, ctx.formed = output
        ctx.save_for_backward(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale, (hidden, weight, bias) = upstream[0], ctx.saved_tensors

        def form() -> tuple[Tensor | None, ...]:
            formed, ctx.formed = ctx.formed, None
            if formed is None:  # the loss of every row, or a second pass over a retained graph
                row_weights = scale if ctx.row_weights is None else scale * ctx.row_weights
                wanted = _Wanted(*ctx.needs_input_grad[:3])
                _, formed = _Blocks(hidden, weight, bias, ctx.positives, ctx.dtype).run(wanted, row_weights)
            elif not (eager_on_cpu(scale) and float(scale) == 1.0):
                for gradient in formed:
                    if gradient is not None:  # no other reference to it exists
                        gradient.mul_(scale)
            return formed

        twin = partial(_plain, ctx.positives, ctx.row_weights, ctx.dtype)
        return *gradients(form, twin, ctx.saved_tensors, upstream[:1]), None, None, None, None


class _Blocks:
    """The pass over all classes, a block at a time."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, positives: Positives, dtype: torch.dtype
    ) -> None:
        self.leaves = (hidden, weight, bias)
        self.exact = exact_dtype(dtype)
        self.hidden = hidden.detach().to(dtype)
        self.positives = positives
        self.num_block = max(LEAST_CLASSES, BLOCK_NUMBERS // max(1, len(hidden)))

    def run(self, wanted: _Wanted | None, row_weights: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss of every row, and the gradients of its sum weighted by `row_weights` that are needed."""
        hidden, weight, bias = self.leaves
        row_loss = hidden.new_zeros(len(hidden), dtype=self.exact)
        sums: list[Tensor | None] = [None, None, None]
        if row_weights is None or wanted is None:
            wanted, row_weights = None, row_loss
        row_weights = row_weights.to(self.exact)
        weighted = (self.hidden * row_weights[:, None]).to(self.hidden.dtype)  # the narrow factor of the products
        if wanted is not None:
            if wanted.hidden:
                sums[0] = torch.zeros_like(self.hidden, dtype=self.exact)
            if wanted.weight:
                sums[1] = torch.empty_like(weight, memory_format=torch.contiguous_format)
            if wanted.bias and bias is not None:
                sums[2] = torch.empty_like(bias)
        product = self.hidden.new_empty(len(hidden) * min(self.num_block, len(weight)))
        for start in range(0, len(weight), self.num_block):
            classes = slice(start, min(start + self.num_block, len(weight)))
            rows = weight.detach()[classes].to(self.hidden.dtype)
            logits = torch.mm(
                self.hidden, rows.T, out=product[: len(hidden) * len(rows)].view(len(hidden), len(rows))
            )
            logits = logits.to(self.exact)
            if bias is not None:
                logits += bias.detach()[classes]
            self._add_loss(row_loss, logits, classes)
            if wanted is not None:
                gradient = self._gradient(logits, classes).to(self.hidden.dtype)
                if sums[0] is not None:
                    sums[0] += gradient @ rows
                if sums[1] is not None:
                    sums[1][classes] = gradient.T @ weighted
                if sums[2] is not None:
                    sums[2][classes] = gradient.T.to(self.exact) @ row_weights
        if sums[0] is not None:
            sums[0] = (sums[0] * row_weights[:, None]).to(hidden.dtype)
        return row_loss, tuple(sums)

    def _pairs(self, classes: slice) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The pairs of a block: their places in it, values and weights."""
        ends = torch.tensor([classes.start, classes.stop], device=self.positives.ids.device)
        first, last = torch.searchsorted(self.positives.ids, ends).tolist()
        rows, ids, values, weights = (part[first:last] for part in self.positives)
        return (rows, ids - classes.start), values.to(self.exact), weights.to(self.exact)

    def _add_loss(self, row_loss: Tensor, logits: Tensor, classes: slice) -> None:
        """`softplus(s)` of every pair; `(1 - y) softplus(s) + u y softplus(-s)` where there is a target."""
        large = LARGE[self.exact]
        row_loss += F.softplus(logits, threshold=large).sum(1)
        places, values, weights = self._pairs(classes)
        at = logits[places]
        change = values * (weights * F.softplus(-at, threshold=large) - F.softplus(at, threshold=large))
        row_loss.index_add_(0, places[0], change)

    def _gradient(self, logits: Tensor, classes: slice) -> Tensor:
        """`sigmoid(s)`, in place; `(1 - y) sigmoid(s) - u y sigmoid(-s)` where there is a target."""
        places, values, weights = self._pairs(classes)
        at = logits[places]
        own = (1 - values) * at.sigmoid() - weights * values * (-at).sigmoid()
        logits.sigmoid_()
        logits[places] = own
        return logits

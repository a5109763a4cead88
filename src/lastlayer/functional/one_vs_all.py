"""A logistic regression for every class, without the `(N, V)` logits."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import eager_on_cpu
from lastlayer.functional.linear_twin import linear_logits
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.functional.second_order import HandWritten, gradients

# Numbers of one block of logits, and the fewest classes that one has.
BLOCK_NUMBERS, LEAST_CLASSES = 1 << 20, 256
# From this value on softplus(x) equals x in floating point.
LARGE = {torch.float32: 20.0, torch.float64: 40.0}


class RowTargets(NamedTuple):
    """The classes of each row that are not plain negatives, none twice with a value in one row."""

    ids: Tensor  # (N, K), valid class ids
    values: Tensor  # (N, K): y of each pair, from 0 to 1; 0 where there is no target
    weights: Tensor  # (N, K): the weight of each pair's positive term


class _Positives(NamedTuple):
    """The pairs of row and class that have a value, by increasing class id."""

    rows: Tensor  # (P,)
    ids: Tensor  # (P,)
    values: Tensor  # (P,)
    weights: Tensor  # (P,)

    @classmethod
    def of(cls, targets: RowTargets) -> "_Positives":
        """Those of some rows."""
        rows, places = targets.values.nonzero(as_tuple=True)
        ids, order = targets.ids[rows, places].sort(stable=True)
        rows, places = rows[order], places[order]
        return cls(rows, ids, targets.values[rows, places], targets.weights[rows, places])


class _Wanted(NamedTuple):
    hidden: bool
    weight: bool
    bias: bool


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
    logits are in memory; otherwise the backward pass recomputes the blocks.
    """
    dtype = product_dtype(hidden)
    with no_autocast(hidden.device.type):
        if not ordinary(hidden, weight, bias, *targets, row_weights):
            return _plain(targets, row_weights, dtype, hidden, weight, bias)
        wanted = None  # no gradient is formed in the forward pass
        if torch.is_grad_enabled() and row_weights is not None:
            wanted = _Wanted(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        found: Any = _OneVsAll.run(hidden, weight, bias, targets, row_weights, dtype, wanted)
        return found[0]


def _plain(
    targets: RowTargets,
    row_weights: Tensor | None,
    dtype: torch.dtype,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The same by PyTorch's own operations, on the whole `(N, V)` tensor."""
    exact = exact_dtype(dtype)
    logits, _ = linear_logits(hidden, weight, bias, None, (), dtype)
    row_loss = F.softplus(logits, threshold=LARGE[exact]).sum(1)
    if weight.shape[0]:  # a rank may have no classes
        ids, values, weights = targets
        change = _change(logits.gather(1, ids), values.to(exact), weights.to(exact))
        row_loss = row_loss + change.masked_fill(values == 0, 0).sum(1)
    return row_loss if row_weights is None else (row_loss * row_weights).sum()


def _change(at: Tensor, values: Tensor, weights: Tensor) -> Tensor:
    """`(1 - y) softplus(s) + u y softplus(-s)`, less the `softplus(s)` of each pair as a negative."""
    large = LARGE[at.dtype]
    return values * (weights * F.softplus(-at, threshold=large) - F.softplus(at, threshold=large))


class _OneVsAll(HandWritten):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: RowTargets,
        row_weights: Tensor | None,
        dtype: torch.dtype,
        wanted: _Wanted | None,  # which gradients to form already
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        row_loss, formed = _pass(hidden, weight, bias, targets, row_weights, dtype, wanted)
        loss = row_loss if row_weights is None else (row_loss * row_weights).sum()
        return loss, formed if wanted is not None and any(wanted) else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        hidden, weight, bias, ctx.targets, ctx.row_weights, ctx.dtype, _ = inputs
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
                _, formed = _pass(hidden, weight, bias, ctx.targets, row_weights, ctx.dtype, wanted)
            elif not (eager_on_cpu(scale) and float(scale) == 1.0):
                for gradient in formed:
                    if gradient is not None:  # no other reference to it exists
                        gradient.mul_(scale)
            return formed

        twin = partial(_plain, ctx.targets, ctx.row_weights, ctx.dtype)
        return *gradients(form, twin, ctx.saved_tensors, upstream[:1]), None, None, None, None


def _pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: RowTargets,
    row_weights: Tensor | None,
    dtype: torch.dtype,
    wanted: _Wanted | None,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss of every row, and the gradients of its sum weighted by `row_weights` that are wanted."""
    wanted = wanted or _Wanted(False, False, False)
    run = _OPERATOR if torch.compiler.is_compiling() else _run
    results = list(run(hidden.to(dtype), weight, bias, *targets, row_weights, list(wanted)))
    row_loss = results.pop(0)
    formed = [results.pop(0) if want else None for want in wanted]
    formed[0] = None if formed[0] is None else formed[0].to(hidden.dtype)
    return row_loss, tuple(formed)


def _run(
    rows: Tensor,  # in the dtype of the products
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    values: Tensor,
    weights: Tensor,
    row_weights: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """The loss of every row, and the wanted gradients, that of the rows in float32 at least."""
    with torch.no_grad(), no_autocast(rows.device.type):
        blocks = _Blocks(rows, weight, bias, _Positives.of(RowTargets(ids, values, weights)))
        row_loss, formed = blocks.run(_Wanted(*wanted), row_weights)
    return [row_loss, *(gradient for gradient in formed if gradient is not None)]


class _Blocks:
    """The pass over all classes, a block at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, positives: _Positives) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.exact = exact_dtype(hidden.dtype)
        self.positives = positives
        self.num_block = max(LEAST_CLASSES, BLOCK_NUMBERS // max(1, len(hidden)))

    def run(self, wanted: _Wanted, row_weights: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss of every row, and the gradients of its sum weighted by `row_weights` that are wanted."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        row_loss = hidden.new_zeros(len(hidden), dtype=self.exact)
        row_weights = row_loss if row_weights is None else row_weights.to(self.exact)
        weighted = (hidden * row_weights[:, None]).to(hidden.dtype)  # the narrow factor of the products
        of_hidden = hidden.new_zeros(hidden.shape, dtype=self.exact) if wanted.hidden else None
        of_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted.weight else None
        of_bias = torch.empty_like(bias) if wanted.bias and bias is not None else None
        product = hidden.new_empty(len(hidden) * min(self.num_block, len(weight)))
        for start in range(0, len(weight), self.num_block):
            classes = slice(start, min(start + self.num_block, len(weight)))
            rows = weight[classes].to(hidden.dtype)
            logits = torch.mm(hidden, rows.T, out=product[: len(hidden) * len(rows)].view(len(hidden), len(rows)))
            logits = logits.to(self.exact)
            if bias is not None:
                logits += bias[classes]
            self._add_loss(row_loss, logits, classes)
            if any(wanted):
                gradient = self._gradient(logits, classes).to(hidden.dtype)
                if of_hidden is not None:
                    of_hidden += gradient @ rows
                if of_weight is not None:
                    of_weight[classes] = gradient.T @ weighted
                if of_bias is not None:
                    of_bias[classes] = gradient.T.to(self.exact) @ row_weights
        if of_hidden is not None:
            of_hidden *= row_weights[:, None]
        return row_loss, (of_hidden, of_weight, of_bias)

    def _pairs(self, classes: slice) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """The pairs of a block: their places in it, values and weights."""
        ends = torch.tensor([classes.start, classes.stop], device=self.positives.ids.device)
        first, last = torch.searchsorted(self.positives.ids, ends).tolist()
        rows, ids, values, weights = (part[first:last] for part in self.positives)
        return (rows, ids - classes.start), values.to(self.exact), weights.to(self.exact)

    def _add_loss(self, row_loss: Tensor, logits: Tensor, classes: slice) -> None:
        """`softplus(s)` of every pair, and its change where there is a target."""
        row_loss += F.softplus(logits, threshold=LARGE[self.exact]).sum(1)
        places, values, weights = self._pairs(classes)
        row_loss.index_add_(0, places[0], _change(logits[places], values, weights))

    def _gradient(self, logits: Tensor, classes: slice) -> Tensor:
        """`sigmoid(s)`, in place; `(1 - y) sigmoid(s) - u y sigmoid(-s)` where there is a target."""
        places, values, weights = self._pairs(classes)
        at = logits[places]
        own = (1 - values) * at.sigmoid() - weights * values * (-at).sigmoid()
        logits.sigmoid_()
        logits[places] = own
        return logits


def _shapes(rows: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> list[Tensor]:
    wanted = _Wanted(*others[-1])
    exact = exact_dtype(rows.dtype)
    found = [rows.new_empty(rows.shape[0], dtype=exact)]  # not len(), which would fix the batch of a graph
    if wanted.hidden:
        found.append(rows.new_empty(rows.shape, dtype=exact))
    if wanted.weight:
        found.append(torch.empty_like(weight, memory_format=torch.contiguous_format))
    if wanted.bias and bias is not None:
        found.append(torch.empty_like(bias))
    return found


# The pass alone is an operator: `_OneVsAll`, whose derivative is written by hand, calls it in a compiled graph.
_OPERATOR = torch.library.custom_op(
    "lastlayer::one_vs_all",
    _run,
    mutates_args=(),
    schema="(Tensor rows, Tensor weight, Tensor? bias, Tensor ids, Tensor values, Tensor weights, "
    "Tensor? row_weights, bool[] wanted) -> Tensor[]",
)
_OPERATOR.register_fake(_shapes)

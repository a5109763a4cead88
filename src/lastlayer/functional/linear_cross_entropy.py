"""Cross-entropy of a linear layer without its `(N, V)` logits."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import (
    REDUCTIONS,
    check_choice,
    check_fraction,
    check_linear,
    check_not_negative,
    check_vector,
    eager_on_cpu,
)
from lastlayer.functional.linear_chunks import LinearChunks, linear_logits
from lastlayer.functional.logit_map import LogitMap, bound, check_logit_map
from lastlayer.functional.one_pass import one_pass_loss
from lastlayer.functional.precision import exact_dtype, product_dtype
from lastlayer.functional.second_order import Tensors
from lastlayer.functional.soft_targets import TargetRows, target_rows
from lastlayer.kernels.backends import softmax_rows_backend_for
from lastlayer.kernels.softmax_rows import NO_MAP, RowTerms, fused, plain


def linear_cross_entropy(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    targets: Tensor,  # (...), or soft: (..., K), sparse (N, V), or floating (..., V)
    *,
    target_weights: Tensor | None = None,  # (..., K)
    bias: Tensor | None = None,  # (V,)
    logit_map: LogitMap | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:  # (), or (...) for "none"
    """`F.cross_entropy(hidden @ weight.T + bias, targets)` without the `(N, V)` logits.

    With every option, equals, for `f = logit_map` and `lse = f(logits).logsumexp(-1)` at targets not ignored,

        F.cross_entropy(f(hidden @ weight.T + bias), targets, weight=class_weights, reduction=reduction,
                        ignore_index=ignore_index, label_smoothing=label_smoothing)
        + z_loss * (lse ** 2), reduced the same way ("mean": over the rows that are not ignored)

    Soft targets are K classes a row (of a teacher's best logits, or a mixture of labels), each counting
    `target_weights`, or 1 without, padded with `ignore_index`; a sparse `(N, V)` matrix; or the weights of all
    classes, floating `(..., V)`. With weights w the first term is `-(w * class_weights * log_prob).sum(-1)`, as
    for the probabilities that `F.cross_entropy` takes, and "mean" is over the rows. Weights are at least 0; their
    sum may be any. A row of nothing but `ignore_index` is ignored.

    The rows are taken in chunks. For "mean" and "sum" the gradients are formed in the forward pass, while a
    chunk's logits are in memory, and scaled by the upstream gradient in the backward pass: three matrix products
    of `2 N V d` operations, not the four of recomputation. For "none" the backward pass recomputes the chunks.
    Memory beyond the gradients: one chunk of logits. Sums are in float32 at least; under autocast the products
    run in its dtype.

    Second derivatives, the transforms of `torch.func` and forward-mode AD are supported, at the price of the
    `(N, V)` logits. Not for where a smaller layer would do: the cost is still that of all V classes.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range.
        IndexError: a target that is no class (on a GPU: a device-side assertion).

    Source: the idea of gradients in the forward pass is that of Apple's cut-cross-entropy and of Liger.

    >>> import torch
    >>> hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    >>> targets = torch.randint(1000, (6,))
    >>> loss = linear_cross_entropy(hidden, weight, targets)
    >>> loss.backward()
    >>> torch.allclose(loss, torch.nn.functional.cross_entropy(hidden @ weight.T, targets))
    True
    """
    check_linear(hidden, weight, bias)
    shape = hidden.shape[:-1]
    target = target_rows(targets, target_weights, shape, len(weight), ignore_index)
    check_logit_map(logit_map)
    check_choice("reduction", reduction, REDUCTIONS)
    check_fraction("label_smoothing", label_smoothing)
    check_not_negative("z_loss", z_loss)
    if class_weights is not None:
        check_vector("class_weights", class_weights, len(weight))

    rows, at = hidden.reshape(-1, hidden.shape[-1]), None
    if target.kept is not None and eager_on_cpu(rows) and not bool(target.kept.all()):  # ignored rows cost nothing
        at = target.kept.nonzero().squeeze(1)
        weights = None if target.weights is None else target.weights[at]
        rows, target = rows.index_select(0, at), TargetRows(target.ids[at], weights, None)
    dtype = product_dtype(hidden)
    terms, absent = row_terms(target, class_weights, label_smoothing, z_loss, len(weight), reduction, dtype)
    loss = loss_of(rows, weight, bias, RowLoss(terms, dtype, logit_map), reduced=reduction != "none")
    if reduction != "none":
        return loss + absent
    if at is not None:
        loss = loss.new_zeros(shape.numel()).index_copy(0, at, loss)
    return loss.reshape(shape)


class RowLoss(NamedTuple):
    """The losses of rows of a linear layer's logits: `RowLosses` of hidden, weight, bias, the map's parameters."""

    terms: RowTerms
    dtype: torch.dtype  # of the products
    logit_map: LogitMap | None = None

    def plain(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        """By PyTorch's own operations, with `parameters` in place of the map's own."""
        _, values = linear_logits(hidden, weight, bias, self.logit_map, parameters, self.dtype)
        return plain(values, self.terms, False)

    def run(
        self, inputs: tuple[Any, ...], shares: Tensor | None, wanted: Sequence[bool] | None
    ) -> tuple[Tensor, Tensors | None]:
        """Losses and gradients, chunk by chunk."""
        return bound(
            self.logit_map, inputs[3:], lambda: self._of_chunks(*inputs[:3], shares=shares, wanted=wanted)
        )

    def _of_chunks(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        shares: Tensor | None,
        wanted: Sequence[bool] | None,
    ) -> tuple[Tensor, Tensors | None]:
        chunks = LinearChunks(hidden, weight, bias, self.logit_map, self.dtype)
        if wanted is not None:
            chunks.want(wanted)
        terms = self.terms if shares is None else self.terms.scaled(shares)
        losses = chunk_losses(chunks, terms, form=wanted is not None)
        return losses, None if wanted is None else chunks.gradients()


def chunk_losses(
    chunks: LinearChunks,
    terms: RowTerms,
    *,
    form: bool,  # whether to form the gradients
    weigh: Callable[[slice, Tensor], Tensor] | None = None,
) -> Tensor:  # (N,)
    """The losses of all rows, by the compiled kernel where it serves.

    With `weigh` the gradients are those of the losses times `weigh(rows, losses)`, `(n,)`: factors that are known
    only once the losses of these rows are.
    """
    hidden, map_pass = chunks.hidden, chunks.map_pass
    # No kernel handles barred classes; the gradient of a map's parameters needs the factors before it has run.
    known = terms.ids.dim() == 1 and chunks.barred is None and not (weigh is not None and chunks.map_wanted)
    smoothed, kernel_map = terms.soft is not None, None
    backend = softmax_rows_backend_for(hidden.device, hidden.dtype, label_smoothing=smoothed)
    if known and backend == "compiled":
        kernel_map = NO_MAP if map_pass is None else map_pass.logit_map.kernel_map()
    losses = hidden.new_empty(len(hidden), dtype=chunks.exact)
    for rows in chunks:
        factors = None
        if kernel_map is not None:
            kernel_map = kernel_map._replace(counted=chunks.map_wanted)
            losses[rows], sums = fused(chunks.multiply(rows), chunks.bias, terms.of(rows), form, kernel_map)
            chunks.add_to_map(sums)
            factors = None if weigh is None else weigh(rows, losses[rows])
        else:
            for part in chunks.parts(rows):
                logits = chunks.logits(part)
                values = chunks.map(logits)
                losses[part] = plain(values, terms.of(part), form)
                of_part = None if weigh is None else weigh(part, losses[part])
                if form:
                    values = values if of_part is None else values.mul_(of_part[:, None])
                    chunks.map_back(part, logits, values)
        if form:
            chunks.multiply_back(rows, factors)
    return losses


def loss_of(
    rows: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    loss: RowLoss,
    *,
    reduced: bool,
) -> Tensor:  # (), or (N,)
    """The loss of the logits of a linear layer, or of each row; nothing is checked."""
    parameters = () if loss.logit_map is None else tuple(loss.logit_map.parameters())
    inputs = rows, weight, bias, *parameters
    return one_pass_loss(loss, inputs, reduced=reduced, constants=(loss.terms.ids,))


def linear_nll(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    ids: Tensor,  # (N,), valid classes
    bias: Tensor | None = None,  # (V,)
    *,
    scale: float = 1.0,
) -> Tensor:  # ()
    """`scale * F.cross_entropy(hidden @ weight.T + bias, ids, reduction="sum")`, for layers made of several such.

    The gradients are formed in the forward pass with the factor in them, so a mean over rows that several products
    share costs no second pass over any gradient. Nothing is checked.
    """
    dtype = product_dtype(hidden)
    terms = RowTerms(ids, hidden.new_full((len(ids),), scale, dtype=exact_dtype(dtype)))
    return loss_of(hidden, weight, bias, RowLoss(terms, dtype), reduced=True)


def row_terms(
    target: TargetRows,
    class_weights: Tensor | None,
    smoothing: float,
    z_loss: float,
    num_classes: int,
    reduction: str,
    dtype: torch.dtype,
) -> tuple[RowTerms, Tensor | float]:
    """The coefficients of every row; and what to add to a mean: nan where it is over nothing, else 0.

    A mean is over the rows, or over the class weights of their one class, as in `F.cross_entropy`.
    """
    exact = exact_dtype(dtype)
    ids, weights, kept, dense = target
    counted = torch.ones(len(ids), dtype=exact, device=ids.device) if kept is None else kept.to(exact)
    if weights is None:
        ids, of_targets = ids.masked_fill(counted == 0, 0), counted
    else:
        of_targets = weights.to(exact) * counted[:, None]
    if class_weights is not None:
        class_weights = class_weights.detach().to(device=ids.device, dtype=exact)
        of_targets = class_weights[ids] * of_targets
    share, square_share, absent = 1.0, 1.0, 0.0
    if reduction == "mean":
        whole = of_targets.sum() if weights is None else counted.sum()
        absent = whole / whole - 1
        share, square_share = whole.reciprocal().nan_to_num(posinf=0.0), 1 / counted.sum().clamp(min=1)
    terms = RowTerms(
        ids,
        (1 - smoothing) * share * of_targets,
        smoothing / num_classes * share * counted if smoothing else None,
        z_loss * square_share * counted if z_loss else None,
        class_weights,
        dense,
        None if dense is None else (1 - smoothing) * share * counted,
    )
    return terms, absent

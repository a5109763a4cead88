"""The terms of a softmax over a part of its classes, from which those over all are put together."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.linear_chunks import LinearChunks, linear_logits
from lastlayer.functional.logit_map import LogitMap, bound, map_barred
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.functional.selection import Selection

# In place of -inf, which is what all logits are where all classes are barred: differences of it are not NaN.
LEAST = -1e30


class PartialSoftmax(NamedTuple):
    """Of N rows over some classes, with f the (mapped) logits; float32 at least.

    Logits are relative to the row's largest, so that one large number that all share costs no digits. All parts'
    terms relative to one peak are `log_mass + peak_of_part - peak`, and so on: the peak is a constant, no gradient
    flows through it.
    """

    peak: Tensor  # (N,), max f
    log_mass: Tensor  # (N,), log Σ_c exp(f_c - peak); at most LEAST where all classes are barred, or there is none
    at: Tensor  # (N, M), f - peak at M classes a row
    weighted: Tensor  # (N,), Σ_c u_c (f_c - peak) with weights u; 0 without


def partial_softmax(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (W, d), of some classes
    bias: Tensor | None,  # (W,)
    ids: Tensor,  # (N, M), from 0 to W - 1
    *,
    logit_map: LogitMap | None = None,
    weights: Tensor | None = None,  # (W,), or (N, W)
    least_chunks: int | None = None,
) -> PartialSoftmax:
    """Peak, mass and some logits of `f = logit_map(hidden @ weight.T + bias)`, in chunks; nothing is checked.

    Differentiable for hidden, weight, bias and the map's parameters; the backward pass recomputes the chunks.
    Cost: one matrix product of `2 N W d` operations forward and three backward; memory one chunk of logits, of
    which there are `least_chunks` unless that would make them smaller than 1 MB (on a GPU 32 MB).
    """
    parameters = () if logit_map is None else tuple(logit_map.parameters())
    dtype = product_dtype(hidden)
    if not len(weight):
        return _nothing(hidden, ids, exact_dtype(dtype), (weight, bias, *parameters))
    weights = None if weights is None else weights.detach().to(exact_dtype(dtype))
    if not ordinary(hidden, weight, bias, ids, *parameters):
        return _plain(hidden, weight, bias, ids, weights, logit_map, parameters, dtype)
    with no_autocast(hidden.device.type):
        settings = logit_map, dtype, least_chunks
        found: Any = _PartialSoftmax.run(hidden, weight, bias, ids, weights, settings, *parameters)
    return PartialSoftmax(*found)


def _nothing(
    hidden: Tensor, ids: Tensor, exact: torch.dtype, parameters: Sequence[Tensor | None]
) -> PartialSoftmax:
    zero = zeros_from(hidden, parameters, exact)
    return PartialSoftmax(zero.detach() + LEAST, zero + LEAST, zero[:, None].expand(ids.shape), zero)


def zeros_from(hidden: Tensor, parameters: Iterable[Tensor | None], dtype: torch.dtype) -> Tensor:
    """What no class gives for hidden states `(N, d)`, `(N,)` zeros: gradients of 0 flow through them to all."""
    zero = hidden[:, :0].sum(1, dtype=dtype)
    for parameter in parameters:
        if parameter is not None:
            zero = zero + parameter.reshape(-1)[:0].sum(dtype=dtype)
    return zero


def _plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    weights: Tensor | None,
    logit_map: LogitMap | None,
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
) -> PartialSoftmax:
    """The same by PyTorch's own operations."""
    _, values = linear_logits(hidden, weight, bias, logit_map, parameters, dtype)
    peak = values.detach().amax(1).clamp(min=LEAST)
    shifted = values - peak[:, None]
    log_mass = shifted.clamp(min=2 * LEAST).logsumexp(1)
    weighted = torch.zeros_like(peak) if weights is None else _weighted(shifted, weights)
    return PartialSoftmax(peak, log_mass, shifted.gather(1, ids), weighted)


def _weighted(shifted: Tensor, weights: Tensor) -> Tensor:  # (n, W), (W,) or (n, W) to (n,)
    """A weight of 0 counts nothing, also at -inf."""
    return (weights * shifted.masked_fill(weights == 0, 0)).sum(1)


class _PartialSoftmax(HandWritten):
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        weights: Tensor | None,
        settings: tuple[LogitMap | None, torch.dtype, int | None],
        *parameters: Tensor,
    ) -> PartialSoftmax:
        logit_map, dtype, least = settings
        chunks = LinearChunks(hidden, weight, bias, logit_map, dtype, least=least)
        peak, log_mass = (hidden.new_empty(len(hidden), dtype=chunks.exact) for _ in range(2))
        weighted = hidden.new_zeros(len(hidden), dtype=chunks.exact)
        at = hidden.new_empty(ids.shape, dtype=chunks.exact)
        for part in chunks.all_parts():
            values = chunks.map(chunks.logits(part))
            peak[part] = values.amax(1).clamp_(min=LEAST)
            values.sub_(peak[part, None])
            at[part] = values.gather(1, ids[part])
            if weights is not None:
                weighted[part] = _weighted(values, weights if weights.dim() == 1 else weights[part])
            log_mass[part] = values.exp_().sum(1).log_().clamp_(min=LEAST)
        return PartialSoftmax(peak, log_mass, at, weighted)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.settings = inputs[:6]
        peak, log_mass, *_ = output
        ctx.save_for_backward(*tensors, peak, log_mass, *inputs[6:])
        ctx.mark_non_differentiable(peak)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        """With p_c = exp(f_c - peak - log_mass) and [.] an indicator:

        d log_mass / d f_c = p_c        d at_m / d f_c = [c = i_m]        d weighted / d f_c = u_c
        """
        hidden, weight, bias, ids, weights, peak, log_mass, *parameters = ctx.saved_tensors
        (logit_map, dtype, least), needs = ctx.settings, ctx.needs_input_grad

        def form() -> tuple[Tensor | None, ...]:
            chunks = LinearChunks(hidden, weight, bias, logit_map, dtype, least=least)
            chunks.want([*needs[:3], *needs[6:]])
            return _form(chunks, upstream, ids, weights, peak, log_mass)

        def twin(hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor) -> tuple[Tensor, ...]:
            return _plain(hidden, weight, bias, ids, weights, logit_map, parameters, dtype)[1:]

        inputs = hidden, weight, bias, *parameters
        found = gradients(lambda: bound(logit_map, parameters, form), twin, inputs, upstream[1:])
        return *found[:3], None, None, None, *found[3:]


def _form(
    chunks: LinearChunks,
    upstream: tuple[Tensor, ...],
    ids: Tensor,
    weights: Tensor | None,
    peak: Tensor,
    log_mass: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of `_PartialSoftmax`, chunk by chunk."""
    _, of_mass, of_at, of_weighted = upstream
    for rows in chunks:
        for part in chunks.parts(rows):
            logits = chunks.logits(part)
            gradient = (chunks.map(logits) - peak[part, None]).sub_(log_mass[part, None]).exp_()
            gradient.mul_(of_mass[part, None])
            gradient.scatter_add_(1, ids[part], of_at[part])
            if weights is not None:
                own = weights if weights.dim() == 1 else weights[part]
                gradient.addcmul_(own.expand_as(gradient), of_weighted[part, None])
            chunks.map_back(part, logits, gradient)
        chunks.multiply_back(rows)
    return chunks.gradients()


class BestOfPart(NamedTuple):
    """The best of some classes, by their raw logits, with peak and mass of all of them."""

    logits: Tensor  # (N, k), raw, falling; -inf where fewer are left
    ids: Tensor  # (N, k), among the part's classes
    peak: Tensor  # (N,), as in `PartialSoftmax`
    log_mass: Tensor  # (N,)


@torch.no_grad()
def best_of_part(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (W, d)
    bias: Tensor | None,  # (W,)
    k: int,
    *,
    logit_map: LogitMap | None = None,
    selection: Selection | None = None,  # of these classes
    least_chunks: int | None = None,
) -> BestOfPart:
    """The `k` best of some classes in one pass over chunks; of fewer than `k` classes, the rest are -inf."""
    chunks_dtype = product_dtype(hidden)
    exact = exact_dtype(chunks_dtype)
    peak, log_mass = (hidden.new_full((len(hidden),), LEAST, dtype=exact) for _ in range(2))
    best = hidden.new_full((len(hidden), k), -torch.inf, dtype=exact)
    ids = torch.zeros_like(best, dtype=torch.int64)
    if not len(weight):
        return BestOfPart(best, ids, peak, log_mass)
    count = min(k, len(weight))
    with no_autocast(hidden.device.type):
        chunks = LinearChunks(hidden, weight, bias, logit_map, chunks_dtype, least=least_chunks)
        for part in chunks.all_parts():
            logits = chunks.logits(part)
            found = (logits if selection is None else selection.rows(part).bar(logits)).topk(count)
            best[part, :count], ids[part, :count] = found
            values = chunks.map(logits)
            peak[part] = values.amax(1).clamp_(min=LEAST)
            log_mass[part] = values.sub_(peak[part, None]).exp_().sum(1).log_().clamp_(min=LEAST)
    return BestOfPart(best, ids, peak, log_mass)


def mapped(logits: Tensor, logit_map: LogitMap | None) -> Tensor:
    """`logit_map(logits)`, but -inf where a raw logit is."""
    return logits if logit_map is None else map_barred(logit_map, logits, logits == -torch.inf)

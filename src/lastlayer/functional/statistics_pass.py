"""The pass of `linear_statistics` over flat rows: its chunks, its backward pass, and its plain twin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.linear_chunks import Gradients, LinearChunks, Wanted
from lastlayer.functional.linear_twin import linear_logits, log_normalizer
from lastlayer.functional.logit_map import LogitMap, bound
from lastlayer.functional.ordinary import ordinary
from lastlayer.functional.precision import no_autocast
from lastlayer.functional.reference_head import ReferenceChunks, ReferenceHead, reference_log_prob
from lastlayer.functional.second_order import HandWritten, gradients
from lastlayer.functional.selection import Selection


class StatisticsSettings(NamedTuple):
    """What is computed, of which logits."""

    dtype: torch.dtype  # of the matrix products
    logit_map: LogitMap | None = None
    temperature: float = 1.0
    k: int | None = None
    selection: Selection | None = None
    reference: ReferenceHead | None = None  # its hidden states as rows

    def begin(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, compare: bool
    ) -> tuple[LinearChunks, ReferenceChunks | None]:
        """The chunks of a pass, and those of the reference if there is one to compare with."""
        if self.reference is None or not compare:
            return LinearChunks(hidden, weight, bias, self.logit_map, self.dtype), None
        chunks = LinearChunks(hidden, weight, bias, self.logit_map, self.dtype, buffers=2)
        return chunks, ReferenceChunks(self.reference, self.temperature, self.dtype)


class RowStatistics(NamedTuple):
    """The results of N rows; of what was not requested, no columns. The last two carry no gradient."""

    gathered: Tensor  # (N, M), log-probabilities of ids
    log_normalizer: Tensor  # (N,)
    entropy: Tensor  # (N,)
    best: Tensor  # (N, k), log-probabilities of indices
    kl: Tensor  # (N, 1), (N, 0) without a reference
    indices: Tensor  # (N, k)
    reference: Tensor  # (N, M), the reference's log-probabilities of ids; (N, 0) without one


DIFFERENTIABLE = 5  # of the fields


def row_statistics(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    ids: Tensor | None,  # (N, M), valid classes
    settings: StatisticsSettings,
) -> RowStatistics:
    """The statistics of flat rows; nothing is checked."""
    parameters = () if settings.logit_map is None else tuple(settings.logit_map.parameters())
    others = () if settings.reference is None else settings.reference[:3]
    if not ordinary(hidden, weight, bias, ids, *others, *parameters):
        return RowStatistics(*_plain(hidden, weight, bias, ids, settings, parameters))
    with no_autocast(hidden.device.type):
        found: Any = _RowStatistics.run(hidden, weight, bias, ids, settings, *parameters)
    return RowStatistics(*found[: len(RowStatistics._fields)])


def _plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    settings: StatisticsSettings,
    parameters: Sequence[Tensor],
    indices: Tensor | None = None,  # (N, k); None: they are computed
) -> tuple[Tensor, ...]:
    """The fields of `RowStatistics` by PyTorch's own operations."""
    dtype, logit_map, temperature, k, selection, other = settings
    logits, values = linear_logits(hidden, weight, bias, logit_map, parameters, dtype)
    values = values / temperature
    log_prob = values.log_softmax(1)
    prob = log_prob.exp()
    bounded = log_prob.clamp(min=-1e4)
    entropy = -(prob * bounded).sum(1)
    if indices is None:
        found = (logits if selection is None else selection.bar(logits)).topk(k or 0)
        indices = found.indices.masked_fill(found.values == -torch.inf, -1)
    best = log_prob.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -torch.inf)
    kl = of_reference = log_prob[:, :0]
    if other is not None:
        reference = reference_log_prob(other, temperature, dtype)
        kl = (prob * (bounded - reference).masked_fill(prob == 0, 0)).sum(1, keepdim=True)
        of_reference = reference[:, :0] if ids is None else reference.gather(1, ids)
    gathered = log_prob[:, :0] if ids is None else log_prob.gather(1, ids)
    return gathered, log_normalizer(values), entropy, best, kl, indices, of_reference


class _RowStatistics(HandWritten):
    """The fields of `RowStatistics`, then what the backward pass needs: the normaliser as peak and log_mass, since
    their sum would round away digits where the peak is large."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        settings: StatisticsSettings,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        return _run(hidden, weight, bias, ids, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, ids, ctx.settings, *parameters = inputs
        _, _, entropy, _, kl, indices, of_reference, peak, log_mass = output
        ctx.save_for_backward(hidden, weight, bias, ids, indices, peak, log_mass, entropy, kl, *parameters)
        ctx.mark_non_differentiable(indices, of_reference, peak, log_mass)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        """With p the probabilities, q the reference's, H the entropy, [.] an indicator, f the mapped logits:

        d gathered_j / d f_c = [c = id_j] - p_c   d normalizer / d f_c = p_c
        d best_j / d f_c = [c = i_j] - p_c        d entropy / d f_c = -p_c (log p_c + H)
        d kl / d f_c = p_c (log p_c - log q_c - kl)

        each divided by the temperature, which divides f.
        """
        hidden, weight, bias, ids, indices, peak, log_mass, entropy, kl, *parameters = ctx.saved_tensors
        settings, needs = ctx.settings, ctx.needs_input_grad

        def form() -> tuple[Tensor | None, ...]:
            chunks, other = settings.begin(hidden, weight, bias, compare=upstream[4] is not None)
            chunks.want(Wanted(needs[0], needs[1], needs[2], any(needs[5:])))
            of_rows = _OfRows(peak, log_mass, entropy, kl)
            formed = _form(chunks, other, settings.temperature, upstream, ids, indices, of_rows)
            return *formed[:3], *formed.logit_map

        def twin(hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor) -> tuple[Tensor, ...]:
            return _plain(hidden, weight, bias, ids, settings, parameters, indices)[:DIFFERENTIABLE]

        inputs = hidden, weight, bias, *parameters
        bound_form = lambda: bound(settings.logit_map, parameters, form)  # noqa: E731
        found = gradients(bound_form, twin, inputs, upstream[:DIFFERENTIABLE])
        return *found[:3], None, None, *found[3:]


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None, settings: StatisticsSettings
) -> tuple[Tensor, ...]:
    """The outputs of `_RowStatistics`, chunk by chunk."""
    chunks, other = settings.begin(hidden, weight, bias, compare=True)
    columns = 0 if ids is None else ids.shape[1]

    def empty(*shape: int) -> Tensor:
        return hidden.new_empty(len(hidden), *shape, dtype=chunks.exact)

    peak, log_mass, entropy, gathered, best = empty(), empty(), empty(), empty(columns), empty(settings.k or 0)
    kl, of_reference = empty(int(other is not None)), empty(0 if other is None else columns)
    indices = torch.empty_like(best, dtype=torch.int64)
    for rows in chunks:
        if other is not None:
            other.multiply(rows)
        for part in chunks.parts(rows):
            logits = chunks.logits(part)
            if settings.k is not None:
                indices[part] = _best_indices(logits, part, settings)
            values = chunks.map(logits)
            if settings.temperature != 1:
                values.div_(settings.temperature)
            peak[part] = values.amax(1)
            shifted = values - peak[part, None]
            at_best = shifted.gather(1, indices[part].clamp(min=0))
            at_ids = None if ids is None else shifted.gather(1, ids[part])
            _bound_(shifted)
            mass = torch.exp(shifted, out=values).sum(1)
            log_mass[part] = mass.log()
            entropy[part] = log_mass[part] - torch.einsum("nv,nv->n", values, shifted) / mass
            best[part] = (at_best - log_mass[part, None]).masked_fill_(indices[part] < 0, -torch.inf)
            if at_ids is not None:
                gathered[part] = at_ids - log_mass[part, None]
            if other is not None:
                reference = other.log_prob(part)
                gap = shifted.sub_(log_mass[part, None]).sub_(reference).masked_fill_(values == 0, 0)
                kl[part, 0] = torch.einsum("nv,nv->n", values, gap) / mass
                if ids is not None:
                    of_reference[part] = reference.gather(1, ids[part])
    return gathered, peak + log_mass, entropy, best, kl, indices, of_reference, peak, log_mass


def _bound_(log_prob: Tensor) -> Tensor:
    """`log_prob`, bounded in place for sums that weigh it: a class of probability 0 adds 0, not nan."""
    return log_prob.clamp_(min=-1e4)  # no constant of the module, which `dynamic=True` would make a symbol


def _best_indices(logits: Tensor, part: slice, settings: StatisticsSettings) -> Tensor:  # (n, V) to (n, k)
    """The classes of the largest raw logits that the selection leaves, -1 where there are none."""
    left = logits if settings.selection is None else settings.selection.rows(part).bar(logits)
    found = left.topk(settings.k or 0)
    return found.indices.masked_fill(found.values == -torch.inf, -1)


class _OfRows(NamedTuple):
    """What the backward pass knows of each row."""

    peak: Tensor  # (N,)
    log_mass: Tensor  # (N,)
    entropy: Tensor  # (N,)
    kl: Tensor  # (N, 0 or 1)


def _form(
    chunks: LinearChunks,
    other: ReferenceChunks | None,
    temperature: float,
    upstream: Sequence[Tensor | None],
    ids: Tensor | None,
    indices: Tensor,
    of_rows: _OfRows,
) -> Gradients:
    """The gradients of `_RowStatistics`, chunk by chunk."""
    peak, log_mass, entropy, kl = of_rows
    of_gathered, of_normalizer, of_entropy, of_best, of_kl, *_ = upstream
    of_mass = torch.zeros_like(log_mass)  # what p_c is multiplied by
    if of_normalizer is not None:
        of_mass += of_normalizer
    if of_gathered is not None:
        of_mass -= of_gathered.sum(1)
    if of_best is not None:
        of_best, indices = of_best.masked_fill(indices < 0, 0.0), indices.clamp(min=0)
        of_mass -= of_best.sum(1)
    for rows in chunks:
        if other is not None:
            other.multiply(rows)
        for part in chunks.parts(rows):
            logits = chunks.logits(part)
            values = chunks.map(logits)
            if temperature != 1:
                values.div_(temperature)
            log_prob = (values - peak[part, None]).sub_(log_mass[part, None])
            gradient = log_prob.exp()
            factor = of_mass[part, None]
            if of_entropy is not None or other is not None:
                _bound_(log_prob)
            if other is not None and of_kl is not None:
                gap = (log_prob - other.log_prob(part)).masked_fill_(gradient == 0, 0)
                factor = gap.sub_(kl[part]).mul_(of_kl[part]).add_(factor)
            if of_entropy is not None:
                factor = log_prob.add_(entropy[part, None]).mul_(-of_entropy[part, None]).add_(factor)
            gradient.mul_(factor)
            if of_gathered is not None and ids is not None:
                gradient.scatter_add_(1, ids[part], of_gathered[part])
            if of_best is not None:
                gradient.scatter_add_(1, indices[part], of_best[part])
            if temperature != 1:
                gradient.div_(temperature)
            chunks.map_back(part, logits, gradient)
        chunks.multiply_back(rows)
    return chunks.gradients()

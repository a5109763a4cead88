"""The pass of `linear_statistics` over flat rows: its chunks, its backward pass, and its plain twin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.linear_chunks import LinearChunks, linear_logits
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

    def cooled(self, values: Tensor) -> Tensor:
        """`values / temperature`."""
        return values if self.temperature == 1 else values / self.temperature

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
    if not hidden.shape[0] or not ordinary(hidden, weight, bias, ids, *others, *parameters):
        return _plain(hidden, weight, bias, ids, settings, parameters)
    with no_autocast(hidden.device.type):
        found: Any = _RowStatistics.run(hidden, weight, bias, ids, settings, *parameters)
    return RowStatistics(*found)


def _plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor | None,
    settings: StatisticsSettings,
    parameters: Sequence[Tensor],
    indices: Tensor | None = None,
) -> RowStatistics:
    """By PyTorch's own operations, of all rows at once."""
    dtype, logit_map, temperature, _, _, other = settings
    logits, values = linear_logits(hidden, weight, bias, logit_map, parameters, dtype)
    reference = None if other is None else reference_log_prob(other, temperature, dtype)
    return _of_logits(logits, values / temperature, ids, reference, settings.k, settings.selection, indices)


def _of_logits(
    logits: Tensor,  # (n, V), raw
    values: Tensor,  # (n, V), mapped, and divided by the temperature
    ids: Tensor | None,  # (n, M)
    reference: Tensor | None,  # (n, V), log-probabilities
    k: int | None,
    selection: Selection | None,  # of these rows
    indices: Tensor | None = None,  # (n, k); None: they are computed
) -> RowStatistics:
    """The statistics of some rows, differentiable for `values`."""
    if indices is None:
        found = (logits if selection is None else selection.bar(logits)).topk(k or 0)
        indices = found.indices.masked_fill(found.values == -torch.inf, -1)
    peak, shifted, mass = _masses(values)
    total = mass.sum(1, keepdim=True)
    log_total = total.log()
    bounded = _bounded(shifted)
    kl = of_reference = nothing = values[:, :0]
    if reference is not None:
        gap = (bounded - log_total - reference).masked_fill(mass == 0, 0)
        kl = torch.einsum("nv,nv->n", mass, gap)[:, None] / total
        of_reference = nothing if ids is None else reference.gather(1, ids)
    return RowStatistics(
        nothing if ids is None else shifted.gather(1, ids) - log_total,
        (peak + log_total)[:, 0],
        log_total[:, 0] - torch.einsum("nv,nv->n", mass, bounded) / total[:, 0],
        (shifted.gather(1, indices.clamp(min=0)) - log_total).masked_fill(indices < 0, -torch.inf),
        kl,
        indices,
        of_reference,
    )


def _masses(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest value of each row, `(n, 1)`, a constant; the values less it; and the exponentials of these.

    Subtracted first of all, a large common part of the values costs no digits.
    """
    peak = values.detach().amax(1, keepdim=True)
    shifted = values - peak
    return peak, shifted, shifted.exp()


def _bounded(shifted: Tensor) -> Tensor:
    """For sums that weigh it: a class of probability 0 adds 0, not nan."""
    return shifted.clamp(min=-1e4)  # no constant of the module, which `dynamic=True` would make a symbol


def _gradient(
    values: Tensor,  # (n, V)
    upstream: Sequence[Tensor | None],  # of the differentiable fields
    ids: Tensor | None,
    indices: Tensor,
    reference: Tensor | None,
) -> Tensor:  # (n, V)
    """The gradient of `_of_logits` for `values`.

    With p the probabilities, l their logarithms, m the mean of l, and g the difference of l to the reference's, of
    which KL is the mean,

    d log_normalizer = p_c    d l_i = [c = i] - p_c    d entropy = -p_c (l_c - m)    d kl = p_c (g_c - KL)
    """
    of_gathered, of_normalizer, of_entropy, of_best, of_kl = upstream
    _, shifted, mass = _masses(values)
    total = mass.sum(1, keepdim=True)
    factor = torch.zeros_like(total)
    if of_normalizer is not None:
        factor += of_normalizer[:, None]
    for part in (of_gathered, of_best):
        if part is not None:
            factor -= part.sum(1, keepdim=True)
    bounded = _bounded(shifted)
    if of_kl is not None and reference is not None:
        gap = (bounded - reference).masked_fill_(mass == 0, 0)
        gap -= torch.einsum("nv,nv->n", mass, gap)[:, None] / total
        factor = gap.mul_(of_kl).add_(factor)
    if of_entropy is not None:
        bounded -= torch.einsum("nv,nv->n", mass, bounded)[:, None] / total
        factor = bounded.mul_(-of_entropy[:, None]).add_(factor)
    gradient = mass.mul_(factor).div_(total)
    if of_gathered is not None and ids is not None:
        gradient.scatter_add_(1, ids, of_gathered)
    if of_best is not None:
        gradient.scatter_add_(1, indices.clamp(min=0), of_best)
    return gradient


class _RowStatistics(HandWritten):
    """The fields of `RowStatistics`, chunk by chunk."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor | None,
        settings: StatisticsSettings,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        chunks, other = settings.begin(hidden, weight, bias, compare=True)
        found = []
        for rows in chunks:
            if other is not None:
                other.multiply(rows)
            for part in chunks.parts(rows):
                logits = chunks.logits(part)
                selection = None if settings.selection is None else settings.selection.rows(part)
                own_ids = None if ids is None else ids[part]
                reference = None if other is None else other.log_prob(part)
                values = settings.cooled(chunks.map(logits))
                found.append(_of_logits(logits, values, own_ids, reference, settings.k, selection))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, ids, ctx.settings, *parameters = inputs
        indices = output[DIFFERENTIABLE]
        ctx.save_for_backward(hidden, weight, bias, ids, indices, *parameters)
        ctx.mark_non_differentiable(*output[DIFFERENTIABLE:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, indices, *parameters = ctx.saved_tensors
        settings, needs, upstream = ctx.settings, ctx.needs_input_grad, upstream[:DIFFERENTIABLE]

        def form() -> tuple[Tensor | None, ...]:
            chunks, other = settings.begin(hidden, weight, bias, compare=upstream[4] is not None)
            chunks.want([*needs[:3], *needs[5:]])
            best = None if upstream[3] is None else upstream[3].masked_fill(indices < 0, 0.0)
            known = [*upstream[:3], best, upstream[4]]
            for rows in chunks:
                if other is not None:
                    other.multiply(rows)
                for part in chunks.parts(rows):
                    logits = chunks.logits(part)
                    values = settings.cooled(chunks.map(logits))
                    gradient = _gradient(
                        values,
                        [None if part_of is None else part_of[part] for part_of in known],
                        None if ids is None else ids[part],
                        indices[part],
                        None if other is None else other.log_prob(part),
                    )
                    chunks.map_back(part, logits, settings.cooled(gradient))
                chunks.multiply_back(rows)
            return chunks.gradients()

        def twin(hidden: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor) -> tuple[Tensor, ...]:
            return _plain(hidden, weight, bias, ids, settings, parameters, indices)[:DIFFERENTIABLE]

        inputs = hidden, weight, bias, *parameters
        found = gradients(lambda: bound(settings.logit_map, parameters, form), twin, inputs, upstream)
        return *found[:3], None, None, *found[3:]

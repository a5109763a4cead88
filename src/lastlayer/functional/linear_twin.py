"""The logits of a linear layer and their loss by PyTorch's own operations, on the whole `(N, V)` tensor.

The plain twin of what `linear_chunks` does a chunk at a time: for second derivatives, `torch.func`, "meta" and
exported programs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.functional.barred import barred_classes, map_barred
from lastlayer.functional.logit_map import LogitMap, bound
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype
from lastlayer.kernels.softmax_rows import RowTerms


def linear_logits(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    logit_map: LogitMap | None,
    parameters: Sequence[Tensor],  # of the map
    dtype: torch.dtype,  # of the product
) -> tuple[Tensor, Tensor]:  # (N, V) each, float32 at least
    """The raw logits `hidden @ weight.T + bias`, and the mapped ones."""
    exact = exact_dtype(dtype)
    with no_autocast(hidden.device.type):
        logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(exact)
        if bias is not None:
            logits = logits + bias.to(exact)
        if logit_map is None:
            return logits, logits
        barred = barred_classes(bias)
        return logits, bound(logit_map, parameters, lambda: map_barred(logit_map, logits, barred))


def mapped_logits(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    logit_map: LogitMap | None,
) -> Tensor:  # (N, V), float32 at least
    """`logit_map(hidden @ weight.T + bias)`, whose product runs in autocast's dtype where that is on."""
    parameters = () if logit_map is None else tuple(logit_map.parameters())
    return linear_logits(hidden, weight, bias, logit_map, parameters, product_dtype(hidden))[1]


def log_normalizer(values: Tensor) -> Tensor:  # (N, V) to (N,)
    """`values.logsumexp(1)`, whose own gradient would lose digits where all values are large."""
    peak = values.detach().amax(1, keepdim=True)
    return peak[:, 0] + (values - peak).logsumexp(1)


def row_loss(
    values: Tensor,  # (N, V), mapped logits
    terms: RowTerms,
    of_all: tuple[Tensor, Tensor | float] | None = None,  # (N, V) weights of all classes; what to add
) -> Tensor:  # (N,)
    """The loss of every row, as `kernels.softmax_rows` defines it."""
    ids, hard, soft, square, class_weights, dense_scale = terms
    if ids.dim() == 1:
        ids, hard = ids[:, None], hard[:, None]
    log_prob = values.log_softmax(1)
    loss = -(hard * log_prob.gather(1, ids).masked_fill(hard == 0, 0)).sum(1)
    if soft is not None:
        loss = loss - soft * (log_prob if class_weights is None else log_prob * class_weights).sum(1)
    if of_all is not None and dense_scale is not None:
        dense = of_all[0] if class_weights is None else of_all[0] * class_weights
        loss = loss + dense_scale * (of_all[1] - (dense * log_prob.masked_fill(dense == 0, 0)).sum(1))
    if square is not None:
        loss = loss + square * log_normalizer(values).square()
    return loss

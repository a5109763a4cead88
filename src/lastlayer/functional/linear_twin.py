"""The logits of a linear layer by PyTorch's own operations, the whole `(N, V)` tensor.

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

"""All log-probabilities of a linear layer's softmax: what returns the whole `(N, V)` tensor."""

import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer.functional.barred import barred_classes, map_barred
from lastlayer.functional.precision import as_exact, no_autocast


def linear_log_prob(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    logit_map: nn.Module | None,
) -> Tensor:  # (N, V), float32 at least
    """`log_softmax(f(hidden @ weight.T + bias))`; what follows the product is in float32 at least."""
    return mapped_logits(hidden, weight, bias, logit_map).log_softmax(-1)


def mapped_logits(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    logit_map: nn.Module | None,
) -> Tensor:  # (N, V), float32 at least
    """`f(hidden @ weight.T + bias)`."""
    logits = as_exact(F.linear(hidden, weight))
    if bias is not None:
        logits = logits + bias
    if logit_map is not None:
        with no_autocast(hidden.device.type):
            logits = map_barred(logit_map, logits, barred_classes(bias))
    return logits

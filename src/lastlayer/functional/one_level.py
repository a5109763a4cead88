"""The parameters of a two-level softmax from those of a full one, and of the full one nearest to it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.segments import row_clusters
from lastlayer.functional.two_level import TwoLevel


def two_levels(
    weight: Tensor,  # (V, d), cluster after cluster
    bias: Tensor | None,  # (V,), likewise
    offsets: Tensor,  # (C + 1,): cluster c holds the rows from offsets[c] up to offsets[c + 1]
) -> TwoLevel:
    """A full softmax's vectors inside the clusters, their means above.

    A cluster's bias is the log-sum-exp of its classes' biases: where hidden is 0, both are the same model.
    """
    sizes = offsets.diff()
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    sums = weight.new_zeros(len(sizes), weight.shape[1]).index_add_(0, row_clusters(offsets, len(weight)), weight)
    head_bias = torch.stack([own.logsumexp(0) for own in bias.split(sizes.tolist())])
    return TwoLevel(sums / sizes[:, None], head_bias, weight, bias)


def one_level(
    parameters: TwoLevel,
    offsets: Tensor,  # (C + 1,)
    at: Tensor,  # (d,)
) -> tuple[Tensor, Tensor]:  # (V, d), (V,), cluster after cluster
    """Weight and bias of the full softmax that is nearest to a two-level one around the hidden state `at`.

    The logit of a class is its own, plus its cluster's, less its cluster's normaliser: which is not linear in the
    hidden state, and is expanded to first order.
    """
    sizes = offsets.diff()
    logits = F.linear(at, parameters.weight, parameters.bias)
    shift, shift_at = parameters.head_weight.clone(), F.linear(at, parameters.head_weight, parameters.head_bias)
    by_cluster = (tensor.split(sizes.tolist()) for tensor in (logits, parameters.weight))
    for c, (own, rows) in enumerate(zip(*by_cluster, strict=True)):
        shift[c] -= own.softmax(0) @ rows
        shift_at[c] -= own.logsumexp(0)
    clusters = row_clusters(offsets, len(logits))
    weight = parameters.weight + shift[clusters]
    return weight, logits + shift_at[clusters] - weight @ at

"""The plain twin of `two_level_log_prob`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.groups import Targets
from lastlayer.functional.precision import exact_dtype
from lastlayer.functional.segments import row_clusters


def plain_two_level(
    targets: Targets,
    hidden: Tensor,  # (N, d)
    head_weight: Tensor | None,  # None: the second level alone
    head_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:  # (N,)
    """`two_level_log_prob` by PyTorch's own operations on all classes: no shape depends on the targets."""
    others = row_clusters(targets.offsets, len(weight)) != targets.clusters[:, None]  # (N, V)
    inner = _logits(hidden, weight, bias).masked_fill(others, -torch.inf).log_softmax(1)
    log_prob = inner.gather(1, targets.slots[:, None])
    if head_weight is not None:
        head = _logits(hidden, head_weight, head_bias).log_softmax(1)
        log_prob = log_prob + head.gather(1, targets.clusters[:, None])
    return log_prob[:, 0]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).to(exact_dtype(hidden.dtype))
    return logits if bias is None else logits + bias.to(logits.dtype)

"""The dense twin of `FactoredOutput`: the same losses over an ordinary weight, with any optimizer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import REDUCTIONS, check_choice, check_hidden
from lastlayer.functional.reduce import reduce_loss
from lastlayer.functional.sparse_targets import sparse_targets
from lastlayer.functional.spherical import SphericalLoss


def spherical_loss(
    hidden: Tensor,  # (..., d)
    weight: Tensor,  # (V, d)
    targets: Tensor,  # (...), (..., K), or sparse (N, V)
    bias: Tensor | None = None,  # (V,)
    *,
    loss: SphericalLoss,
    target_weights: Tensor | None = None,  # the shape of targets
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:  # (), or (...) for "none"
    """`loss` of the outputs `hidden @ weight.T + bias`, by plain autograd.

    What `FactoredOutput(..., loss=loss)` computes, at O(V d) an example instead of O(d^2); use it for few
    classes, or where an optimizer other than SGD matters more than speed. Half precision is summed in float32.

    Raises:
        TypeError, ValueError, IndexError: as `FactoredOutput` does.

    Example:
        >>> import torch
        >>> from lastlayer import TaylorSoftmax
        >>> from lastlayer.functional import spherical_loss
        >>> hidden, weight = torch.ones(2, 3), torch.zeros(10, 3)
        >>> spherical_loss(hidden, weight, torch.tensor([1, 7]), loss=TaylorSoftmax())  # log 10
        tensor(2.3026)
    """
    check_choice("reduction", reduction, REDUCTIONS)
    num_classes, in_features = weight.shape
    check_hidden(hidden, in_features, weight.dtype)
    shape = hidden.shape[:-1]
    ids, weights, kept = sparse_targets(targets, target_weights, shape, num_classes, ignore_index)
    outputs = F.linear(hidden.reshape(-1, in_features), weight, bias)  # (N, V)
    if outputs.element_size() < 4:
        outputs = outputs.float()
    squared_norm = outputs.square().sum(1, dtype=torch.float64)  # few numbers, and differences of them cancel
    total = outputs.sum(1, dtype=torch.float64)
    row_loss = loss.row_loss(outputs.gather(1, ids).double(), weights, squared_norm, total, num_classes)
    row_loss = row_loss if kept is None else row_loss.masked_fill(~kept, 0)
    reduced = reduce_loss(row_loss, kept, reduction).to(outputs.dtype)
    return reduced.reshape(shape) if reduction == "none" else reduced

"""The full layer, as screening measures itself against it: logits in the working dtype, and what rounding does."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.functional.precision import exact_dtype

LEAST_GATHERED = 64
CAST_ROWS = 8192  # rows of a half-precision weight cast at once


def full_logits(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
) -> Tensor:  # (N, V)
    """`hidden @ weight.T + bias` in the working dtype; a half-precision weight is cast by blocks, never whole."""
    dtype = exact_dtype(weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    if weight.dtype == dtype:
        return F.linear(hidden.to(dtype), weight, bias)
    hidden = hidden.to(dtype)
    logits = torch.cat([hidden @ block.to(dtype).T for block in weight.split(CAST_ROWS)], dim=-1)
    return logits if bias is None else logits + bias


def logits_at(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    classes: Tensor,  # (N, C)
) -> Tensor:  # (N, C)
    """The full layer's logits of some classes of each row, from the weight's own rows.

    Gathers no more numbers at once than a row has classes (or LEAST_GATHERED rows of the weight).
    """
    dtype, (num_classes, width) = exact_dtype(weight.dtype), weight.shape
    vectors, parts = hidden.to(dtype).unsqueeze(-1), []
    for some in classes.split(max(LEAST_GATHERED, num_classes // width), dim=-1):
        rows = weight.index_select(0, some.reshape(-1)).view(*some.shape, width).to(dtype)
        parts.append(torch.matmul(rows, vectors).squeeze(-1))
    logits = torch.cat(parts, dim=-1)
    return logits if bias is None else logits + bias.to(dtype)[classes]


def size_of(
    bias: Tensor | None,  # (V,), where -inf bars a class
    norms: Tensor,  # (V,), which says dtype and device
) -> Tensor:  # (V,)
    """`|bias|`, and 0 where a class is barred: its logit is -inf whatever rounding does."""
    if bias is None:
        return torch.zeros_like(norms)
    return torch.where(bias.isinf(), 0.0, bias.abs()).to(norms.dtype)


def bias_and_size(
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
) -> tuple[Tensor, Tensor]:  # (V,), (V,)
    """The bias in the working dtype, 0 for none; and each class's `||w|| + |b|`, of which rounding is a share."""
    norms = row_norms(weight)
    own = torch.zeros_like(norms) if bias is None else bias.detach().to(norms.dtype)
    return own, norms + size_of(bias, norms)


def rounding_share(width: int, dtype: torch.dtype) -> float:
    """What rounding adds to a dot product of `width` terms, as a share of the two norms' product (or less)."""
    return (width + 4) * torch.finfo(exact_dtype(dtype)).eps


def row_norms(weight: Tensor) -> Tensor:  # (V, d) -> (V,)
    """Euclidean norms in the working dtype; the weight is cast by blocks."""
    dtype = exact_dtype(weight.dtype)
    return torch.cat([torch.linalg.vector_norm(block.to(dtype), dim=-1) for block in weight.split(CAST_ROWS)])

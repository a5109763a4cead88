"""The reductions of a row loss, written once."""

from torch import Tensor


def reduce_loss(
    row_loss: Tensor,  # (...), 0 where ignored
    kept: Tensor | None,  # (...), bool; None: every row is
    reduction: str,
) -> Tensor:  # (), or (...) for "none"
    """`row_loss` reduced as `F.cross_entropy` does: "mean" divides by the rows that are kept (none: nan)."""
    if reduction == "none":
        return row_loss
    if kept is None:
        return row_loss.sum() if reduction == "sum" else row_loss.mean()
    total = row_loss.sum()
    if reduction == "sum":
        return total
    count = kept.sum()
    return total / count.clamp(min=1) + (count / count - 1)  # nan over nothing, which no gradient sees

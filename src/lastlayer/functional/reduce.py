"""What every row loss shares: rows that are ignored, and the reduction."""

from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.ordinary import eager_on_cpu


def at_kept(
    row_values: Callable[..., Tensor],
    kept: Tensor | None,  # (N,), bool; None: every row is
    *of_rows: Tensor | None,  # (N, ...) each
) -> Tensor:  # (N,)
    """`row_values(*of_rows)` at the rows that are kept, 0 elsewhere.

    Eager on a CPU only the kept rows are computed; elsewhere, where that would need a synchronisation, all are
    computed and the ignored ones masked.
    """
    if kept is None:
        return row_values(*of_rows)
    if not eager_on_cpu(kept):
        return row_values(*of_rows).masked_fill(~kept, 0)
    at = kept.nonzero().squeeze(1)
    values = row_values(*(None if part is None else part.index_select(0, at) for part in of_rows))
    return values.new_zeros(len(kept)).index_copy(0, at, values)


def kept_rows(hidden: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """What `at_kept` takes, for one target a row: `kept`, `hidden`, and targets that are classes at every row."""
    kept = targets != ignore_index
    if eager_on_cpu(targets) and bool(kept.all()):  # the common case, in few operations
        return None, hidden, targets
    return kept, hidden, targets.masked_fill(~kept, 0)


def row_shares(kept: Tensor, reduction: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # (N,) bool to (N,), ()
    """What each row counts in a reduced loss, and what that sum lacks: nan where a mean is over nothing."""
    counted = kept.to(dtype)
    whole = counted.sum() if reduction == "mean" else counted.new_ones(())
    return (counted / whole).nan_to_num(0.0), whole / whole - 1


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

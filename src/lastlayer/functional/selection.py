"""Which classes a query may return: ids excluded for each row, and the classes allowed for all rows."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_ids, eager_on_cpu


class Selection(NamedTuple):
    """The classes that a top-k may return; their log-probabilities stay those of the whole model."""

    exclude: Tensor | None  # (N, E), class ids; V in unused places
    barred: Tensor | None  # (V,), whether no row may return the class

    def rows(self, rows: slice | Tensor) -> "Selection":
        """The selection of some rows."""
        return self if self.exclude is None else self._replace(exclude=self.exclude[rows])

    def mask(self, num_classes: int) -> Tensor:  # (N, V), or (1, V) the same for all rows; bool
        """Whether a class must not be returned."""
        if self.exclude is None:
            assert self.barred is not None  # one of the two is not None
            return self.barred[None]
        rows = self.exclude.shape[0]  # not len(), which would fix the batch of an exported program
        places = torch.zeros(rows, num_classes + 1, dtype=torch.bool, device=self.exclude.device)
        excluded = places.scatter_(1, self.exclude, True)[:, :num_classes]
        return excluded if self.barred is None else excluded | self.barred

    def bar(
        self,
        scores: Tensor,  # (N, V), in class order
    ) -> Tensor:  # (N, V)
        """`scores` with -inf at every class that must not be returned; a new tensor."""
        return scores.masked_fill(self.mask(scores.shape[1]), -torch.inf)


def make_selection(
    exclude: Tensor | None,  # (..., E), class ids, padded with ignore_index
    allowed: Tensor | None,  # (V,) bool, or (A,) class ids
    shape: torch.Size,  # of the leading dimensions
    num_classes: int,
    ignore_index: int | None,
    device: torch.device,
) -> Selection | None:
    """The arguments of a query, checked; None where they exclude nothing.

    Raises:
        TypeError: ids that are not integers.
        ValueError: another shape; no class allowed.
        IndexError: an id that is no class.
    """
    if exclude is None and allowed is None:
        return None
    ids = None
    if exclude is not None:
        exclude, padded = check_ids("exclude", exclude, num_classes, ignore_index)
        ids = _as_rows("exclude", exclude, shape).to(device)
        if padded:
            ids = ids.masked_fill(ids == ignore_index, num_classes)
    return Selection(ids, None if allowed is None else _barred(allowed, num_classes, device))


def _barred(allowed: Tensor, num_classes: int, device: torch.device) -> Tensor:  # (V,), bool
    if isinstance(allowed, Tensor) and allowed.dtype == torch.bool:
        if allowed.shape != (num_classes,):
            raise ValueError(
                f"allowed must have shape ({num_classes},) as a mask, or be class ids (A,); got a mask of shape "
                f"{tuple(allowed.shape)}"
            )
        if eager_on_cpu(allowed) and not bool(allowed.any()):
            raise ValueError("allowed must permit at least one class; the mask has no True")
        return ~allowed.to(device)
    allowed, _ = check_ids("allowed", allowed, num_classes, None)
    if allowed.dim() != 1 or not len(allowed):
        raise ValueError(
            f"allowed must be a bool mask ({num_classes},) or at least one class id, (A,); got shape "
            f"{tuple(allowed.shape)}"
        )
    return torch.ones(num_classes, dtype=torch.bool, device=device).index_fill_(0, allowed.to(device), False)


def check_candidates(
    ids: Tensor,  # (..., C)
    shape: torch.Size,
    num_classes: int,
    ignore_index: int,
) -> Tensor:  # (N, C), int64
    """The candidates of `score` as rows, or an error unless they are class ids, several for each hidden state."""
    return _as_rows("ids", check_ids("ids", ids, num_classes, ignore_index)[0], shape)


def candidate_scores(
    score: Callable[[Tensor], Tensor],  # valid ids (N, C) to (N, C)
    ids: Tensor,  # (..., C), padded with ignore_index
    shape: torch.Size,  # of the hidden states: (...)
    num_classes: int,
    ignore_index: int,
) -> Tensor:  # (..., C)
    """What `score(hidden, ids)` returns: `score` of the ids as rows, 0 where padded.

    Raises:
        TypeError, ValueError, IndexError: ids of another dtype or shape, or that are no classes.
    """
    rows = check_candidates(ids, shape, num_classes, ignore_index)
    padded = rows == ignore_index
    values = score(rows.masked_fill(padded, 0)).masked_fill(padded, 0)
    return values.reshape(*shape, rows.shape[1])


def _as_rows(name: str, ids: Tensor, shape: torch.Size) -> Tensor:
    """`ids` as `(N, count)`, or an error unless they are `(*shape, count)`."""
    if ids.dim() != len(shape) + 1 or ids.shape[:-1] != shape:
        expected = ", ".join([*map(str, shape), "count"])
        raise ValueError(
            f"{name} must have hidden's leading shape and one more dimension, ({expected}); got {tuple(ids.shape)}"
        )
    return ids.reshape(math.prod(shape), ids.shape[-1])  # numel() would fix the batch of an export


def topk_in_chunks(
    of_chunk: Callable[[Tensor, Selection | None], tuple[Tensor, Tensor]],  # of some rows and their selection
    chunks: Sequence[Tensor],  # (n, d) each
    selection: Selection | None,  # of all rows
) -> tuple[Tensor, Tensor]:  # (N, k) each
    """The values and indices of every chunk, one after the other."""
    found, start = [], 0
    for rows in chunks:
        stop = start + rows.shape[0]  # not len(), which would fix the batch of an exported program
        found.append(of_chunk(rows, None if selection is None else selection.rows(slice(start, stop))))
        start = stop
    if len(found) == 1:
        return found[0]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

"""The screen itself in plain PyTorch, once for all previews: candidates, exact logits, certificate, widening.

Pure functions of rows; `ScreenedSoftmax` owns the state. This is the plain twin of the compiled queries
(`kernels/screening.py`), and what runs where these do not: on a GPU, in float64, without the extension.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.selection import Selection
from lastlayer.kernels.screening import Query
from lastlayer.screening.exact import full_logits, logits_at, row_norms, size_of
from lastlayer.screening.preview import ErrorBound, PreparedPreview

PARTS, LEAST = 16, 4096  # of the classes; temporary tensors are made for one part after another
MODERATE = {torch.float32: 1e30, torch.float64: 1e300}  # up to here nothing overflows, with 10^8 to spare
MOST_WIDENED = 4  # the full layer runs where more than one class in so many is in play


class Screened(NamedTuple):
    """What screening knows of some rows: raw logits, exact where `rescored`, and their k best rescored ones."""

    logits: Tensor  # (N, V)
    rescored: Tensor  # (N, V), bool
    values: Tensor  # (N, k), best first; -inf where fewer than k classes are left
    indices: Tensor  # (N, k); -1 there
    certified: Tensor  # (N,), bool


class Head(NamedTuple):
    """The layer that is screened."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)

    def full(self, hidden: Tensor, query: Query) -> Screened:
        """The full layer: every logit exact. Certified where the normaliser is finite."""
        logits = full_logits(hidden, self.weight, self.bias)
        return full_result(logits, query)


def full_result(
    logits: Tensor,  # (N, V), exact
    query: Query,
) -> Screened:
    """The best of exact logits."""
    values, indices = permitted(query, logits).topk(query.k, dim=-1)
    rescored = torch.ones((), dtype=torch.bool, device=logits.device).expand_as(logits)
    finite = torch.cat([logits[:, at].logsumexp(-1, keepdim=True) for at in class_parts(logits.shape[-1])], -1)
    return Screened(logits, rescored, values, _named(values, indices), finite.logsumexp(-1).isfinite())


def class_parts(classes: int) -> list[slice]:
    """The classes in at most PARTS parts of at least LEAST."""
    step = max(LEAST, -(-classes // PARTS))
    return [slice(start, min(start + step, classes)) for start in range(0, classes, step)]


def best(
    scores: Tensor,  # (N, V)
    count: int,
) -> Tensor:  # (N, count)
    """The classes of the best scores, in no order.

    On a CPU from the best of every part: there `topk` holds 16 bytes a class.
    """
    parts = class_parts(scores.shape[-1])
    if scores.is_cuda or 2 * len(parts) * count > scores.shape[-1]:
        return scores.topk(count, dim=-1, sorted=False).indices
    found = [scores[:, at].topk(min(count, at.stop - at.start), dim=-1, sorted=False) for at in parts]
    values = torch.cat([part.values for part in found], dim=-1)
    classes = torch.cat([part.indices + at.start for part, at in zip(found, parts, strict=True)], dim=-1)
    return classes.gather(-1, values.topk(count, dim=-1, sorted=False).indices)


class Limits(NamedTuple):
    """What the numbers of a layer and of its preview are at most."""

    of_terms: Tensor  # (m,) float64, of the classes' part of the error bound
    norm: float  # of a row of the weight
    bias: float  # of the finite |bias|

    @classmethod
    def of(cls, head: Head, prepared: PreparedPreview) -> "Limits":
        """Those of a layer and its preview."""
        norms = row_norms(head.weight)
        return cls(
            prepared.of_classes.amax(-1).double(), float(norms.max()), float(size_of(head.bias, norms).max())
        )

    def moderate(
        self,
        hidden: Tensor,  # (N, d)
        of_rows: Tensor,  # (N, m), the rows' part of the error bound
    ) -> Tensor:  # (N,), bool
        """The rows for which no logit, score or bound is NaN or can overflow."""
        norm = torch.linalg.vector_norm(hidden.double(), dim=-1)
        most = norm * self.norm + self.bias + of_rows.double() @ self.of_terms
        return (norm < MODERATE[of_rows.dtype]) & (most < MODERATE[of_rows.dtype])  # False for NaN as well


def screen(
    head: Head,
    prepared: PreparedPreview,
    limits: Limits,
    hidden: Tensor,  # (N, d)
    query: Query,
) -> Screened:
    """The best classes of the preview get their exact logits; with `query.exact`, all that could be better.

    Where gathering the candidates' rows would move more numbers than the full layer reads, the full layer runs;
    also for rows where a number is not finite, or could overflow.
    """
    if len(hidden) * query.candidates >= len(head.weight):
        return head.full(hidden, query)
    scores, bound = prepared.scores(hidden), prepared.error(hidden)
    allowed = permitted(query, scores)
    chosen = best(allowed, query.candidates)
    exact = logits_at(hidden, head.weight, head.bias, chosen)
    values, order = exact.masked_fill(allowed.gather(-1, chosen) == -torch.inf, -torch.inf).topk(query.k, dim=-1)
    rescored = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    in_play = could_be_in(allowed, bound, rescored, values[:, -1:])
    indices = _named(values, chosen.gather(-1, order))
    if allowed is not scores:  # the normaliser depends on the best classes, whether they may be returned or not
        others = _barred_ones(query, scores, chosen)
        rescored.scatter_(-1, others, True)
        scores.scatter_(-1, others, logits_at(hidden, head.weight, head.bias, others))
    result = Screened(scores.scatter_(-1, chosen, exact), rescored, values, indices, ~in_play.any(-1))
    overflowing = limits.moderate(hidden, bound.of_rows).logical_not_().nonzero().squeeze(1)
    if len(overflowing):
        _fill(head, hidden, result, overflowing, query)
        in_play[overflowing] = False
    return widen(head, hidden, result, in_play, query, overflowing) if query.exact else result


def could_be_in(
    scores: Tensor,  # (N, V), -inf at classes that may not be returned
    bound: ErrorBound,
    rescored: Tensor,  # (N, V), bool
    kth: Tensor,  # (N, 1), the k-th best exact logit so far
) -> Tensor:  # (N, V), bool
    """The other classes whose logit could reach `kth`; written as "not below" so that NaN stays in play."""
    in_play = rescored.logical_not()
    for at in class_parts(scores.shape[-1]):
        upper = torch.addmm(scores[:, at], bound.of_rows, bound.of_classes[:, at])
        in_play[:, at].logical_and_((upper < kth).logical_not_()).logical_and_(scores[:, at] != -torch.inf)
    return in_play


def widen(
    head: Head,
    hidden: Tensor,  # (N, d)
    screened: Screened,
    in_play: Tensor,  # (N, V), bool
    query: Query,
    overflowing: Tensor,  # (n,), rows that the full layer computed already
) -> Screened:
    """Rescores every class in play, so that all rows whose numbers are finite become certified."""
    parts = class_parts(len(head.weight))
    counts = torch.stack([in_play[:, at].sum(-1) for at in parts]).sum(0)  # a sum of bools holds them as int64
    full_rows = (counts * MOST_WIDENED > len(head.weight)).nonzero().squeeze(1)
    if len(full_rows):
        _fill(head, hidden, screened, full_rows, query)
        in_play[full_rows] = False
    for row in in_play.any(-1).nonzero().squeeze(1).tolist():
        more = in_play[row].nonzero().squeeze(1)
        logits = logits_at(hidden[row : row + 1], head.weight, head.bias, more[None])[0]
        screened.logits[row, more] = logits
        screened.rescored[row, more] = True
        values, order = torch.cat([screened.values[row], logits]).topk(query.k)
        screened.values[row] = values
        screened.indices[row] = _named(values, torch.cat([screened.indices[row], more])[order])
    certified = torch.ones_like(screened.certified)
    certified[overflowing] = screened.certified[overflowing]
    return screened._replace(certified=certified)


def _fill(
    head: Head,
    hidden: Tensor,  # (N, d)
    screened: Screened,
    rows: Tensor,  # (n,), which of them
    query: Query,
) -> None:
    """Gives some rows the full layer's result, a part of the classes at a time."""
    for at in class_parts(len(head.weight)):
        bias = head.bias if head.bias is None else head.bias[at]
        screened.logits[rows, at] = full_logits(hidden[rows], head.weight[at], bias)
    screened.rescored[rows] = True
    for row in rows.tolist():
        found = full_result(screened.logits[row : row + 1], query.rows(slice(row, row + 1)))
        for mine, theirs in zip(screened[2:], found[2:], strict=True):
            mine[row] = theirs[0]


def _barred_ones(
    query: Query,
    scores: Tensor,  # (N, V), of all classes
    chosen: Tensor,  # (N, C), the candidates
) -> Tensor:  # (N, C')
    """Classes with all barred ones that are among the best; without a search where a row excludes few."""
    exclude = query.exclude
    if query.barred is None and exclude is not None and exclude.shape[1] <= query.candidates:
        return torch.where(exclude < scores.shape[1], exclude, chosen[:, :1])
    return best(scores, query.candidates)


def permitted(
    query: Query,
    scores: Tensor,  # (N, V)
) -> Tensor:  # (N, V)
    """`scores` with -inf at the classes that the query may not return; as they are where it may return all."""
    if query.exclude is None and query.barred is None:
        return scores
    return Selection(query.exclude, query.barred).bar(scores)


def _named(values: Tensor, indices: Tensor) -> Tensor:
    """-1 for a class whose logit is -inf: it is barred, or there is none."""
    return torch.where(values == -torch.inf, -1, indices)

"""The screen itself, written once for all previews: candidates, exact logits, certificate, widening.

Pure functions of rows; `ScreenedSoftmax` owns the state. This is also the plain twin of the fused kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.screening.exact import full_logits, logits_at
from lastlayer.screening.preview import ErrorBound, PreparedPreview

BOUNDED_AT_ONCE = 1 << 16  # classes, so that their bounds never lie in memory all at once


class Screened(NamedTuple):
    """What screening knows of some rows: raw logits, exact where `rescored`, and their k best rescored ones."""

    logits: Tensor  # (N, V)
    rescored: Tensor  # (N, V), bool
    values: Tensor  # (N, k), best first
    indices: Tensor  # (N, k)
    certified: Tensor  # (N,), bool


class Head(NamedTuple):
    """The layer that is screened."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)

    def dense(self, hidden: Tensor, k: int) -> Screened:
        """The full layer: every logit exact."""
        logits = full_logits(hidden, self.weight, self.bias)
        values, indices = logits.topk(k, dim=-1)
        everything = torch.ones((), dtype=torch.bool, device=logits.device)
        return Screened(logits, everything.expand_as(logits), values, indices, everything.expand(len(logits)))


def screen(
    head: Head,
    preview: PreparedPreview,
    hidden: Tensor,  # (N, d)
    candidates: int,
    k: int,
    exact: bool,
) -> Screened:
    """The `candidates` best classes of the preview get their exact logits; with `exact`, all that could be better.

    Where gathering the candidates' rows would move more numbers than the full layer reads, the full layer runs.
    """
    if len(hidden) * candidates >= len(head.weight):
        return head.dense(hidden, k)
    scores = preview.scores(hidden)
    chosen = scores.topk(candidates, dim=-1, sorted=False).indices
    logits_chosen = logits_at(hidden, head.weight, head.bias, chosen)
    values, order = logits_chosen.topk(k, dim=-1)
    rescored = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    in_play = could_be_in(scores, preview.error(hidden), rescored, values[:, -1:])
    result = Screened(
        scores.scatter_(-1, chosen, logits_chosen), rescored, values, chosen.gather(-1, order), ~in_play.any(-1)
    )
    return widen(head, hidden, result, in_play) if exact else result


def could_be_in(
    scores: Tensor,  # (N, V)
    bound: ErrorBound,
    rescored: Tensor,  # (N, V), bool
    kth: Tensor,  # (N, 1), the k-th best exact logit so far
) -> Tensor:  # (N, V), bool
    """The classes not rescored whose logit could reach `kth`; written as "not below" so that NaN stays in play."""
    in_play = rescored.logical_not()
    for start in range(0, scores.shape[-1], BOUNDED_AT_ONCE):
        at = slice(start, start + BOUNDED_AT_ONCE)
        upper = torch.addmm(scores[:, at], bound.of_rows, bound.of_classes[:, at])
        in_play[:, at].logical_and_((upper < kth).logical_not_())
    return in_play


def widen(
    head: Head,
    hidden: Tensor,  # (N, d)
    screened: Screened,
    in_play: Tensor,  # (N, V), bool
) -> Screened:
    """Rescores every class in play, so that all rows become certified."""
    open_rows = (~screened.certified).nonzero().squeeze(1)
    k = screened.values.shape[-1]
    dense_rows = open_rows[in_play[open_rows].sum(-1) * 4 > len(head.weight)]
    if len(dense_rows):
        dense = head.dense(hidden[dense_rows], k)
        for mine, theirs in zip(screened[:4], dense[:4], strict=True):
            mine[dense_rows] = theirs
        in_play[dense_rows] = False
    for row in open_rows.tolist():
        more = in_play[row].nonzero().squeeze(1)
        if not len(more):
            continue
        logits = logits_at(hidden[row : row + 1], head.weight, head.bias, more[None])[0]
        screened.logits[row, more] = logits
        screened.rescored[row, more] = True
        both = torch.cat([screened.values[row], logits])
        values, order = both.topk(k)
        screened.values[row] = values
        screened.indices[row] = torch.cat([screened.indices[row], more])[order]
    return screened._replace(certified=torch.ones_like(screened.certified))

"""The screen itself, written once for all previews: candidates, exact logits, certificate, widening.

Pure functions of rows; `ScreenedSoftmax` owns the state. This is also the plain twin of the fused kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.screening.exact import full_logits, logits_at
from lastlayer.screening.preview import ErrorBound, PreparedPreview

PARTS, LEAST = 16, 4096  # of the classes; what is only needed for a moment is made for one part after another


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
    chosen = best(scores, candidates)
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
    for at in class_parts(scores.shape[-1]):
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
    k, parts = screened.values.shape[-1], class_parts(len(head.weight))
    counts = torch.stack([in_play[:, at].sum(-1) for at in parts]).sum(0)  # a sum of bools holds them as int64
    dense_rows = (counts * 4 > len(head.weight)).nonzero().squeeze(1)
    if len(dense_rows):
        _fill(head, hidden, screened, dense_rows)
        in_play[dense_rows] = False
    for row in (~screened.certified).nonzero().squeeze(1).tolist():
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


def _fill(
    head: Head,
    hidden: Tensor,  # (N, d)
    screened: Screened,
    rows: Tensor,  # (n,), which of them
) -> None:
    """Gives some rows the full layer's logits, a part of the classes at a time."""
    for at in class_parts(len(head.weight)):
        bias = head.bias if head.bias is None else head.bias[at]
        screened.logits[rows, at] = full_logits(hidden[rows], head.weight[at], bias)
    screened.rescored[rows] = True
    k = screened.values.shape[-1]
    for row in rows.tolist():
        classes = best(screened.logits[row : row + 1], k)[0]
        screened.values[row], order = screened.logits[row, classes].topk(k)
        screened.indices[row] = classes[order]

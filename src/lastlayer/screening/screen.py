"""The screen itself in plain PyTorch, once for all previews: candidates, exact logits, certificate, widening.

Pure functions of rows; `ScreenedSoftmax` owns the state. This is the plain twin of the compiled queries
(`kernels/screening.py`), and what runs where these do not: on a GPU, in float64, without the extension, and for
previews of the user's own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.selection import Selection
from lastlayer.kernels.screening import Query, Screened
from lastlayer.screening.exact import full_logits, logits_at, row_norms, size_of
from lastlayer.screening.preview import PreparedPreview

MODERATE = {torch.float32: 1e30, torch.float64: 1e300}  # up to here nothing overflows, with 10^8 to spare
MOST_WIDENED = 4  # the full layer runs where more than one class in so many is in play


class Head(NamedTuple):
    """The layer that is screened."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)


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


def full_layer(
    head: Head,
    hidden: Tensor,  # (N, d)
    query: Query,
) -> Screened:
    """The full layer: every logit exact. Certified where the normaliser is finite."""
    logits = full_logits(hidden, *head)
    return _result(query, logits, None, torch.ones(len(logits), dtype=torch.bool, device=logits.device))


def screen(
    head: Head,
    prepared: PreparedPreview,
    limits: Limits,
    hidden: Tensor,  # (N, d)
    query: Query,
) -> Screened:
    """The best classes of the preview get their exact logits; with `query.exact`, all that could be better.

    For rows where a number is not finite, or could overflow, the full layer runs.
    """
    logits, bound = prepared.scores(hidden), prepared.error(hidden)
    allowed = permitted(query, logits)
    chosen = allowed.topk(query.candidates, sorted=False).indices
    exact = logits_at(hidden, *head, chosen)
    kth = exact.masked_fill(allowed.gather(-1, chosen) == -torch.inf, -torch.inf).topk(query.k).values[:, -1:]
    rescored = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)
    is_below = torch.addmm(allowed, bound.of_rows, bound.of_classes) < kth
    in_play = ~is_below & ~rescored & (allowed != -torch.inf)  # "not below", so that NaN stays in play
    if allowed is not logits:  # the normaliser depends on the best classes, whether they may be returned or not
        others = logits.topk(query.candidates, sorted=False).indices
        rescored.scatter_(-1, others, True)
        logits.scatter_(-1, others, logits_at(hidden, *head, others))
    logits.scatter_(-1, chosen, exact)
    certified = ~in_play.any(-1)
    full = ~limits.moderate(hidden, bound.of_rows)
    if query.exact:
        full |= in_play.sum(-1) * MOST_WIDENED > len(head.weight)
        for row in (~certified & ~full).nonzero().squeeze(1).tolist():
            classes = in_play[row].nonzero().squeeze(1)
            logits[row, classes] = logits_at(hidden[row : row + 1], *head, classes[None])[0]
        rescored |= in_play
        certified = torch.ones_like(certified)
    if bool(full.any()):
        logits[full] = full_logits(hidden[full], *head)
        rescored[full] = certified[full] = True
    return _result(query, logits, rescored, certified)


def _result(
    query: Query,
    logits: Tensor,  # (N, V)
    rescored: Tensor | None,  # (N, V), bool; None: all
    certified: Tensor,  # (N,), bool
) -> Screened:
    """The best of the rescored classes, where the normaliser is finite; -1 for a class whose logit is -inf."""
    exact = logits if rescored is None else logits.masked_fill(~rescored, -torch.inf)
    values, indices = permitted(query, exact).topk(query.k)
    log_normalizer = log_sum_exp(logits)
    log_prob = (values - log_normalizer).to(values.dtype)
    indices = torch.where(values == -torch.inf, -1, indices)
    certified = certified & log_normalizer.isfinite().squeeze(-1)
    return Screened(log_prob, indices, certified, log_normalizer, logits, rescored)


def permitted(
    query: Query,
    scores: Tensor,  # (N, V)
) -> Tensor:  # (N, V)
    """`scores` with -inf at the classes that the query may not return; as they are where it may return all."""
    if query.exclude is None and query.barred is None:
        return scores
    return Selection(query.exclude, query.barred).bar(scores)


def log_sum_exp(logits: Tensor) -> Tensor:  # (N, V) to (N, 1)
    """In float64, for large logits leave a float32 sum no digits."""
    peak = logits.amax(-1, keepdim=True).detach()
    return (logits - peak).exp_().sum(-1, keepdim=True).log().double() + peak

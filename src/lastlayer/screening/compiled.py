"""Queries of a screen by the compiled engine; `screen.screen` is the plain form of the same."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.precision import no_autocast
from lastlayer.kernels.screening import CompiledScreen, Kind, Outputs, Query, Rotation, Rows
from lastlayer.screening.exact import full_logits, rounding_share
from lastlayer.screening.int4_preview import PreparedInt4
from lastlayer.screening.int8_preview import PreparedInt8
from lastlayer.screening.preview import PreparedPreview
from lastlayer.screening.quantised import Int8Rows
from lastlayer.screening.screen import Head, Limits, full_answer
from lastlayer.screening.svd_preview import PreparedSVD

SMALL = 1 << 18  # bytes of a preview that one thread reads before others help


class Result(NamedTuple):
    """What the engine finds for some rows."""

    log_prob: Tensor  # (N, k)
    indices: Tensor  # (N, k)
    certified: Tensor  # (N,)
    log_normalizer: Tensor  # (N, 1), float64
    logits: Tensor  # (N, V), the preview's, exact where rescored


def stored_rows(prepared: PreparedPreview) -> Rows:
    """A preview's rows as the engine reads them; for a preview of the user's own, scores that it makes itself."""
    if isinstance(prepared, PreparedInt8):
        rows = prepared.rows
        return Rows(Kind.INT8_ROWS, rows.stored, rows.scale, rows.width)
    if isinstance(prepared, PreparedInt4):
        rows = prepared.rows
        rotation = Rotation(prepared.rotation, prepared.rounding, fine=rows.fine, unbalance=prepared.unbalance)
        return Rows(Kind.INT4_ROWS, rows.packed, rows.scale, rows.width, rotation)
    if isinstance(prepared, PreparedSVD):
        rows, width = prepared.rows, prepared.to_head.shape[-1]
        shares = [prepared.tail_rounding, rounding_share(width, prepared.dtype)]
        rounding = torch.tensor(shares, dtype=torch.float64, device="cpu")
        rotation = Rotation(prepared.to_head, rounding, prepared.to_tail)
        if isinstance(rows, Int8Rows):
            return Rows(Kind.INT8_ROWS, rows.stored, rows.scale, rows.width, rotation)
        return Rows(Kind.FLOAT_COLUMNS, rows.columns, None, prepared.window, rotation)
    return Rows(Kind.GIVEN_SCORES)


class EngineScreen:
    """One screen as the engine takes it: views of the layer, of the preview's rows and of its bounds."""

    def __init__(self, head: Head, prepared: PreparedPreview, limits: Limits) -> None:
        self.head, self.prepared = head, prepared
        self.rows = stored_rows(prepared)
        bias = torch.zeros(len(head.weight), device="cpu") if head.bias is None else head.bias
        extremes = torch.tensor([limits.norm, limits.bias], dtype=torch.float64, device="cpu")
        self._layer = head.weight, bias.float().contiguous(), prepared.of_classes.contiguous()
        self._layer += (torch.cat([limits.of_terms, extremes]),)
        self._screen = CompiledScreen(*self._layer, self.rows)
        self._given = CompiledScreen(*self._layer, Rows(Kind.GIVEN_SCORES))
        self.serial = prepared.bytes_read <= SMALL

    def query(self, hidden: Tensor, query: Query) -> tuple[Result, int]:
        """The rows (contiguous, on a CPU) screened; and for how many the full layer had to answer."""
        hidden = hidden.float()
        outputs = Outputs.empty(len(hidden), query.k, len(self.head.weight))
        if self.rows.kind == Kind.GIVEN_SCORES:
            self._by_given_scores(hidden, query, outputs)
        else:
            self._screen(hidden, query, outputs, self.serial)
        unsettled = 0
        if outputs.status.any():
            open_rows = outputs.status.nonzero().squeeze(1)
            unsettled = len(open_rows)
            found = self.full(hidden[open_rows], query.rows(open_rows))
            for mine, theirs in zip(_result(outputs), found, strict=True):
                mine[open_rows] = theirs
        return _result(outputs), unsettled

    def full(self, hidden: Tensor, query: Query) -> Result:
        """The full layer's answer: every logit exact; certified where the normaliser is finite."""
        hidden = hidden.float()
        with no_autocast(hidden.device.type):
            logits = full_logits(hidden, *self.head)
        outputs = Outputs.empty(len(hidden), query.k, 0)._replace(scores=logits)
        self._given.from_scores(hidden, query, outputs, None)
        if outputs.status.any():  # NaN, or infinite: the engine does not sort these
            found = full_answer(logits, query)
            normalizer = logits.double().logsumexp(-1, keepdim=True)
            return Result((found.values - normalizer).float(), found.indices, found.certified, normalizer, logits)
        return _result(outputs)

    def scores(self, hidden: Tensor) -> Tensor:  # (N, V)
        """The preview's scores of all classes."""
        if self.rows.kind == Kind.GIVEN_SCORES:
            return self.prepared.scores(hidden)
        outputs = Outputs.empty(len(hidden), 0, len(self.head.weight))
        self._screen.scores(hidden.float(), outputs)
        return outputs.scores

    def _by_given_scores(self, hidden: Tensor, query: Query, outputs: Outputs) -> None:
        with no_autocast(hidden.device.type):
            outputs.scores.copy_(self.prepared.scores(hidden))
            of_rows = self.prepared.error(hidden).of_rows.float().contiguous()
        self._given.from_scores(hidden, query, outputs, of_rows)


def _result(outputs: Outputs) -> Result:
    log_prob, indices, certified, log_normalizer, _, scores = outputs
    return Result(log_prob, indices, certified, log_normalizer, scores)

"""Queries of a screen by the compiled engine; `screen.screen` is the plain form of the same."""

import torch
from torch import Tensor

from lastlayer.functional.precision import no_autocast
from lastlayer.kernels.screening import CompiledScreen, Kind, Outputs, Query, Rotation, Rows
from lastlayer.screening.exact import full_logits, rounding_share
from lastlayer.screening.int4_preview import PreparedInt4
from lastlayer.screening.int8_preview import PreparedInt8
from lastlayer.screening.preview import PreparedPreview
from lastlayer.screening.quantised import Int8Rows
from lastlayer.screening.screen import Head, Limits, full_result
from lastlayer.screening.svd_preview import PreparedSVD

SMALL = 1 << 18  # bytes of a preview that one thread reads before others help


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
        layer = head.weight, bias.float().contiguous(), prepared.of_classes.contiguous()
        bounds = torch.cat([limits.of_terms, extremes])
        self._screen = CompiledScreen(*layer, bounds, self.rows)
        self._given = CompiledScreen(*layer, bounds, Rows(Kind.GIVEN_SCORES))
        self.serial = prepared.bytes_read <= SMALL

    def query(self, hidden: Tensor, query: Query) -> tuple[Outputs, int]:
        """The rows (contiguous, on a CPU) screened; and for how many the full layer had to run."""
        hidden = hidden.float()
        outputs = Outputs.empty(len(hidden), query.k, len(self.head.weight))
        if self.rows.kind == Kind.GIVEN_SCORES:
            with no_autocast(hidden.device.type):
                outputs.logits.copy_(self.prepared.scores(hidden))
                of_rows = self.prepared.error(hidden).of_rows.float().contiguous()
            self._given(hidden, query, outputs, of_rows=of_rows)
        else:
            self._screen(hidden, query, outputs, serial=self.serial)
        open_rows = outputs.status.nonzero().squeeze(1)
        if len(open_rows):
            found = self.full(hidden[open_rows], query.rows(open_rows))
            for mine, theirs in zip(outputs, found, strict=True):
                mine[open_rows] = theirs
        return outputs, len(open_rows)

    def full(self, hidden: Tensor, query: Query) -> Outputs:
        """The full layer's result: every logit exact; certified where the normaliser is finite."""
        hidden = hidden.float()
        with no_autocast(hidden.device.type):
            logits = full_logits(hidden, *self.head)
        outputs = Outputs.empty(len(hidden), query.k, 0)._replace(logits=logits)
        self._given(hidden, query, outputs)
        if outputs.status.any():  # NaN, or infinite: the engine does not sort these
            found = full_result(logits, query)
            normalizer = logits.double().logsumexp(-1, keepdim=True)
            log_prob = (found.values - normalizer).float()
            return Outputs(log_prob, found.indices, found.certified, normalizer, outputs.status, logits)
        return outputs

    def scores(self, hidden: Tensor) -> Tensor:  # (N, V)
        """The preview's scores of all classes."""
        if self.rows.kind == Kind.GIVEN_SCORES:
            return self.prepared.scores(hidden)
        outputs = Outputs.empty(len(hidden), 0, len(self.head.weight))
        self._screen(hidden.float(), Query(0, 0), outputs, only_scores=True)
        return outputs.logits

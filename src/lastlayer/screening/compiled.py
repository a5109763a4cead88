"""Queries of a screen by the compiled engine; `screen.screen` is the plain form of the same."""

import torch
from torch import Tensor

from lastlayer.functional.precision import no_autocast
from lastlayer.kernels.screening import CompiledScreen, Kind, Query, Rows, Screened
from lastlayer.screening.exact import rounding_share
from lastlayer.screening.int4_preview import PreparedInt4
from lastlayer.screening.int8_preview import PreparedInt8
from lastlayer.screening.preview import PreparedPreview
from lastlayer.screening.quantised import Int8Rows
from lastlayer.screening.screen import Head, Limits, full_layer
from lastlayer.screening.svd_preview import PreparedSVD

PreparedByLibrary = PreparedInt8 | PreparedInt4 | PreparedSVD


def engine_rows(prepared: PreparedPreview) -> Rows:
    """A preview's rows as the engine reads them."""
    if isinstance(prepared, PreparedInt8):
        rows = prepared.rows
        return Rows(Kind.INT8_ROWS, rows.stored, rows.width, rows.scale)
    if isinstance(prepared, PreparedInt4):
        rows = prepared.rows
        rotation = (prepared.rotation, prepared.rounding, None, rows.fine, prepared.unbalance)
        return Rows(Kind.INT4_ROWS, rows.packed, rows.width, rows.scale, *rotation)
    assert isinstance(prepared, PreparedSVD)
    shares = [prepared.tail_rounding, rounding_share(prepared.to_head.shape[-1], prepared.dtype)]
    rounding = torch.tensor(shares, dtype=torch.float64, device="cpu")
    rotation = (prepared.to_head, rounding, prepared.to_tail)
    if isinstance(prepared.rows, Int8Rows):
        rows = prepared.rows
        return Rows(Kind.INT8_ROWS, rows.stored, rows.width, rows.scale, *rotation)
    return Rows(Kind.FLOAT_COLUMNS, prepared.rows.columns, prepared.window, None, *rotation)


class EngineScreen(CompiledScreen):
    """One screen as the engine takes it: views of the layer, of the preview's rows and of its bounds."""

    def __init__(self, head: Head, prepared: PreparedPreview, limits: Limits) -> None:
        self.head = head
        bias = torch.zeros(len(head.weight), device="cpu") if head.bias is None else head.bias
        extremes = torch.tensor([limits.norm, limits.bias], dtype=torch.float64, device="cpu")
        bounds = torch.cat([limits.of_terms, extremes])
        rows = engine_rows(prepared)
        super().__init__(head.weight, bias.float().contiguous(), prepared.of_classes.contiguous(), bounds, rows)

    def query(self, hidden: Tensor, query: Query) -> tuple[Screened, int]:
        """The rows (contiguous, on a CPU) screened; and for how many the full layer had to run."""
        hidden = hidden.float()
        found, status = self.screened(hidden, query)
        if not bool(status.any()):
            return found, 0
        open_rows = status.nonzero().squeeze(1)
        with no_autocast(hidden.device.type):
            full = full_layer(self.head, hidden[open_rows], query.rows(open_rows))
        for mine, theirs in zip(found[:5], full[:5], strict=True):
            mine[open_rows] = theirs
        return found, len(open_rows)

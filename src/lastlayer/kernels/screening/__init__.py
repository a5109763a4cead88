"""Screening of float32 logits on a CPU, fused: numba kernels that read each number once or twice.

Arrays in, arrays out; imported when one first runs, as importing numba takes a second. The plain twins are
`screening.screen` (candidates, certificate, normaliser) and the previews' own `scores`.

Scores are summarised by blocks of classes, while they are still in the cache: a block's maximum, and the sum of
its exponentials relative to it (`blocks`, `scan`; `scan_rows` for several hidden states, by AMX). Candidates
(`choose`), certificate and normaliser (`answer`) then come from the summaries, and scan only the few blocks that
matter. For one hidden state all of it is one call (`query`), by address (`bound`). `lanes`, `dots`, `nibbles` and
`tiles` are the instructions that numba does not reach by itself.

A number written out where a kernel is called has a type of its own, for which numba compiles the kernel once more:
hence `np.int64(0)`. And it takes a second to compile `a[i:j] = b`, for which there are loops.

Kernels hold the interpreter's lock, so that scratch that belongs to a screen is nobody else's while one runs.
"""

from lastlayer.kernels.screening.answer import (
    BAD,
    DENSE,
    Asked,
    Layer,
    Room,
    answer_dense,
    answer_rows,
)
from lastlayer.kernels.screening.blocks import summarise
from lastlayer.kernels.screening.bound import Bound
from lastlayer.kernels.screening.dots import HAS_VNNI
from lastlayer.kernels.screening.nibbles import scan_int4
from lastlayer.kernels.screening.query import (
    ASKED,
    MOST,
    ask_int4,
    ask_int8,
    ask_rotated_float,
    ask_rotated_int8,
)
from lastlayer.kernels.screening.scan import combine_int8
from lastlayer.kernels.screening.scan_rows import scan_int8_rows
from lastlayer.kernels.screening.tiles import HAS_AMX

__all__ = [
    "answer_dense",
    "answer_rows",
    "ask_int4",
    "ask_int8",
    "ask_rotated_float",
    "ask_rotated_int8",
    "ASKED",
    "Asked",
    "BAD",
    "Bound",
    "combine_int8",
    "DENSE",
    "HAS_AMX",
    "HAS_VNNI",
    "Layer",
    "MOST",
    "Room",
    "scan_int4",
    "scan_int8_rows",
    "summarise",
]

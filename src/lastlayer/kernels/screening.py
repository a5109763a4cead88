"""Queries of a screen by the compiled engine: what `csrc/screening.h` takes, and one call for a batch of queries.

The plain twins are `lastlayer/screening/screen.py` and the previews' own `scores`.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.kernels.engine import Kernel

BLOCK = 64  # classes that one summary is of
GROUP, CHUNK = 16, 8  # classes whose 4-bit rows are interleaved; coordinates in the four bytes of a class
WHOLE = 8128  # the largest whole number of a quantised hidden state
NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_screen = Kernel("screen", "pp")
_NOTHING = torch.empty(0, device="cpu")


class Kind(IntEnum):
    """How the rows of a preview are stored."""

    GIVEN_SCORES = 0
    INT8_ROWS = 1
    INT4_ROWS = 2
    FLOAT_COLUMNS = 3


class Rotation(NamedTuple):
    """How a hidden state becomes the vector that the rows are multiplied with."""

    matrix: Tensor  # (rotated, d): float64; of INT4_ROWS float32 or bfloat16
    rounding: Tensor  # float64: shares that rounding adds to the rows' part of the bound
    tail: Tensor | None = None  # (d - rotated, d) float32: coordinates that the preview leaves out
    fine: int = 0  # of INT4_ROWS: coordinates with 8 bits
    unbalance: Tensor | None = None  # of INT4_ROWS: (rotated,) float32


class Rows(NamedTuple):
    """A preview's rows as the engine reads them."""

    kind: Kind
    rows: Tensor | None = None
    scale: Tensor | None = None  # (V,) float32, of integer rows
    width: int = 0  # padded
    rotation: Rotation | None = None


class Outputs(NamedTuple):
    """What a query fills."""

    log_prob: Tensor  # (N, k) float32
    indices: Tensor  # (N, k) int64, -1 where fewer than k classes are left
    certified: Tensor  # (N,) bool
    log_normalizer: Tensor  # (N, 1) float64
    status: Tensor  # (N,) uint8: 0, or why the full layer has to run, as `Status` in csrc/screening.h
    logits: Tensor  # (N, V) float32: the preview's scores, exact where rescored

    @classmethod
    def empty(cls, count: int, k: int, classes: int) -> "Outputs":
        """Buffers for some rows."""
        shapes = (count, k), (count, k), (count,), (count, 1), (count,), (count, classes)
        dtypes = torch.float32, torch.int64, torch.bool, torch.float64, torch.uint8, torch.float32
        pairs = zip(shapes, dtypes, strict=True)
        return cls(*(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in pairs))


class Query(NamedTuple):
    """What is wanted of some hidden states."""

    k: int
    candidates: int
    exact: bool = False
    exclude: Tensor | None = None  # (N, E) int64, class ids that a row may not return; V in unused places
    barred: Tensor | None = None  # (V,) bool, the classes that no row may return

    def rows(self, rows: Tensor | slice) -> "Query":
        """The query of some of the hidden states."""
        return self if self.exclude is None else self._replace(exclude=self.exclude[rows])


class CompiledScreen:
    """One layer and its preview as the engine takes them; the tensors are kept alive, not copied.

    Calls share nothing that is written, so threads may query at once.
    """

    def __init__(
        self,
        weight: Tensor,  # (V, d), contiguous, on a CPU, of a dtype in NUMBER_TYPES
        bias: Tensor,  # (V,) float32
        of_classes: Tensor,  # (m, V) float32: the classes' part of the error bound
        limits: Tensor,  # (m + 2,) float64: the largest of each term, of the rows' norms, of the finite |bias|
        rows: Rows,
    ) -> None:
        self.classes, self.width = weight.shape
        padding = -self.classes % BLOCK
        of_blocks = F.pad(of_classes, (0, padding)).unflatten(-1, (-1, BLOCK)).amax(-1).contiguous()
        rotation = rows.rotation or Rotation(_NOTHING, _NOTHING)
        parts = (weight, bias, of_classes, of_blocks, limits, rows.rows, rows.scale, rotation.matrix)
        self._kept = (*parts, rotation.tail, rotation.unbalance, rotation.rounding)
        columns = NUMBER_TYPES.get(rows.rows.dtype, 0) if rows.rows is not None else 0
        numbers = (
            *(self.classes, self.width, NUMBER_TYPES[weight.dtype], weight, bias),
            *(len(of_classes), of_classes, of_blocks, limits),
            *(rows.kind, rows.rows, columns, rows.scale, rows.width),
            *(len(rotation.matrix), rotation.matrix, NUMBER_TYPES.get(rotation.matrix.dtype, 0)),
            *(0 if rotation.tail is None else len(rotation.tail), rotation.tail),
            *(rotation.fine, rotation.unbalance, rotation.rounding),
        )
        self._packed = _packed(numbers)

    def __call__(
        self,
        hidden: Tensor,  # (N, d), contiguous float32
        query: Query,
        outputs: Outputs,
        *,
        of_rows: Tensor | None = None,  # (N, m) float32
        only_scores: bool = False,
        serial: bool = False,
    ) -> None:
        """Fills `outputs`; a row whose status is not 0 is still open.

        Args:
            of_rows: of a screen of `Kind.GIVEN_SCORES`, whose scores are in `outputs` already, the rows' part of
                the error bound; None: the scores are exact logits.
            only_scores: whether the preview's scores of all classes are all that is wanted.
            serial: whether to stay on one thread.
        """
        exclude = None if query.exclude is None else query.exclude.contiguous()
        numbers = (
            *(len(hidden), query.k, query.candidates, query.exact, hidden, *outputs, of_rows),
            *(0 if exclude is None else exclude.shape[1], exclude, query.barred, only_scores, serial),
        )
        _screen(self._packed, _packed(numbers))


def _packed(numbers: tuple[Tensor | int | None, ...]) -> bytes:
    """Each as 8 bytes: a number, the address of a tensor, or no address."""
    found = [part.data_ptr() if isinstance(part, Tensor) else int(part or 0) for part in numbers]
    return struct.pack(f"{len(found)}q", *found)

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
SMALL = 1 << 18  # bytes of a preview that one thread reads before others help

_screen = Kernel("screen", "pp")


class Kind(IntEnum):
    """How the rows of a preview are stored."""

    INT8_ROWS = 0
    INT4_ROWS = 1
    FLOAT_COLUMNS = 2


class Rows(NamedTuple):
    """A preview's rows as the engine reads them, and how a hidden state becomes what they are multiplied with."""

    kind: Kind
    rows: Tensor
    width: int  # padded
    scale: Tensor | None = None  # (V,) float32, of integer rows
    rotation: Tensor | None = None  # (rotated, d): float64; of INT4_ROWS float32 or bfloat16
    rounding: Tensor | None = None  # float64: shares that rounding a rotation adds to the rows' part of the bound
    tail: Tensor | None = None  # (d - rotated, d) float32: coordinates that the preview leaves out
    fine: int = 0  # of INT4_ROWS: coordinates with 8 bits
    unbalance: Tensor | None = None  # of INT4_ROWS: (rotated,) float32


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


class Screened(NamedTuple):
    """What a query finds, logit maps aside."""

    log_prob: Tensor  # (N, k), best first; -inf where fewer than k classes are left
    indices: Tensor  # (N, k); -1 there
    certified: Tensor  # (N,), bool
    log_normalizer: Tensor  # (N, 1) float64
    logits: Tensor  # (N, V): the preview's scores, exact where rescored
    rescored: Tensor | None = None  # (N, V), bool; the engine does not say


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
        numbers = (
            *(self.classes, self.width, NUMBER_TYPES[weight.dtype], weight, bias),
            *(len(of_classes), of_classes, of_blocks, limits),
            *(rows.kind, rows.rows, _number_type(rows.rows), rows.scale, rows.width),
            *(_length(rows.rotation), rows.rotation, _number_type(rows.rotation)),
            *(_length(rows.tail), rows.tail, rows.fine, rows.unbalance, rows.rounding),
        )
        self._kept, self._packed = numbers, _packed(numbers)
        self._serial = rows.rows.nbytes <= SMALL

    def screened(
        self,
        hidden: Tensor,  # (N, d), contiguous float32
        query: Query,
        *,
        only_scores: bool = False,
    ) -> tuple[Screened, Tensor]:
        """The result; and of each row 0, or why the full layer has to run, as `Status` in csrc/screening.h."""
        count, k = len(hidden), query.k
        found = Screened(
            torch.empty(count, k, dtype=torch.float32, device="cpu"),
            torch.empty(count, k, dtype=torch.int64, device="cpu"),
            torch.empty(count, dtype=torch.bool, device="cpu"),
            torch.empty(count, 1, dtype=torch.float64, device="cpu"),
            torch.empty(count, self.classes, dtype=torch.float32, device="cpu"),
        )
        status = torch.empty(count, dtype=torch.uint8, device="cpu")
        exclude = None if query.exclude is None else query.exclude.contiguous()
        numbers = (
            *(count, k, query.candidates, query.exact, hidden, *found[:4], status, found.logits),
            *(0 if exclude is None else exclude.shape[1], exclude, query.barred, only_scores, self._serial),
        )
        _screen(self._packed, _packed(numbers))
        return found, status

    def scores(self, hidden: Tensor) -> Tensor:  # (N, d) to (N, V)
        """The preview's scores of all classes."""
        return self.screened(hidden.float(), Query(0, 0), only_scores=True)[0].logits


def _length(rows: Tensor | None) -> int:
    return 0 if rows is None else len(rows)


def _number_type(rows: Tensor | None) -> int:
    return 0 if rows is None else NUMBER_TYPES.get(rows.dtype, 0)


def _packed(numbers: tuple[Tensor | int | None, ...]) -> bytes:
    """Each as 8 bytes: a number, the address of a tensor, or no address."""
    found = [part.data_ptr() if isinstance(part, Tensor) else int(part or 0) for part in numbers]
    return struct.pack(f"{len(found)}q", *found)

"""The gradient of `FactoredOutput`'s weight, as the few matrices of N rows that determine it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED = 16  # numbers: where each part of a room begins
PARTS = {"pair", "ids", "target", "norm", "total", "products"}


class Place(NamedTuple):
    """The addresses of a gradient's parts, for compiled code."""

    pair: int
    products: int
    ids: int
    target: int
    norm: int
    total: int  # of anything, where the loss does not read the sum


class Sizes(NamedTuple):
    """Of a gradient."""

    rows: int  # N
    width: int  # K
    features: int  # d
    columns: int  # of the products
    uses_sum: bool


@dataclass
class FactoredGradient:
    """One backward pass, or several at the same weight: what the step needs, N rows in all, each contiguous."""

    pair: Tensor  # (2 N, d), H over `both`: each has products with H
    ids: Tensor  # (N, K)
    target: Tensor  # (N, K), dL/da
    norm: Tensor  # (N,), dL/dq
    total: Tensor | None  # (N,), dL/ds; None when the loss does not read the sum
    products: Tensor  # (N, 3 d + 2), of H with Q, U, offset, total and R; or (N, 2 d + 2), without R

    @property
    def hidden(self) -> Tensor:  # (N, d), H
        return self.pair[: len(self.ids)]

    @property
    def both(self) -> Tensor:  # (N, d), the gradient of hidden and its sparse part: D H Q + 2 sparse
        return self.pair[len(self.ids) :]

    @property
    def sparse(self) -> Tensor:  # (N, d), Y W + g_s total^T
        return (self.both - 2 * self.norm[:, None] * self.products[:, : self.both.shape[1]]) / 2

    @property
    def like(self) -> Tensor:
        """A tensor of the same dtype and device."""
        return self.norm

    def sizes(self) -> Sizes:
        """N, K, d, the columns of the products, and whether there is a `total`."""
        return Sizes(*self.ids.shape, self.pair.shape[1], self.products.shape[1], self.total is not None)

    def place(self) -> Place:
        """Where the parts are in memory."""
        norm = self.norm.data_ptr()
        total = norm if self.total is None else self.total.data_ptr()
        own = (self.pair, self.products, self.ids, self.target)
        return Place(*(part.data_ptr() for part in own), norm, total)

    def scale(self, factor: float) -> None:
        """Multiplies the gradient of the loss."""
        self.target, self.norm = self.target * factor, self.norm * factor
        self.both.mul_(factor)
        if self.total is not None:
            self.total = self.total * factor

    @classmethod
    def joined(cls, parts: Sequence["FactoredGradient"]) -> "FactoredGradient":
        """Several passes as one of all their rows."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.ids.shape[1] for part in parts)
        needed = min(part.products.shape[1] for part in parts)  # a large pass is without H R^T, and so is the step
        ids, target = (
            torch.cat([F.pad(getattr(part, name), (0, width - part.ids.shape[1])) for part in parts])
            for name in ("ids", "target")
        )
        return cls(
            pair=torch.cat([part.hidden for part in parts] + [part.both for part in parts]),
            ids=ids,
            target=target,
            norm=torch.cat([part.norm for part in parts]),
            total=None if parts[0].total is None else torch.cat([part.total for part in parts]),  # pyright: ignore
            products=torch.cat([part.products[:, :needed] for part in parts]),
        )


class GradientInRoom(FactoredGradient):
    """One pass whose parts lie in one piece of memory, for compiled code to fill.

    They become tensors when one is first asked for: six of them take 15 microseconds, and an easy step asks for
    none.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        self._sizes = sizes
        self._starts = _starts(sizes, dtype.itemsize)
        self._room = torch.empty(self._starts[-1], dtype=dtype)

    @property
    def like(self) -> Tensor:
        return self._room

    def sizes(self) -> Sizes:
        return self._sizes

    def place(self) -> Place:
        if "pair" in self.__dict__:
            return super().place()
        first, size = self._room.data_ptr(), self._room.itemsize
        pair, products, target, norm, total, ids, _ = self._starts
        return Place(
            first + pair * size, first + products * size, first + ids * size, first + target * size,
            first + norm * size, first + total * size,
        )  # fmt: skip

    def parts(self) -> FactoredGradient:
        """What was written there, as tensors."""
        rows, width, d, columns, uses_sum = self._sizes
        pair, products, target, norm, total, ids, _ = self._starts
        room = self._room
        return FactoredGradient(
            pair=room[pair : pair + 2 * rows * d].view(2 * rows, d),
            ids=room[ids:].view(torch.int64)[: rows * width].view(rows, width),
            target=room[target : target + rows * width].view(rows, width),
            norm=room[norm : norm + rows],
            total=room[total : total + rows] if uses_sum else None,
            products=room[products : products + rows * columns].view(rows, columns),
        )

    def __getattr__(self, name: str) -> Any:
        if name not in PARTS:
            raise AttributeError(name)
        self.__dict__.update(self.parts().__dict__)
        return self.__dict__[name]


@cache
def _starts(sizes: Sizes, itemsize: int) -> tuple[int, ...]:
    """Where pair, products, target, norm, total and ids begin in a room, and where it ends; in numbers."""
    rows, width, d, columns, uses_sum = sizes
    counts = (2 * rows * d, rows * columns, rows * width, rows, rows * uses_sum, rows * width * 8 // itemsize)
    return tuple(accumulate((-(-count // ALIGNED) * ALIGNED for count in counts), initial=0))

"""The gradient of `FactoredOutput`'s weight, as the few matrices of N rows that determine it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED = 16  # numbers
PARTS = {"pair", "ids", "target", "norm", "total", "products"}


def padded(count: int) -> int:
    """As many numbers as end where another line of the cache begins, so that two cores never write one line."""
    return -(-count // ALIGNED) * ALIGNED


class Columns(NamedTuple):
    """Where Q, U, offset and total, and R begin among the rows of `stacked`, and where it ends."""

    gram: int
    map: int
    shared: int
    inverse: int
    end: int

    @classmethod
    @cache
    def of(cls, features: int) -> "Columns":
        """Each begins at a multiple of `ALIGNED`; the rows between are zeros."""
        width = padded(features)
        return cls(0, width, 2 * width, 2 * width + ALIGNED, 3 * width + ALIGNED)


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

    pair: Tensor  # (2 N, padded d), H over `both`: each has products with H
    ids: Tensor  # (N, K)
    target: Tensor  # (N, K), dL/da
    norm: Tensor  # (N,), dL/dq
    total: Tensor | None  # (N,), dL/ds; None when the loss does not read the sum
    products: Tensor  # of H with `stacked`, R's only by rows; in place of Q's the gradient of hidden, Z
    features: int  # d
    scaled: float = 1.0  # what Z is still to be multiplied by

    @property
    def hidden(self) -> Tensor:  # (N, d), H
        return self.pair[: len(self.ids), : self.features]

    @property
    def both(self) -> Tensor:  # (N, d), Z and its sparse part: D H Q + 2 sparse
        return self.pair[len(self.ids) :, : self.features]

    @property
    def sparse(self) -> Tensor:  # (N, d), Y W + g_s total^T
        return self.both - self.scaled * self.products[:, : self.features]

    @property
    def mapped(self) -> Tensor:  # (N, d), H U^T
        start = Columns.of(self.features).map
        return self.products[:, start : start + self.features]

    @property
    def shared(self) -> Tensor:  # (N, 2), of H with offset and total
        start = Columns.of(self.features).shared
        return self.products[:, start : start + 2]

    @property
    def right(self) -> Tensor:  # (N, d), H R^T
        start = Columns.of(self.features).inverse
        return self.products[:, start : start + self.features]

    @property
    def like(self) -> Tensor:
        """A tensor of the same dtype and device."""
        return self.norm

    def sizes(self) -> Sizes:
        """N, K, d, the columns of the products, and whether there is a `total`."""
        rows, width = self.ids.shape
        return Sizes(rows, width, self.features, self.products.shape[1], self.total is not None)

    def place(self) -> Place:
        """Where the parts are in memory."""
        pair, products, ids, target = (p.data_ptr() for p in (self.pair, self.products, self.ids, self.target))
        norm = self.norm.data_ptr()
        return Place(pair, products, ids, target, norm, norm if self.total is None else self.total.data_ptr())

    def scale(self, factor: float) -> None:
        """Multiplies the gradient of the loss."""
        self.target, self.norm = self.target * factor, self.norm * factor
        self.both.mul_(factor)
        self.scaled *= factor
        if self.total is not None:
            self.total = self.total * factor

    @classmethod
    def joined(cls, parts: Sequence["FactoredGradient"]) -> "FactoredGradient":
        """Several passes as one of all their rows."""
        if len(parts) == 1:
            return parts[0]
        width = max(part.ids.shape[1] for part in parts)
        features = parts[0].features
        needed = min(part.products.shape[1] for part in parts)  # a large pass is without H R^T, and so is the step
        ids, target = (
            torch.cat([F.pad(getattr(part, name), (0, width - part.ids.shape[1])) for part in parts])
            for name in ("ids", "target")
        )
        return cls(
            pair=torch.cat(
                [part.pair[half * len(part.ids) :][: len(part.ids)] for half in (0, 1) for part in parts]
            ),
            ids=ids,
            target=target,
            norm=torch.cat([part.norm for part in parts]),
            total=None if parts[0].total is None else torch.cat([part.total for part in parts]),  # pyright: ignore
            products=torch.cat([part.with_whole_gradient()[:, :needed] for part in parts]),
            features=features,
        )

    def with_whole_gradient(self) -> Tensor:
        """`products`, with nothing that Z is still to be multiplied by."""
        if self.scaled != 1:
            self.products[:, : self.features].mul_(self.scaled)
            self.scaled = 1.0
        return self.products


class GradientInRoom(FactoredGradient):
    """One pass whose parts lie in one piece of memory, for compiled code to fill.

    They become tensors when one is first asked for: six of them take 15 microseconds, and an easy step asks for
    none.
    """

    def __init__(self, sizes: Sizes, like: Tensor) -> None:
        self._sizes = sizes
        self.features, self.scaled = sizes.features, 1.0
        self._starts = _starts(sizes, like.itemsize)
        self._room = like.new_empty(self._starts[-1])

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

    def parts(self) -> dict[str, Any]:
        """What was written there, as tensors."""
        rows, width, d, columns, uses_sum = self._sizes
        pair, products, target, norm, total, ids, _ = self._starts
        room = self._room
        return {
            "pair": room[pair:products].view(2 * rows, padded(d)),
            "ids": room[ids:].view(torch.int64)[: rows * width].view(rows, width),
            "target": room[target : target + rows * width].view(rows, width),
            "norm": room[norm : norm + rows],
            "total": room[total : total + rows] if uses_sum else None,
            "products": room[products:target].view(rows, columns),
        }

    def __getattr__(self, name: str) -> Any:
        if name not in PARTS:
            raise AttributeError(name)
        self.__dict__.update(self.parts())
        return self.__dict__[name]


@cache
def _starts(sizes: Sizes, itemsize: int) -> tuple[int, ...]:
    """Where pair, products, target, norm, total and ids begin in a room, and where it ends; in numbers."""
    rows, width, d, columns, uses_sum = sizes
    wide = 2 * rows * padded(d), rows * columns
    rest = rows * width, rows, rows * uses_sum, rows * width * 8 // itemsize
    return tuple(accumulate((padded(count) for count in (*wide, *rest)), initial=0))

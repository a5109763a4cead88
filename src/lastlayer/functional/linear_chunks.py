"""`logit_map(hidden @ weight.T + bias)`, a chunk of rows at a time, and the way back of its gradient."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.logit_map import LogitMap

# Logits that one chunk holds. Larger chunks mean fewer passes over the weight's gradient, more memory.
CHUNK_LOGITS = 1 << 25


class Wanted(NamedTuple):
    """Whose gradients to form."""

    hidden: bool
    weight: bool
    bias: bool
    logit_map: bool


class Gradients(NamedTuple):
    """What was formed, each in its own tensor's dtype; None where it was not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logit_map: tuple[Tensor | None, ...]


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that the matrix products run in: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logarithms and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_exact(logits: Tensor) -> Tensor:
    """`logits` in the dtype of logarithms and sums."""
    return logits.to(exact_dtype(logits.dtype))


class LinearChunks:
    """The logits of `hidden`, by chunks of rows in buffers that every chunk reuses.

        for rows in chunks:                  # slices of range(N)
            logits = chunks.logits(rows)     # (n, V), float32 or float64
            values = chunks.map(logits)      # the same tensor where there is no map
            ...                              # the caller turns `values` into their gradient, in place
            chunks.backward(rows, logits, values)
        chunks.gradients()

    What one chunk gave is overwritten by the next. Sums over chunks are in float32 at least.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        logit_map: LogitMap | None,
        dtype: torch.dtype,  # of the matrix products
    ) -> None:
        self.leaves = (hidden, weight, bias)
        self.exact = exact_dtype(dtype)
        self.low = dtype != self.exact
        self.hidden = hidden.detach().to(dtype)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(self.exact)
        self.logit_map = logit_map
        self.chunk_rows = max(1, CHUNK_LOGITS // len(weight))
        self.product = self._buffer(dtype)
        self.wide = self._buffer(self.exact) if self.low else self.product
        self.sums: list[Tensor | None] = [None, None, None]
        self.map_sums: list[Tensor | None] = []
        self.wanted = Wanted(False, False, False, False)

    def want(self, wanted: Wanted) -> None:
        """Says whose gradients `backward` is to form."""
        self.wanted = wanted
        if wanted.hidden:
            self.sums[0] = torch.empty_like(self.hidden, dtype=self.exact)
        if wanted.weight:
            self.sums[1] = torch.zeros_like(self.weight, dtype=self.exact)
        if wanted.bias:
            self.sums[2] = torch.zeros(len(self.weight), dtype=self.exact, device=self.weight.device)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, len(self.hidden)))

    def logits(self, rows: slice) -> Tensor:  # (n, V)
        """The raw logits of some rows, in a buffer; the bias is added in full precision."""
        product = self.product[: rows.stop - rows.start]
        if self.low:
            torch.mm(self.hidden[rows], self.weight.T, out=product)
            wide = self.wide[: len(product)]
            return wide.copy_(product) if self.bias is None else torch.add(product, self.bias, out=wide)
        if self.bias is None:
            return torch.mm(self.hidden[rows], self.weight.T, out=product)
        return torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=product)

    def map(self, logits: Tensor) -> Tensor:
        """The logits as the softmax sees them."""
        if self.logit_map is None:
            return logits
        values = self.logit_map(logits)
        return values.clone() if values is logits else values

    def backward(self, rows: slice, logits: Tensor, gradient: Tensor) -> None:
        """Carries `gradient (n, V)`, of the mapped logits, back to whatever is wanted."""
        if self.logit_map is not None:
            gradient, of_map = self.logit_map.vjp(logits, gradient)
            if self.wanted.logit_map:
                sums = self.map_sums or [None] * len(of_map)
                self.map_sums = [_added(total, part) for total, part in zip(sums, of_map, strict=True)]
        of_hidden, of_weight, of_bias = self.sums
        if of_bias is not None:
            of_bias.add_(gradient.sum(0))
        factor = self.product[: len(gradient)].copy_(gradient) if self.low else gradient
        if of_hidden is not None:
            of_hidden[rows] = factor @ self.weight
        if of_weight is None:
            return
        if self.low:  # a low-precision product is rounded once, and summed exactly
            of_weight.add_(factor.T @ self.hidden[rows])
        else:
            of_weight.addmm_(factor.T, self.hidden[rows])

    def gradients(self) -> Gradients:
        """The sums over all chunks so far."""
        hidden, weight, bias = (
            None if total is None or leaf is None else total.to(leaf.dtype)
            for total, leaf in zip(self.sums, self.leaves, strict=True)
        )
        parameters = () if self.logit_map is None else tuple(self.logit_map.parameters())
        sums = self.map_sums or [
            torch.zeros_like(p) if self.wanted.logit_map and p.requires_grad else None for p in parameters
        ]
        of_map = (None if total is None else total.to(p.dtype) for total, p in zip(sums, parameters, strict=True))
        return Gradients(hidden, weight, bias, tuple(of_map))

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        rows = min(self.chunk_rows, len(self.hidden))
        return torch.empty(rows, len(self.weight), dtype=dtype, device=self.hidden.device)


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)

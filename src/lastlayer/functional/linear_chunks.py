"""`logit_map(hidden @ weight.T + bias)`: chunk by chunk, with its backward pass, and of all rows at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.logit_map import LogitMap, barred_classes, bound, map_barred
from lastlayer.functional.precision import exact_dtype, no_autocast, product_dtype

# Bytes that the logits of one chunk may take; half of them where these hold as many rows as here. Every chunk adds
# to the whole gradient of the weight: with few rows that is much of its time.
CHUNK_BYTES, ENOUGH_ROWS = 1 << 28, 256
# Logits of one part, which PyTorch's operations make several tensors of: few, so that these are in cache and reuse
# each other's memory; on a GPU many, as each operation is a launch.
PART_NUMBERS, PART_NUMBERS_GPU = 1 << 20, 1 << 25
# Classes whose weight gradient is formed at once in low precision, before it is added to the float32 sum.
BLOCK_CLASSES = 4096


class LinearChunks:
    """The logits of `hidden`, by chunks of rows in buffers that every chunk reuses.

        for rows in chunks:                      # slices of range(N)
            for part in chunks.parts(rows):      # slices of rows; their products are ready
                logits = chunks.logits(part)     # (n, V), float32 or float64
                values = chunks.map(logits)      # the same tensor where there is no map
                ...                              # the caller replaces `values` by their gradient, in place
                chunks.map_back(part, logits, values)
            chunks.multiply_back(rows)
        chunks.gradients()

    A chunk is large, for efficient matrix products; a part is small, so that elementwise operations on its logits
    stay in cache. The buffers of a chunk are overwritten by the next. Sums over chunks are in float32 at least.
    """

    def __init__(
        self,
        hidden: Tensor,  # (N, d)
        weight: Tensor,  # (V, d)
        bias: Tensor | None,  # (V,)
        logit_map: LogitMap | None,
        dtype: torch.dtype,  # of the matrix products
        *,
        group: int = 1,  # rows that stay together; chunks are then no larger than those of N / group rows
        buffers: int = 1,  # of as many rows and classes, used together: they share the bytes of a chunk
        least: int | None = None,  # chunks, unless these would be smaller than parts, which are smaller then too
    ) -> None:
        self.leaves = (hidden, weight, bias)
        self.exact = exact_dtype(dtype)
        self.hidden = hidden.detach().to(dtype)
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(self.exact)
        self.map_pass = None if logit_map is None else logit_map.begin()
        self.barred = None if logit_map is None else barred_classes(bias)  # that the map must not see
        row_bytes = len(weight) * dtype.itemsize * buffers
        most = len(hidden) if group == 1 else 3 * len(hidden) // (4 * group)
        numbers = PART_NUMBERS if hidden.device.type == "cpu" else PART_NUMBERS_GPU
        numbers = numbers if least is None else numbers // 4
        self.part_rows = max(group, numbers // len(weight) // group * group)
        if least is not None:
            most = min(most, max(self.part_rows, -(-len(hidden) // least)))
        self.chunk_rows = max(group, min(rows_of_chunk(row_bytes), most) // group * group)
        if (
            torch.compiler.is_compiling()
        ):  # which joins elementwise operations itself, and whose graph has each part
            self.part_rows = self.chunk_rows
        self.product = hidden.new_empty(self.chunk_rows, len(weight), dtype=dtype)
        self.sums: list[Tensor | None] = [None, None, None]
        self.map_wanted = False

    def want(self, wanted: Sequence[bool]) -> None:
        """Sets which gradients to form: for hidden, weight, bias and the map's parameters."""
        of_hidden, of_weight, of_bias, *of_map = wanted
        self.map_wanted = any(of_map)
        make = torch.empty_like if len(self.hidden) else torch.zeros_like
        if of_hidden:
            self.sums[0] = make(self.hidden, dtype=self.exact)
        if of_weight:
            self.sums[1] = make(self.weight, dtype=self.exact, memory_format=torch.contiguous_format)
        if of_bias:
            self.sums[2] = torch.zeros(len(self.weight), dtype=self.exact, device=self.weight.device)

    def __iter__(self) -> Iterator[slice]:
        yield from _slices(0, len(self.hidden), self.chunk_rows)

    def multiply(self, rows: slice) -> Tensor:  # (n, V)
        """The logits of a chunk before the bias, in the dtype of the products, in a buffer."""
        return torch.mm(self.hidden[rows], self.weight.T, out=self._products(rows))

    def parts(self, rows: slice) -> Iterator[slice]:
        """Multiplies a chunk, then yields its parts."""
        self.multiply(rows)
        yield from _slices(rows.start, rows.stop, self.part_rows)

    def all_parts(self) -> Iterator[slice]:
        """The parts of every chunk, for callers that need no backward pass."""
        for rows in self:
            yield from self.parts(rows)

    def logits(self, part: slice) -> Tensor:  # (n, V)
        """The raw logits of a part of the chunk; the bias is added in float32 at least."""
        product = self._products(part)
        if product.dtype != self.exact:
            product = product.to(self.exact)
        return product if self.bias is None else product.add_(self.bias)

    def map(self, logits: Tensor) -> Tensor:
        """The logits as the softmax sees them."""
        return logits if self.map_pass is None else map_barred(self.map_pass.values, logits, self.barred)

    def map_back(self, part: slice, logits: Tensor, gradient: Tensor) -> None:
        """Propagates `gradient (n, V)`, of the mapped logits, to the map and, in place, to the logits."""
        if self.map_pass is not None:
            seen = logits if self.barred is None else logits.masked_fill(self.barred, 0)
            gradient = self.map_pass.back(seen, gradient)
        place = self._products(part)
        if gradient is not logits or gradient.dtype != place.dtype:  # else it is in the buffer already
            place.copy_(gradient)

    def multiply_back(self, rows: slice, scale: Tensor | None = None) -> None:
        """The products of the chunk's gradient `(n, V)`, which has overwritten its logits.

        With `scale (n,)`, those of `scale[:, None] * gradient`, at the cost of scaling the narrow factors.
        """
        gradient = self._products(rows)
        of_hidden, of_weight, of_bias = self.sums
        hidden, first = self.hidden[rows], rows.start == 0
        weights = gradient.new_ones(len(gradient), dtype=self.exact) if scale is None else scale
        if of_hidden is not None:
            of_hidden[rows] = gradient @ self.weight
        if scale is not None:
            hidden = (hidden * scale[:, None]).to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[rows].mul_(scale[:, None])
        if gradient.dtype == self.exact:
            if of_bias is not None:
                of_bias.addmv_(gradient.T, weights)
            if of_weight is not None:
                of_weight.addmm_(gradient.T, hidden, beta=0 if first else 1)
            return
        # Products are rounded once a chunk and summed in float32, by blocks still in cache when they are added.
        for start in range(0, gradient.shape[1], BLOCK_CLASSES):
            classes = slice(start, start + BLOCK_CLASSES)
            block = gradient[:, classes]
            if of_bias is not None:
                of_bias[classes].addmv_(block.to(self.exact).T, weights)
            if of_weight is not None:
                part = block.T @ hidden
                of_weight[classes].copy_(part) if first else of_weight[classes].add_(part)

    def add_to_map(self, sums: Tensor | None) -> None:
        """Adds the sums of a kernel for the map's own parameters."""
        if self.map_pass is not None and self.map_wanted and sums is not None:
            self.map_pass.add_sums(sums)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Those for hidden, weight, bias and the map's parameters, each in its own tensor's dtype; after the last
        chunk."""
        del self.product  # its memory is reused for the gradients below
        sums, leaves = [*self.sums], [*self.leaves]
        if self.map_pass is not None:
            parameters = list(self.map_pass.logit_map.parameters())
            leaves += parameters
            sums += self.map_pass.gradients() if self.map_wanted else [None for _ in parameters]
        return tuple(
            None if total is None or leaf is None else total.to(leaf.dtype)
            for total, leaf in zip(sums, leaves, strict=True)
        )

    def _products(self, rows: slice) -> Tensor:  # (n, V)
        """The part of the buffer that holds some rows of the chunk."""
        start = rows.start % self.chunk_rows
        return self.product[start : start + rows.stop - rows.start]


def rows_of_chunk(row_bytes: int) -> int:
    """How many rows of logits, of as many bytes each, a chunk holds."""
    return min(CHUNK_BYTES // row_bytes, max(ENOUGH_ROWS, CHUNK_BYTES // (2 * row_bytes)))


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """`range(start, stop)` in slices of `step`, by their number: a compiled graph fixes that, and no size."""
    for place in range(-((start - stop) // step)):
        yield slice(start + place * step, min(start + (place + 1) * step, stop))


def linear_logits(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    logit_map: LogitMap | None,
    parameters: Sequence[Tensor],  # of the map
    dtype: torch.dtype,  # of the product
) -> tuple[Tensor, Tensor]:  # (N, V) each, float32 at least
    """The raw logits `hidden @ weight.T + bias`, and the mapped ones, by PyTorch's own operations.

    The plain twin of `LinearChunks`, for second derivatives, `torch.func`, "meta" and exported programs.
    """
    exact = exact_dtype(dtype)
    with no_autocast(hidden.device.type):
        logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(exact)
        if bias is not None:
            logits = logits + bias.to(exact)
        if logit_map is None:
            return logits, logits
        barred = barred_classes(bias)
        return logits, bound(logit_map, parameters, lambda: map_barred(logit_map, logits, barred))


def mapped_logits(
    hidden: Tensor,  # (N, d)
    weight: Tensor,  # (V, d)
    bias: Tensor | None,  # (V,)
    logit_map: LogitMap | None,
) -> Tensor:  # (N, V), float32 at least
    """`logit_map(hidden @ weight.T + bias)`, whose product runs in autocast's dtype where that is on."""
    parameters = () if logit_map is None else tuple(logit_map.parameters())
    return linear_logits(hidden, weight, bias, logit_map, parameters, product_dtype(hidden))[1]

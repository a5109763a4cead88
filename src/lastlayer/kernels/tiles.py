"""A square matrix made symmetric in place, 16 by 16 numbers at a time, which are transposed in registers.

Imports numba: import this module only where a kernel first runs.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lastlayer.kernels.cache_hints import fetch_number
from lastlayer.kernels.fast_math import compiled

TILE = 16
AHEAD = 2  # tiles


@compiled
def share(worker, workers, count):
    """Which of `count` are a worker's, from the first to before the last: whole tiles, but for the very last."""
    first = count * worker // workers // TILE * TILE
    return first, count if worker == workers - 1 else count * (worker + 1) // workers // TILE * TILE


@intrinsic
def _average(typingctx: Any, matrix: Any, row: Any, column: Any) -> Any:
    """The tile at (row, column) and that at (column, row) become the mean of the one and the other transposed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = signature.args[0]
        array = context.make_array(kind)(context, builder, args[0])
        width = builder.extract_value(array.shape, 1)
        vector = ir.VectorType(context.get_value_type(kind.dtype), TILE)

        def places(row: Any, column: Any) -> list[Any]:
            starts = [builder.add(builder.mul(builder.add(row, row.type(r)), width), column) for r in range(TILE)]
            return [builder.bitcast(builder.gep(array.data, [at]), vector.as_pointer()) for at in starts]

        def loaded(at: Any) -> Any:
            value = builder.load(at)
            value.align = kind.dtype.bitwidth // 8
            return value

        one, other = places(args[1], args[2]), places(args[2], args[1])
        half = ir.Constant(vector, [0.5] * TILE)
        pairs = zip([loaded(at) for at in one], transposed(builder, [loaded(at) for at in other]), strict=True)
        mean = [builder.fmul(half, builder.fadd(a, b)) for a, b in pairs]
        for rows, into in ((mean, one), (transposed(builder, mean), other)):
            for value, at in zip(rows, into, strict=True):
                builder.store(value, at).align = kind.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.none(matrix, types.int64, types.int64), generate


def transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """The transpose of 16 vectors: four rounds, each of which swaps pieces that are twice as large."""
    vectors = list(vectors)
    for step in (1, 2, 4, 8):
        for n in range(TILE):
            if not n & step:
                vectors[n], vectors[n + step] = halves(builder, vectors[n], vectors[n + step], step)
    return vectors


def halves(builder: Any, left: Any, right: Any, step: int) -> tuple[Any, Any]:
    """Of two vectors in pieces of `step` lanes: every even piece of both, by turns; every odd one."""
    even = [lane if not lane & step else TILE + lane - step for lane in range(TILE)]
    odd = [lane + step if not lane & step else TILE + lane for lane in range(TILE)]
    masks = (ir.Constant(ir.VectorType(ir.IntType(32), TILE), lanes) for lanes in (even, odd))
    first, second = (builder.shuffle_vector(left, right, mask) for mask in masks)
    return first, second


@compiled
def symmetric_share(worker, workers, matrix):
    """A worker's part of `matrix <- (matrix + matrix^T) / 2`: what is its own rows' alone, and half of the rest.

    So that few of the rows that a core has changed, and will read next, come from the other's cache.
    """
    size, half = matrix.shape[0], matrix.dtype.type(0.5)
    whole = size // TILE
    first, last = share(worker, workers, size)
    for i in range(whole):
        own_row = first <= i * TILE < last
        for j in range(i + 1):
            own_column = first <= j * TILE < last
            if (own_row and own_column) or (own_row if (i + j) % 2 else own_column):
                for n in range((j + AHEAD) * TILE, min((j + AHEAD + 1) * TILE, size)):
                    fetch_number(matrix, n, i * TILE)
                    fetch_number(matrix, n, i * TILE + TILE - 1)
                _average(matrix, i * TILE, j * TILE)
    if worker == workers - 1:
        for i in range(whole * TILE, size):
            for j in range(i):
                mean = half * (matrix[i, j] + matrix[j, i])
                matrix[i, j] = mean
                matrix[j, i] = mean

"""Memory fetched before it is wanted, and written past the caches, for matrices that are larger than these.

The processor's own prefetcher stops at every page, and an ordinary store first reads the line that it changes.
Imports numba: import this module only where a kernel first runs.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from lastlayer.kernels.fast_math import compiled

LINE_BYTES = 64
FETCH_AHEAD = 8192  # bytes
STORE_BYTES = 16  # of one store past the caches, which must begin at a multiple of it
CACHE_BYTES = 1 << 23  # what may be in a cache still when it is read again


@compiled
def exceeds_cache(matrix):
    """Whether a matrix is too large to be in the caches."""
    return matrix.nbytes >= CACHE_BYTES


@compiled
def rows_ahead(matrix):
    """How many rows before its use a row of `matrix` is best fetched."""
    return 1 + FETCH_AHEAD // (matrix.shape[1] * matrix.itemsize)


@compiled
def fetch_row(matrix, row):
    """Has a row of a contiguous matrix brought into the cache; one that is not there does no harm."""
    width = matrix.shape[1]
    for k in range(0, width, LINE_BYTES // matrix.itemsize):
        _fetch(matrix, row * width + k)


@compiled
def fetch_number(matrix, row, column):
    """Has the line of one number of a contiguous matrix brought into the cache; one not there does no harm."""
    _fetch(matrix, row * matrix.shape[1] + column)


@compiled
def goes_past_cache(matrix):
    """Whether the rows of a contiguous matrix may be written with `store_past_cache`, and had better be."""
    row_bytes = matrix.shape[1] * matrix.itemsize
    fits = matrix.ctypes.data % STORE_BYTES == 0 and row_bytes % STORE_BYTES == 0
    return fits and exceeds_cache(matrix)


@intrinsic
def store_past_cache(typingctx: Any, values: Any, at: Any, array: Any, to: Any) -> Any:
    """Copies `STORE_BYTES` from number `at` of `values` on, to number `to` of `array` on; end with a `fence()`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, at, array, to = args
        of_values, _, of_array, _ = signature.args
        bits = of_values.dtype.bitwidth
        block = ir.VectorType(context.get_value_type(of_values.dtype), 8 * STORE_BYTES // bits).as_pointer()
        loaded = builder.load(builder.bitcast(_address(context, builder, of_values, values, at), block))
        loaded.align = bits // 8
        stored = builder.store(loaded, builder.bitcast(_address(context, builder, of_array, array, to), block))
        stored.align = STORE_BYTES
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(values, types.int64, array, types.int64), generate


@intrinsic
def fence(typingctx: Any) -> Any:
    """Has all that was written past the caches seen by every thread that goes on from here."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def _fetch(typingctx: Any, array: Any, at: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        prefetch(builder, _address(context, builder, signature.args[0], *args))
        return context.get_dummy_value()

    return types.none(array, types.int64), generate


def prefetch(builder: Any, address: Any) -> None:
    """Writes the instruction that asks for the line at `address` and does not wait, for intrinsics."""
    i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
    fetch = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
    to_read, into_second_level, data = i32(0), i32(2), i32(1)
    builder.call(fetch, [builder.bitcast(address, pointer), to_read, into_second_level, data])


def _address(context: Any, builder: Any, kind: Any, array: Any, at: Any) -> Any:
    """Of number `at` of a contiguous array."""
    return builder.gep(context.make_array(kind)(context, builder, array).data, [at])

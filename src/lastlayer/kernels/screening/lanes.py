"""Sixteen float32 at once, written out: where LLVM cannot know that arrays lie apart, its loops move few.

Arrays are contiguous; `(n, 16)` holds 16 hidden states beside each other for each of n classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
LINE = 64  # bytes of the cache that are fetched together; what begins at such a place is read fastest
_I32, _I64 = ir.IntType(32), ir.IntType(64)
FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)
FREE = ("reassoc", "contract", "nsz", "nnan", "arcp")


@njit(cache=True)
def zero_lines(count: int) -> Any:  # (count,) int8
    """Zeros that begin at a cache line."""
    room = np.zeros(count + LINE, dtype=np.int8)
    first = -room.ctypes.data % LINE
    return room[first : first + count]


def _at(context: Any, builder: Any, kind: Any, array: Any) -> Callable[..., Any]:
    """The address of a vector in an array: of `offset` numbers from its start."""
    data = context.make_array(kind)(context, builder, array).data
    vector = FLOATS if kind.dtype == types.float32 else _INTEGERS
    return lambda offset: builder.bitcast(builder.gep(data, [offset]), vector.as_pointer())


def _load(builder: Any, address: Any) -> Any:
    vector = builder.load(address)
    vector.align = 4
    return vector


def _store(builder: Any, vector: Any, address: Any) -> None:
    builder.store(vector, address).align = 4


def everywhere(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTEGERS, [0] * LANES))


def larger(builder: Any, left: Any, right: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


@intrinsic
def put_together(
    typingctx: Any,
    products: Any,
    steps: Any,
    scale: Any,
    bias: Any,
    count: Any,
    beside: Any,
    first: Any,
    most: Any,
) -> Any:
    """Scores from integer products: `beside[first + j] = scale[j] * (steps @ products[j]) + bias[j]`, j < count.

    `products (n, 32)` int32 are of 16 high parts and of the 16 low parts to them, `steps (2, 16)` what they stand
    for; `most (16,)` becomes the largest score so far of each hidden state.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        products, steps, scale, bias, most = (
            _at(context, builder, signature.args[n], args[n]) for n in (0, 1, 2, 3, 7)
        )
        count, beside, first = args[4], _at(context, builder, signature.args[5], args[5]), args[6]
        step_high, step_low = (_load(builder, steps(_I64(LANES * part))) for part in range(2))
        largest = cgutils.alloca_once_value(builder, _load(builder, most(_I64(0))))
        with cgutils.for_range(builder, count) as loop:
            line = builder.mul(loop.index, _I64(2 * LANES))
            of_high, of_low = (
                builder.sitofp(_load(builder, products(builder.add(line, _I64(LANES * part)))), FLOATS)
                for part in range(2)
            )
            both = builder.fadd(
                builder.fmul(of_high, step_high, flags=FREE),
                builder.fmul(of_low, step_low, flags=FREE),
                flags=FREE,
            )
            of_class, shift = (
                everywhere(builder, builder.load(builder.bitcast(at(loop.index), ir.FloatType().as_pointer())))
                for at in (scale, bias)
            )
            score = builder.fadd(builder.fmul(both, of_class, flags=FREE), shift, flags=FREE)
            _store(builder, score, beside(builder.mul(builder.add(first, loop.index), _I64(LANES))))
            builder.store(larger(builder, builder.load(largest), score), largest)
        _store(builder, builder.load(largest), most(_I64(0)))
        return context.get_dummy_value()

    return types.none(products, steps, scale, bias, types.int64, beside, types.int64, most), generate


@intrinsic
def lower(typingctx: Any, beside: Any, most: Any, count: Any) -> Any:
    """`beside[:count] -= most`, of (n, 16) and (16,)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        beside, most = (_at(context, builder, signature.args[n], args[n]) for n in range(2))
        by = _load(builder, most(_I64(0)))
        with cgutils.for_range(builder, args[2]) as loop:
            at = beside(builder.mul(loop.index, _I64(LANES)))
            _store(builder, builder.fsub(_load(builder, at), by, flags=FREE), at)
        return context.get_dummy_value()

    return types.none(beside, most, types.int64), generate


@intrinsic
def add_up(typingctx: Any, beside: Any, count: Any, total: Any) -> Any:
    """`total = beside[:count].sum(0)`, of (n, 16) and (16,)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        beside, total = (_at(context, builder, signature.args[n], args[n]) for n in (0, 2))
        so_far = cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * LANES))
        with cgutils.for_range(builder, args[1]) as loop:
            one = _load(builder, beside(builder.mul(loop.index, _I64(LANES))))
            builder.store(builder.fadd(builder.load(so_far), one, flags=FREE), so_far)
        _store(builder, builder.load(so_far), total(_I64(0)))
        return context.get_dummy_value()

    return types.none(beside, types.int64, total), generate


def _halves(builder: Any, left: Any, right: Any, step: int) -> tuple[Any, Any]:
    """Of two vectors in pieces of `step` lanes: every even piece of both, by turns; every odd one."""
    even = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
    odd = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
    masks = (ir.Constant(_INTEGERS, lanes) for lanes in (even, odd))
    first, second = (builder.shuffle_vector(left, right, mask) for mask in masks)
    return first, second


def transposed(builder: Any, vectors: list[Any]) -> list[Any]:
    """The transpose of 16 vectors: four rounds, each of which swaps pieces that are twice as large."""
    vectors = list(vectors)
    for step in (1, 2, 4, 8):
        for n in range(LANES):
            if not n & step:
                pair = vectors[n], vectors[n + step]
                vectors[n], vectors[n + step] = _halves(builder, *pair, step)
    return vectors


def summed(builder: Any, vectors: list[Any]) -> Any:
    """The sums of 16 vectors as one: rounds like those of the transpose, added up."""
    for step in (1, 2, 4, 8):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(*_halves(builder, *pair, step), flags=FREE) for pair in pairs]
    return vectors[0]


@intrinsic
def transpose(typingctx: Any, beside: Any, first: Any, target: Any, row: Any, rows: Any, column: Any) -> Any:
    """`target[row : row + rows, column : column + 16] = beside[first : first + 16, :rows].T`, rows from 1 to 16."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        beside, target = (_at(context, builder, signature.args[n], args[n]) for n in (0, 2))
        first, (row, rows, column) = builder.mul(args[1], _I64(LANES)), args[3:]
        shape = context.make_array(signature.args[2])(context, builder, args[2]).shape
        width = builder.extract_value(shape, 1)
        vectors = [_load(builder, beside(builder.add(first, _I64(LANES * n)))) for n in range(LANES)]
        last = builder.sub(rows, _I64(1))
        # from the last one on, and those that are too many into the last: it is overwritten by its own
        for n, vector in reversed(list(enumerate(transposed(builder, vectors)))):
            own = builder.select(builder.icmp_signed("<", _I64(n), last), _I64(n), last)
            offset = builder.add(builder.mul(builder.add(row, own), width), column)
            _store(builder, vector, target(offset))
        return context.get_dummy_value()

    kinds = beside, types.int64, target, types.int64, types.int64, types.int64
    return types.none(*kinds), generate


@intrinsic
def fetch_rows(typingctx: Any, array: Any, first: Any, count: Any) -> Any:
    """Asks for `array[first : first + count]`, of a contiguous matrix, and does not wait."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _I32, _I32, _I32])
        fetch = builder.module.declare_intrinsic("llvm.prefetch.p0", (), kind)
        matrix = context.make_array(signature.args[0])(context, builder, args[0])
        row = builder.extract_value(matrix.strides, 0)
        start = builder.gep(builder.bitcast(matrix.data, cgutils.voidptr_t), [builder.mul(args[1], row)])
        with cgutils.for_range(builder, builder.udiv(builder.mul(args[2], row), _I64(LINE))) as loop:
            builder.call(fetch, [builder.gep(start, [builder.mul(loop.index, _I64(LINE))]), _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.none(array, types.int64, types.int64), generate

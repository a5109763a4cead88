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

from lastlayer.kernels.cache_hints import LINE_BYTES
from lastlayer.kernels.fast_math import EXP2, LOG2_E
from lastlayer.kernels.tiles import halves, transposed

LANES = 16
SUMMARISED = 64  # scores that `summarise_sixteen` takes for a block
_I32, _I64 = ir.IntType(32), ir.IntType(64)
FLOATS, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_I32, LANES)
_ZEROS = ir.Constant(FLOATS, [0.0] * LANES)
FREE = ("reassoc", "contract", "nsz", "nnan", "arcp")


@njit(cache=True)
def zero_lines(count: int) -> Any:  # (count,) int8
    """Zeros that begin at a cache line, from where they are read fastest."""
    room = np.zeros(count + LINE_BYTES, dtype=np.int8)
    first = -room.ctypes.data % LINE_BYTES
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


def exponential(builder: Any, x: Any) -> Any:
    """`fast_math.exp` of a vector without NaN."""

    def constant(number: Any) -> Any:
        return ir.Constant(FLOATS, [float(np.float32(number))] * LANES)

    floor = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS]), "llvm.floor.v16f32")
    t = larger(builder, builder.fmul(x, constant(LOG2_E), flags=FREE), constant(-127.0))
    whole = builder.call(floor, [builder.fadd(t, constant(0.5))])
    rest = builder.fsub(t, whole)
    power = constant(EXP2[0])
    for coefficient in EXP2[1:]:
        power = builder.fadd(builder.fmul(power, rest, flags=FREE), constant(coefficient), flags=FREE)
    exponent = builder.add(builder.fptosi(whole, _INTEGERS), ir.Constant(_INTEGERS, [127] * LANES))
    scale = builder.bitcast(builder.shl(exponent, ir.Constant(_INTEGERS, [23] * LANES)), FLOATS)
    return builder.fmul(power, scale)


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
def sum_exponentials(typingctx: Any, beside: Any, most: Any, count: Any, total: Any) -> Any:
    """`total = exp(beside[:count] - most).sum(0)`, of (n, 16) and (16,)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        beside, most, total = (_at(context, builder, signature.args[n], args[n]) for n in (0, 1, 3))
        by, so_far = _load(builder, most(_I64(0))), cgutils.alloca_once_value(builder, _ZEROS)
        with cgutils.for_range(builder, args[2]) as loop:
            score = _load(builder, beside(builder.mul(loop.index, _I64(LANES))))
            one = exponential(builder, builder.fsub(score, by, flags=FREE))
            builder.store(builder.fadd(builder.load(so_far), one, flags=FREE), so_far)
        _store(builder, builder.load(so_far), total(_I64(0)))
        return context.get_dummy_value()

    return types.none(beside, most, types.int64, total), generate


@intrinsic
def summarise_sixteen(typingctx: Any, scores: Any, block_max: Any, block_sum: Any, block: Any) -> Any:
    """Maxima, and sums of exponentials relative to them, of 16 whole blocks of 64 scores from `block` on.

    What runs across a vector, the last step of a maximum or of a sum, is done for all 16 together.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, block_max, block_sum = (_at(context, builder, signature.args[n], args[n]) for n in range(3))
        block, kind = args[3], ir.ArrayType(FLOATS, LANES)
        of_blocks = cgutils.alloca_once(builder, kind)
        maxima = context.make_array(signature.args[1])(context, builder, args[1]).data

        def each(combine: Callable[[Any, list[Any]], Any]) -> list[Any]:
            """What `combine(block, scores)` gives, for every block, of its scores in vectors."""
            with cgutils.for_range(builder, _I64(LANES)) as loop:
                at = builder.add(block, loop.index)
                start = builder.mul(at, _I64(SUMMARISED))
                parts = range(0, SUMMARISED, LANES)
                vectors = [_load(builder, scores(builder.add(start, _I64(part)))) for part in parts]
                builder.store(combine(at, vectors), cgutils.gep_inbounds(builder, of_blocks, 0, loop.index))
            places = (cgutils.gep_inbounds(builder, of_blocks, 0, n) for n in range(LANES))
            return [builder.load(place) for place in places]

        def largest(_: Any, vectors: list[Any]) -> Any:
            return _tree(vectors, lambda left, right: larger(builder, left, right))

        def exponentials(at: Any, vectors: list[Any]) -> Any:
            most = builder.load(builder.gep(maxima, [at]))
            empty = builder.fcmp_ordered("==", most, ir.Constant(ir.FloatType(), float("-inf")))
            by = everywhere(builder, builder.select(empty, ir.Constant(ir.FloatType(), 0.0), most))
            terms = [exponential(builder, builder.fsub(vector, by, flags=FREE)) for vector in vectors]
            return _tree(terms, lambda left, right: builder.fadd(left, right, flags=FREE))

        _store(builder, across(builder, each(largest), lambda pair: larger(builder, *pair)), block_max(block))
        _store(builder, summed(builder, each(exponentials)), block_sum(block))
        return context.get_dummy_value()

    return types.none(scores, block_max, block_sum, types.int64), generate


def _tree(vectors: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    """All of them combined by pairs."""
    while len(vectors) > 1:
        vectors = [combine(*pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def across(builder: Any, vectors: list[Any], combine: Callable[[tuple[Any, Any]], Any]) -> Any:
    """The lanes of each of 16 vectors combined, as one vector: rounds like those of the transpose."""
    for step in (1, 2, 4, 8):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [combine(halves(builder, *pair, step)) for pair in pairs]
    return vectors[0]


def summed(builder: Any, vectors: list[Any]) -> Any:
    """The sums of 16 vectors as one."""
    return across(builder, vectors, lambda pair: builder.fadd(*pair, flags=FREE))


@intrinsic
def transpose(typingctx: Any, beside: Any, first: Any, target: Any, row: Any, rows: Any, column: Any) -> Any:
    """`target[row : row + rows, column : column + 16] = beside[first : first + 16, :rows].T`, 1 <= rows <= 16."""

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

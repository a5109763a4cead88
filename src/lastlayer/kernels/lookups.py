"""Lookups into a table of pairs, and sums of pairs, in vector instructions that numba does not emit by itself.

A loop that reads one array at indices and writes another is not vectorised, as the two might overlap; and two sums
side by side are not added as one vector. Imports numba: import this module only where a kernel first runs.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lastlayer.kernels.fast_math import compiled

LANES = 8  # pairs of float32 that fill a vector of 512 bits

_I1, _I32, _I64, _F32, _F64 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


def _place(context, builder, array_type, array, index, kind):
    """A pointer to a `kind` at number `index` of an array in C order."""
    numbers = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
    return builder.bitcast(numbers, kind.as_pointer())


def _load(builder, place, align):
    loaded = builder.load(place)
    loaded.align = align
    return loaded


def _store(builder, value, place, align):
    builder.store(value, place).align = align


@intrinsic
def _look_up_lanes(typing, lines, segments, logits, slopes, start):
    """`LANES` steps of `look_up`: one gather of pairs."""

    def generate(context, builder, signature, arguments):
        start = arguments[4]
        at_segments, at_logits, at_slopes = (
            _place(context, builder, signature.args[i], arguments[i], start, ir.VectorType(kind, LANES))
            for i, kind in ((1, _I32), (2, _F32), (3, _F32))
        )
        wide = ir.VectorType(_I64, LANES)
        table = _place(context, builder, signature.args[0], arguments[0], ir.Constant(_I64, 0), _I64)
        nothing = ir.Constant(wide, ir.Undefined)
        one = builder.insert_element(nothing, builder.ptrtoint(table, _I64), ir.Constant(_I32, 0))
        base = builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))
        offset = builder.shl(builder.zext(_load(builder, at_segments, 4), wide), ir.Constant(wide, [3] * LANES))
        pointers = ir.VectorType(_I64.as_pointer(), LANES)
        everywhere = ir.VectorType(_I1, LANES)
        gather = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(wide, [pointers, _I32, everywhere, wide]),
            f"llvm.masked.gather.v{LANES}i64.v{LANES}p0",
        )
        of_pairs = builder.inttoptr(builder.add(base, offset), pointers)
        mask = ir.Constant(everywhere, [1] * LANES)
        pairs = builder.call(gather, [of_pairs, ir.Constant(_I32, 4), mask, nothing])
        flat = builder.bitcast(pairs, ir.VectorType(_F32, 2 * LANES))
        slope, intercept = (
            builder.shuffle_vector(
                flat, flat, ir.Constant(ir.VectorType(_I32, LANES), list(range(first, 2 * LANES, 2)))
            )
            for first in (0, 1)
        )
        product = builder.fmul(slope, _load(builder, at_logits, 4), flags=["contract"])
        _store(builder, builder.fadd(product, intercept, flags=["contract"]), at_logits, 4)
        _store(builder, slope, at_slopes, 4)
        return context.get_dummy_value()

    return types.void(lines, segments, logits, slopes, start), generate


@intrinsic
def _add_pair(typing, sums, row, first, second):
    """`sums[row] += first, second` for float64 sums and float32 numbers: one load, one addition, one store."""

    def generate(context, builder, signature, arguments):
        pair = ir.VectorType(_F64, 2)
        number = builder.mul(arguments[1], ir.Constant(_I64, 2))
        place = _place(context, builder, signature.args[0], arguments[0], number, pair)
        narrow = ir.Constant(ir.VectorType(_F32, 2), ir.Undefined)
        for lane in (0, 1):
            narrow = builder.insert_element(narrow, arguments[2 + lane], ir.Constant(_I32, lane))
        _store(builder, builder.fadd(_load(builder, place, 8), builder.fpext(narrow, pair)), place, 8)
        return context.get_dummy_value()

    return types.void(sums, row, first, second), generate


@compiled
def look_up(lines, segments, logits, slopes):
    """The slope at each logit, from `lines (K, 2)` of slopes and offsets; `logits` become the lines' values."""
    whole = logits.shape[0] // LANES * LANES
    for start in range(0, whole, LANES):
        _look_up_lanes(lines, segments, logits, slopes, np.int64(start))
    for j in range(whole, logits.shape[0]):
        slopes[j] = lines[segments[j], 0]
        logits[j] = slopes[j] * logits[j] + lines[segments[j], 1]


@compiled
def count(sums, segments, first, second):
    """Adds each of two numbers to the two `sums (K, 2)` of its segment."""
    for j in range(first.shape[0]):
        _add_pair(sums, np.int64(segments[j]), first[j], second[j])

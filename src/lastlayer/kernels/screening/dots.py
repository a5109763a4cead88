"""Dot products of int8 rows by AVX512-VNNI, which numba does not reach by itself."""

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lastlayer.kernels.cache_hints import prefetch
from lastlayer.kernels.screening.lanes import FLOATS, FREE, everywhere, summed

LANES = 64  # int8 numbers that one instruction multiplies
ROWS = 16  # that are scored together
ROWS_AT_ONCE = 4  # and of these, whose sums are held at once
PREFETCH = 9216  # bytes ahead; the processor's own prefetcher stops at every page
HAS_VNNI = all(binding.get_host_cpu_features().get(name, False) for name in ("avx512f", "avx512vnni"))


@intrinsic
def pointer_at(typingctx: Any, array: Any, offset: Any) -> Any:
    """The address of a byte of a contiguous int8 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(builder.bitcast(data, cgutils.voidptr_t), [args[1]])

    return types.CPointer(types.int8)(array, types.int64), generate


@njit(cache=True)
def unsigned_extra(vector: Any) -> Any:  # (w,) int8 -> (16,) int32
    """What flipping the rows' sign bits adds to each lane's products with `vector`, negative: where sums begin."""
    extra = np.zeros(LANES // 4, dtype=np.int32)
    for j in range(vector.size):
        extra[j % LANES // 4] -= np.int32(128) * np.int32(vector[j])
    return extra


@intrinsic
def score_rows(
    typingctx: Any,
    rows: Any,
    width: Any,
    high: Any,
    low: Any,
    extra_high: Any,
    extra_low: Any,
    step_high: Any,
    step_low: Any,
    scores: Any,
    first: Any,
) -> Any:
    """`scores[first : first + 16] = rows @ (step_high * high + step_low * low)` of consecutive int8 rows.

    By AVX512-VNNI; `width` is a multiple of 64. The instruction wants one factor unsigned: flipping the sign bit
    adds 128 to every number of the rows, which the `unsigned_extra` of both vectors takes back. Integer sums are
    exact; 16 of them are put together in float32.
    """
    pointer = types.CPointer(types.int8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, width, high, low = args[:4]
        i32, i64 = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(i32, LANES // 4)
        module = builder.module
        dot = module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(vector, [vector] * 3))

        def load(base: Any, offset: Any) -> Any:
            value = builder.load(builder.bitcast(builder.gep(base, [offset]), vector.as_pointer()))
            value.align = 1
            return value

        def data(index: int) -> Any:
            return context.make_array(signature.args[index])(context, builder, args[index]).data

        extras = [load(builder.bitcast(data(index), cgutils.voidptr_t), i64(0)) for index in (4, 5)]
        steps = [everywhere(builder, args[index]) for index in (6, 7)]

        def integers(rows: Any) -> list[Any]:
            """The products' sums of ROWS_AT_ONCE rows, by lanes: of the first with both vectors, of the next..."""
            before = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            builder.branch(loop)
            builder.position_at_end(loop)
            offset = builder.phi(i64)
            sums = [builder.phi(vector) for _ in range(2 * ROWS_AT_ONCE)]
            parts, flip, grown = (load(high, offset), load(low, offset)), vector([-2139062144] * 16), []
            for row in range(ROWS_AT_ONCE):
                at = builder.add(offset, builder.mul(width, i64(row)))
                prefetch(builder, builder.gep(rows, [builder.add(at, i64(PREFETCH))]))
                unsigned = builder.xor(load(rows, at), flip)
                grown += [builder.call(dot, [sums[len(grown) + part], unsigned, parts[part]]) for part in range(2)]
            following = builder.add(offset, i64(LANES))
            starts = i64(0), *extras * ROWS_AT_ONCE
            for phi, value, start in zip((offset, *sums), (following, *grown), starts, strict=True):
                phi.add_incoming(value, loop)
                phi.add_incoming(start, before)
            builder.cbranch(builder.icmp_signed("<", following, width), loop, done)
            builder.position_at_end(done)
            return grown

        by_lanes = []
        for row in range(0, ROWS, ROWS_AT_ONCE):
            sums = [
                builder.sitofp(value, FLOATS)
                for value in integers(builder.gep(rows, [builder.mul(width, i64(row))]))
            ]
            for of_high, of_low in zip(sums[::2], sums[1::2], strict=True):
                products = builder.fmul(of_high, steps[0], flags=FREE), builder.fmul(of_low, steps[1], flags=FREE)
                by_lanes.append(builder.fadd(*products, flags=FREE))
        place = builder.bitcast(builder.gep(data(8), [args[9]]), FLOATS.as_pointer())
        builder.store(summed(builder, by_lanes), place).align = 4
        return context.get_dummy_value()

    vectors = extra_high, extra_low, types.float32, types.float32, scores, types.int64
    return types.none(pointer, types.int64, pointer, pointer, *vectors), generate

"""Dot products of int8 rows by AVX512-VNNI, which numba does not reach by itself."""

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64  # int8 numbers that one instruction multiplies
ROWS_AT_ONCE = 4
PREFETCH = 9216  # bytes ahead; the processor's own prefetcher stops at every page
HAS_VNNI = all(binding.get_host_cpu_features().get(name, False) for name in ("avx512f", "avx512vnni"))


@intrinsic
def pointer_at(typingctx: Any, array: Any, offset: Any) -> Any:
    """The address of a byte of a contiguous int8 array."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.gep(builder.bitcast(data, cgutils.voidptr_t), [args[1]])

    return types.CPointer(types.int8)(array, types.int64), generate


@intrinsic
def dot_four_rows(typingctx: Any, rows: Any, width: Any, high: Any, low: Any) -> Any:
    """Dot products of four consecutive int8 rows with two int8 vectors, by AVX512-VNNI; `width` a multiple of 64.

    The instruction wants one factor unsigned: flipping the sign bit adds 128 to every number of the rows, so every
    product comes out larger by 128 times the sum of its vector.
    """
    answer = types.UniTuple(types.int32, 2 * ROWS_AT_ONCE)
    pointer = types.CPointer(types.int8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, width, high, low = args
        i32, i64 = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(i32, 16)
        module = builder.module
        dot = module.declare_intrinsic("llvm.x86.avx512.vpdpbusd.512", (), ir.FunctionType(vector, [vector] * 3))
        total = module.declare_intrinsic("llvm.vector.reduce.add.v16i32", (), ir.FunctionType(i32, [vector]))
        fetch = module.declare_intrinsic(
            "llvm.prefetch.p0", (), ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32])
        )

        def load(base: Any, offset: Any) -> Any:
            value = builder.load(builder.bitcast(builder.gep(base, [offset]), vector.as_pointer()))
            value.align = 1
            return value

        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        offset = builder.phi(i64)
        offset.add_incoming(i64(0), before)
        sums = [builder.phi(vector) for _ in range(2 * ROWS_AT_ONCE)]
        parts, flip, grown = (load(high, offset), load(low, offset)), vector([-2139062144] * 16), []
        for row in range(ROWS_AT_ONCE):
            at = builder.add(offset, builder.mul(width, i64(row)))
            ahead = builder.gep(rows, [builder.add(at, i64(PREFETCH))])
            builder.call(fetch, [ahead, i32(0), i32(2), i32(1)])
            unsigned = builder.xor(load(rows, at), flip)
            grown += [builder.call(dot, [sums[len(grown) + part], unsigned, parts[part]]) for part in range(2)]
        following = builder.add(offset, i64(LANES))
        for phi, value, start in [
            (offset, following, None),
            *((s, g, vector([0] * 16)) for s, g in zip(sums, grown, strict=True)),
        ]:
            phi.add_incoming(value, loop)
            if start is not None:
                phi.add_incoming(start, before)
        builder.cbranch(builder.icmp_signed("<", following, width), loop, done)
        builder.position_at_end(done)
        return context.make_tuple(builder, answer, [builder.call(total, [value]) for value in grown])

    return answer(pointer, types.int64, pointer, pointer), generate

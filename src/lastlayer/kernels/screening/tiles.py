"""Products of int8 matrices by AMX, which numba does not reach by itself."""

import ctypes
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

SIDE = 16  # rows of a tile, and its columns of four bytes
DEPTH = 64  # bytes in a row of a tile
PAIR = 2 * SIDE  # rows, and columns, that one step multiplies: two tiles by two
_TILES = 8
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18  # Linux on x86-64


def _allowed() -> bool:
    """Whether the processor has the instructions, and the system lets this process keep tiles."""
    features = binding.get_host_cpu_features()
    if not all(features.get(name, False) for name in ("amx-tile", "amx-int8", "avx512f")):
        return False
    try:
        return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) == 0
    except (OSError, AttributeError, TypeError):
        return False


HAS_AMX = _allowed()


def _tile_shapes() -> np.ndarray:
    """What `begin_tiles` is given: eight tiles, all of 16 rows of 64 bytes."""
    shapes = np.zeros(64, dtype=np.uint8)
    shapes[0] = 1  # the palette
    shapes[16 : 16 + 2 * _TILES : 2] = DEPTH
    shapes[48 : 48 + _TILES] = SIDE
    return shapes


SHAPES = _tile_shapes()


@intrinsic
def _configure(typingctx: Any, shapes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        configure = builder.module.declare_intrinsic("llvm.x86.ldtilecfg", (), kind)
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.call(configure, [builder.bitcast(data, cgutils.voidptr_t)])
        return context.get_dummy_value()

    return types.none(shapes), generate


@njit(cache=True)
def begin_tiles() -> None:
    """Before a thread's first `multiply_pairs`."""
    _configure(SHAPES)  # pyright: ignore[reportCallIssue]


@intrinsic
def end_tiles(typingctx: Any) -> Any:
    """After a thread's last `multiply_pairs`: tiles that are in use make every switch of threads slower."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(builder.module.declare_intrinsic("llvm.x86.tilerelease", (), kind), [])
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def multiply_pairs(typingctx: Any, rows: Any, first: Any, width: Any, right: Any, at: Any, products: Any) -> Any:
    """`products (32, 32) = rows[first : first + 32] @ columns.T`, int8 into int32; `width` a multiple of 64.

    The columns lie in `right[at]`, `(width / 64, 2, 16, 64)`: for each 64 of the width two tiles, each with four
    numbers of its 16 columns beside each other.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rows, first, width, right, at, products = args
        i8, i64, void, pointer = ir.IntType(8), ir.IntType(64), ir.VoidType(), cgutils.voidptr_t
        module = builder.module

        def instruction(name: str, *kinds: Any) -> Any:
            return module.declare_intrinsic(f"llvm.x86.{name}", (), ir.FunctionType(void, kinds))

        fetch, put = instruction("tileloadd64", i8, pointer, i64), instruction("tilestored64", i8, pointer, i64)
        clear, dot = instruction("tilezero", i8), instruction("tdpbssd", i8, i8, i8)

        def address(index: int, array: Any, offset: Any) -> Any:
            data = context.make_array(signature.args[index])(context, builder, array).data
            return builder.gep(builder.bitcast(data, pointer), [offset])

        left = address(0, rows, builder.mul(first, width))
        columns = address(3, right, builder.mul(at, builder.mul(width, i64(PAIR))))
        target = address(5, products, i64(0))
        sums = [(2 * row + column, row, column) for row in range(2) for column in range(2)]
        for number, _, _ in sums:
            builder.call(clear, [i8(number)])
        with cgutils.for_range(builder, builder.udiv(width, i64(DEPTH))) as step:
            of_rows = builder.gep(left, [builder.mul(step.index, i64(DEPTH))])
            of_columns = builder.gep(columns, [builder.mul(step.index, i64(2 * SIDE * DEPTH))])
            for half in range(2):
                lower = builder.gep(of_rows, [builder.mul(width, i64(half * SIDE))])
                builder.call(fetch, [i8(4 + half), lower, width])
                builder.call(
                    fetch, [i8(6 + half), builder.gep(of_columns, [i64(half * SIDE * DEPTH)]), i64(DEPTH)]
                )
            for number, row, column in sums:
                builder.call(dot, [i8(number), i8(4 + row), i8(6 + column)])
        for number, row, column in sums:
            place = builder.gep(target, [i64(4 * SIDE * (PAIR * row + column))])
            builder.call(put, [i8(number), place, i64(4 * PAIR)])
        return context.get_dummy_value()

    return types.none(rows, types.int64, types.int64, right, types.int64, products), generate

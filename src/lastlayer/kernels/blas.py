"""Matrix products inside compiled loops, by the BLAS that PyTorch is linked with.

Imports numba: import this module only where a kernel first runs.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import ctypes
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lastlayer.kernels.fast_math import compiled
from lastlayer.kernels.threads import gemm

NAMES = {types.float32: "sgemm_", types.float64: "dgemm_"}
for _name, _function in zip(NAMES.values(), gemm() or (), strict=gemm() is not None):  # found by name
    binding.add_symbol(f"lastlayer_{_name}", ctypes.cast(_function, ctypes.c_void_p).value)


@intrinsic
def _gemm(
    typingctx: Any, across_a: Any, across_b: Any, m: Any, n: Any, k: Any,
    alpha: Any, a: Any, lda: Any, b: Any, ldb: Any, beta: Any, c: Any, ldc: Any,
) -> Any:  # fmt: skip
    """BLAS's gemm, by columns: `c = alpha op(a) op(b) + beta c`."""
    kind = c.dtype
    number, i8, i32, i64 = types.float64, ir.IntType(8), ir.IntType(32), types.int64
    signature = types.none(types.boolean, types.boolean, i64, i64, i64, number, a, i64, b, i64, number, c, i64)

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        real = context.get_value_type(kind)

        def held(value: Any) -> Any:
            """The address of a copy, which is how Fortran takes its arguments."""
            place = cgutils.alloca_once(builder, value.type)
            builder.store(value, place)
            return builder.bitcast(place, cgutils.voidptr_t)

        def given(value: Any, kind_of: Any) -> Any:
            if isinstance(kind_of, types.Array):
                return builder.bitcast(
                    context.make_array(kind_of)(context, builder, value).data, cgutils.voidptr_t
                )
            if kind_of == types.boolean:
                return held(builder.select(builder.trunc(value, ir.IntType(1)), i8(ord("T")), i8(ord("N"))))
            if kind_of == number:
                return held(value if kind == number else builder.fptrunc(value, real))
            return held(builder.trunc(value, i32))

        pointers = [given(value, kind_of) for value, kind_of in zip(args, signature.args, strict=True)]
        function = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t] * len(pointers))
        builder.call(
            cgutils.get_or_insert_function(builder.module, function, f"lastlayer_{NAMES[kind]}"), pointers
        )
        return context.get_dummy_value()

    return signature, generate


@compiled
def _leading(matrix):
    """From one row to the next; of a single row numpy may say anything."""
    return max(matrix.strides[0] // matrix.itemsize, matrix.shape[1])


@compiled
def multiply(left, across_left, right, across_right, into, alpha, beta):
    """`into = alpha op(left) op(right) + beta into`, where `across` means the transpose; rows contiguous."""
    rows, columns = into.shape
    inner = left.shape[0] if across_left else left.shape[1]
    _gemm(
        across_right, across_left, columns, rows, inner, alpha,
        right, _leading(right), left, _leading(left), beta, into, _leading(into),
    )  # fmt: skip

"""Parts of a compiled kernel on PyTorch's own threads; `kernels/threads.py` says why."""

import ctypes
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lastlayer.kernels.threads import OpenMP, openmp

SHARED = openmp() is not None
for _name, _function in zip(OpenMP._fields, openmp() or (), strict=SHARED):  # compiled code finds them by name
    binding.add_symbol(f"lastlayer_{_name}", ctypes.cast(_function, ctypes.c_void_p).value)


def lent(context: Any, builder: Any, value: Any, kind: Any) -> Any:
    """An array whose references nobody counts, as threads would wait for each other; or a tuple of such."""
    if isinstance(kind, types.BaseTuple):
        for n, own in enumerate(kind):  # pyright: ignore[reportArgumentType]
            value = builder.insert_value(value, lent(context, builder, builder.extract_value(value, n), own), n)
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


@intrinsic
def apart(typingctx: Any, function: Any, workers: Any, given: Any) -> Any:
    """Calls `function(worker, *given)` for every worker below `workers`, on as many threads, and waits for all.

    One after another, where PyTorch's OpenMP was not found.
    """
    signature = function.get_call_type(typingctx, (types.int64, *given.types), {})

    def generate(context: Any, builder: Any, _: Any, args: Any) -> Any:
        _, workers, given = args
        i32, i64, module = ir.IntType(32), ir.IntType(64), builder.module
        compiled = function.dispatcher.overloads[tuple(signature.args)]
        context.active_code_library.add_linking_library(compiled.library)
        callee = context.declare_function(module, compiled.fndesc)

        def call_each(builder: Any, given: Any, first: Any, workers: Any, step: Any) -> None:
            result, kinds = signature.return_type, signature.args
            items = [
                lent(context, builder, builder.extract_value(given, n), kind) for n, kind in enumerate(kinds[1:])
            ]
            with cgutils.for_range_slice(builder, first, workers, step, i64) as (worker, _):
                context.call_conv.call_function(builder, callee, result, kinds, [worker, *items])

        def asked(builder: Any, name: str) -> Any:
            kind = ir.FunctionType(i32, [])
            return builder.sext(builder.call(cgutils.get_or_insert_function(module, kind, name), []), i64)

        if not SHARED:
            call_each(builder, given, i64(0), workers, i64(1))
            return context.get_dummy_value()
        record = ir.LiteralStructType([i64, given.type])
        held = cgutils.alloca_once(builder, record)
        builder.store(workers, cgutils.gep_inbounds(builder, held, 0, 0))
        builder.store(given, cgutils.gep_inbounds(builder, held, 0, 1))

        outlined = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        body = ir.Function(module, outlined, module.get_unique_name("apart"))
        body.linkage = "internal"
        inner = ir.IRBuilder(body.append_basic_block("entry"))
        whole = inner.load(inner.bitcast(body.args[0], record.as_pointer()))
        number, count = (asked(inner, f"lastlayer_{name}") for name in OpenMP._fields[1:])
        call_each(inner, inner.extract_value(whole, 1), number, inner.extract_value(whole, 0), count)
        inner.ret_void()

        launch = ir.FunctionType(ir.VoidType(), [outlined.as_pointer(), cgutils.voidptr_t, i32, i32])
        parallel = cgutils.get_or_insert_function(module, launch, "lastlayer_GOMP_parallel")
        pointer = builder.bitcast(held, cgutils.voidptr_t)
        builder.call(parallel, [body, pointer, builder.trunc(workers, i32), i32(0)])
        return context.get_dummy_value()

    return types.none(function, types.int64, given), generate

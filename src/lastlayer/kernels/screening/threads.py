"""Kernels on PyTorch's own threads.

numba has threads of its own, which after any operation of PyTorch share the cores with PyTorch's: those go on
spinning for a while, so that they are there for the next operation. A kernel on PyTorch's finds them awake.
"""

import ctypes
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _shared() -> bool:
    """Makes the OpenMP that PyTorch is linked with known to compiled code; whether it was found."""
    with suppress(OSError, AttributeError, ValueError):
        (library,) = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.so")
        handle = ctypes.CDLL(str(library))  # looks in what it is linked with as well
        for name, function in [(name, getattr(handle, name)) for name in NAMES]:
            binding.add_symbol(f"lastlayer_{name}", ctypes.cast(function, ctypes.c_void_p).value)
        return True
    return False


SHARED = _shared()


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
            items = [builder.extract_value(given, n) for n in range(len(given.type))]
            with cgutils.for_range_slice(builder, first, workers, step, i64) as (worker, _):
                result, kinds = signature.return_type, signature.args
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
        number, count = (asked(inner, f"lastlayer_{name}") for name in NAMES[1:])  # fewer than workers, it may be
        call_each(inner, inner.extract_value(whole, 1), number, inner.extract_value(whole, 0), count)
        inner.ret_void()

        launch = ir.FunctionType(ir.VoidType(), [outlined.as_pointer(), cgutils.voidptr_t, i32, i32])
        parallel = cgutils.get_or_insert_function(module, launch, f"lastlayer_{NAMES[0]}")
        pointer = builder.bitcast(held, cgutils.voidptr_t)
        builder.call(parallel, [body, pointer, builder.trunc(workers, i32), i32(0)])
        return context.get_dummy_value()

    return types.none(function, types.int64, given), generate

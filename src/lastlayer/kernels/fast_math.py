"""Scalar functions that LLVM turns into vector instructions inside a numba loop.

Imports numba: import this module only where a kernel first runs.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

import lastlayer.kernels.first_use  # noqa: F401  it listens from here on, as every kernel imports this module

# Sums may be reordered and products fused; nan and infinity keep their meaning.
FLAGS = {"reassoc", "contract", "arcp", "nsz"}

_F32, _I32 = ir.FloatType(), ir.IntType(32)


def compiled(function, flags=frozenset(FLAGS)):
    """`numba.njit` without the interpreter lock, kept on disk where there is a place for it."""
    options = {"nogil": True, "fastmath": set(flags), "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written
        return numba.njit(**options)(function)


def _difference(left, right):
    return left - right


# Taken before whatever is done with it: never reordered.
difference = compiled(_difference, flags=())


@intrinsic
def _float_of_bits(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), generate


@intrinsic
def _float_of_half(context, bits):
    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), _F32)

    return types.float32(types.uint16), generate


@intrinsic
def _bits_of_float(context, value):
    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), generate


@intrinsic
def larger(context, left, right):
    """The larger of two float32; unlike `max` a loop over it is vectorised."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_F32, [_F32, _F32])
        function = builder.module.declare_intrinsic("llvm.maxnum", [_F32], kind)
        return builder.call(function, arguments, fastmath=["nnan", "nsz"])

    return types.float32(types.float32, types.float32), generate


@intrinsic
def _two_to_the(context, whole):
    """`2 ** whole` for a whole float32 from -127 (which gives 0) to 127."""

    def generate(context, builder, signature, arguments):
        exponent = builder.add(builder.fptosi(arguments[0], _I32), ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.float32), generate


LOG2_E = np.float32(1.4426950408889634)
EXP2 = (  # Cephes' exp2f: of 2 ** r, the highest power first
    np.float32(1.535336188319500e-4),
    np.float32(1.339887440266574e-3),
    np.float32(9.618437357674640e-3),
    np.float32(5.550332471162809e-2),
    np.float32(2.402264791363012e-1),
    np.float32(6.931472028550421e-1),
    np.float32(1.0),
)


@compiled
def exp(x):
    """`e ** x` of a float32 up to 88, to 2e-7 of its value; 0 below -88; nan for nan.

    `2 ** t = 2 ** n * 2 ** r` with n whole and r in [-1/2, 1/2].
    """
    t = x * LOG2_E
    t = np.float32(-127.0) if t < np.float32(-127.0) else t
    n = np.floor(t + np.float32(0.5))
    r = t - n
    p = EXP2[0]
    p = p * r + EXP2[1]
    p = p * r + EXP2[2]
    p = p * r + EXP2[3]
    p = p * r + EXP2[4]
    p = p * r + EXP2[5]
    p = p * r + EXP2[6]
    return p * _two_to_the(n)


def load(stored):
    """The float32 that `stored` is: itself, the bits of a bfloat16 as int16, or of a float16 as uint16."""
    raise NotImplementedError("inside a kernel only")


def store(value, like):
    """`value` as an element of an array whose elements are as `like`: float32, or a bfloat16's bits as int16."""
    raise NotImplementedError("inside a kernel only")


@overload(load)
def _load(stored):
    if stored == types.uint16:
        return lambda stored: _float_of_half(stored)
    if isinstance(stored, types.Integer):
        return lambda stored: _float_of_bits(np.int32(stored) << np.int32(16))
    return lambda stored: stored


@overload(store)
def _store(value, like):
    if not isinstance(like, types.Integer):
        return lambda value, like: np.float32(value)

    def rounded(value, like):  # to the nearest, ties to even
        bits = _bits_of_float(np.float32(value))
        return np.int16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))

    return rounded

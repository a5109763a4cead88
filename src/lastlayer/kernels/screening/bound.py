"""A kernel bound to the arguments that stay the same: called by address, in half a microsecond.

Handing thirty arrays to a compiled function takes Python and numba 50 microseconds and more, as the rows that the
last query read have displaced both from the caches. Here the arrays are put into memory once, as compiled code
holds them; a call passes their address, and those of what is new.
"""

# pyright: reportCallIssue=false
# (an intrinsic is called without its first parameter)

import ctypes
from collections.abc import Callable
from struct import Struct
from typing import Any

import numpy as np
from numba import cfunc, njit, typeof, types
from numba.extending import intrinsic

from lastlayer.kernels.apart import lent


@intrinsic
def _store(typingctx: Any, place: Any, given: Any) -> Any:
    """Puts a tuple into memory; the arrays' owner has to keep them alive."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place, given = args
        held = lent(context, builder, given, signature.args[1])
        builder.store(held, builder.inttoptr(place, held.type.as_pointer()))
        return context.get_dummy_value()

    return types.none(types.int64, given), generate


@njit(cache=True)
def _keep(place: int, given: Any) -> None:
    _store(place, given)


def _numbers(given: Any) -> int:
    """How many 8-byte numbers compiled code holds at most for an argument."""
    if isinstance(given, tuple):
        return sum(map(_numbers, given))
    return 5 + 2 * given.ndim if isinstance(given, np.ndarray) else 1


class Bound:
    """`body(place, asked)` as a compiled function of what is asked, which is `asked[0]`; `place[0]` is given.

    Args:
        body: a function of a module: it is compiled once for what is given, and kept on disk.
        given: what stays the same, a tuple of arrays, numbers and tuples. It is kept.
        asked: a letter for each further argument, A for an address, n for a number.

    A call holds the interpreter's lock.
    """

    def __init__(self, body: Callable[[Any, Any], int], given: tuple[Any, ...], asked: str) -> None:
        self._given, self._held = given, np.empty(_numbers(given), dtype=np.int64)
        _keep(self._held.ctypes.data, given)
        new = types.Tuple([types.voidptr if letter == "A" else types.int64 for letter in asked])
        signature = types.int64(types.CPointer(typeof(given)), types.CPointer(new))
        self._compiled = cfunc(signature, cache=True)(body)
        native = ctypes.PYFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p)
        self._call = native(self._compiled.address)  # pyright: ignore[reportArgumentType]
        self._place = ctypes.c_void_p(self._held.ctypes.data)
        self._pack = Struct(asked.replace("A", "q").replace("n", "q")).pack

    def __call__(self, *asked: int) -> int:
        return self._call(self._place, self._pack(*asked))

"""Compiled functions that are called by address, with numbers and the addresses of arrays: in a microsecond.

numba's own way of handing over a dozen arrays takes 40 microseconds and more in the midst of a training step,
whose products have displaced what Python needs from the caches.
"""

import ctypes
from collections.abc import Callable
from struct import Struct
from typing import Any

from numba import cfunc, types


class ByAddress:
    """`body(asked)` as a compiled function of what is asked, the tuple `asked[0]`; it has to return an int.

    Args:
        body: a function of a module, kept on disk where there is a place for it. It must not raise.
        kinds: a letter for each argument: n a whole number, x a float; addresses of `real` a, of float64 d, of
            int64 i, to be made arrays by numba's `carray`.
        real: the dtype's name.

    A call lets other threads of Python go on.
    """

    def __init__(self, body: Callable[[Any], int], kinds: str, real: str) -> None:
        known = {"n": types.int64, "x": types.float64, "a": types.CPointer(getattr(types, real))}
        known |= {"d": types.CPointer(types.float64), "i": types.CPointer(types.int64)}
        signature = types.int64(types.CPointer(types.Tuple([known[letter] for letter in kinds])))
        try:
            self._compiled = cfunc(signature, cache=True)(body)
        except RuntimeError:  # no folder that can be written
            self._compiled = cfunc(signature)(body)
        native: Any = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)
        self._call = native(self._compiled.address)
        self._pack = Struct("".join("d" if letter == "x" else "q" for letter in kinds)).pack

    def __call__(self, *asked: float) -> int:
        return self._call(self._pack(*asked))

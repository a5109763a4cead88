"""The compiled engine: which instruction set runs, and how its kernels are called.

`csrc/` is built once for every instruction set into one shared library each, `engines/engine_<isa>.so`. The best
that the processor has, and `LASTLAYER_MAX_CPU_ISA` allows, is loaded when a kernel is first wanted. Where none can
be loaded, `available()` is False and the plain PyTorch twins run.
"""

import ctypes
import importlib.util
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VARIABLE = "LASTLAYER_MAX_CPU_ISA"

# From the least to the most, and the bit of `cpu_features` that each needs; CMakeLists.txt has the same names.
ISAS = {
    "portable": None,
    "avx2": 0,
    "avx_vnni": 1,
    "avx512": 2,
    "avx512_vnni": 3,
    "amx": 4,
    "neon_dotprod": 5,
    "neon_i8mm": 6,
}
FOREIGN = ("avx", "amx") if platform.machine().lower() in ("aarch64", "arm64") else ("neon",)

_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "x": ctypes.c_double, "f": ctypes.c_float}


class Library(NamedTuple):
    """The kernels of one instruction set."""

    isa: str
    handle: ctypes.CDLL


_names: set[str] = set()  # of all kernels that were declared: what a library must have


@dataclass(frozen=True)
class Kernel:
    """A function of the engine: `Kernel("name", "ppnx")(first, second, 3, 0.5)`.

    Args:
        name: as in `LASTLAYER_KERNEL(name)`.
        arguments: a letter each: p the address of an array (a contiguous tensor, or None), n an int64, x a
            float64, f a float32.

    The call runs in the current library, without the interpreter's lock, and returns an int.
    """

    name: str
    arguments: str

    def __post_init__(self) -> None:
        _names.add(self.name)

    def __call__(self, *arguments: Any) -> int:
        library = current()
        if library is None:
            raise RuntimeError(f"the kernel {self.name} cannot run: {_state.why}")
        addresses = [self._address(part) if isinstance(part, Tensor) else part for part in arguments]
        return self.function_of(library)(*addresses)

    def function_of(self, library: Library) -> Any:
        """The C function, its arguments declared."""
        function = getattr(library.handle, f"lastlayer_{self.name}")  # which the handle keeps
        if function.argtypes is None:
            function.restype = ctypes.c_int64
            function.argtypes = [_TYPES[letter] for letter in self.arguments]
        return function

    def _address(self, array: Tensor) -> int:
        if not array.is_cpu:  # an address that is no memory of this process
            raise RuntimeError(f"the kernel {self.name} takes tensors on the CPU, got one on {array.device}")
        return array.data_ptr()


class _State:
    """What was chosen, and why; and whether this process was forked, so that PyTorch's threads are not there."""

    library: Library | None = None
    decided = False
    why = ""
    forked = False
    loaded: tuple[Library, ...] = ()


_state = _State()


def available() -> bool:
    """Whether compiled kernels run; if not, their plain twins do."""
    return current() is not None


def current() -> Library | None:
    """The library that runs; None where the plain twins do. The first call chooses and loads it.

    Raises:
        ValueError: `LASTLAYER_MAX_CPU_ISA` names no instruction set, or one that this processor lacks.
    """
    if not _state.decided:
        _state.library, _state.why = _choose(os.environ.get(VARIABLE) or None)
        _state.decided = True
        if _state.library is None:
            warnings.warn(
                f"lastlayer runs its plain PyTorch code, which is slower: {_state.why}",
                RuntimeWarning,
                stacklevel=3,
            )
    return _state.library


def supported() -> list[str]:
    """The instruction sets that this processor has and the engine was built for, from the least to the most."""
    probe = _load("portable")
    if not isinstance(probe, Library):
        return []
    bits = Kernel("cpu_features", "").function_of(probe)()
    there = [isa for isa, place in ISAS.items() if place is None or bits >> place & 1]
    return [isa for isa in there if _file(isa) is not None]


@contextmanager
def forced(isa: str | None) -> Iterator[None]:
    """Runs everything within by one instruction set, or by the plain twins (None): for tests and benchmarks.

    Raises:
        ValueError: an instruction set that is unknown, or that this processor or the engine lacks.
    """
    before = _state.library, _state.decided, _state.why
    library = None if isa is None else _choose(isa)[0]
    _state.library, _state.decided, _state.why = library, True, f"forced to {isa or 'the plain code'}"
    try:
        yield
    finally:
        _state.library, _state.decided, _state.why = before


def reason() -> str:
    """Why `current()` is what it is."""
    current()
    return _state.why


def _choose(limit: str | None) -> tuple[Library | None, str]:
    """The best library up to `limit`, and why it is that."""
    known = [isa for isa in ISAS if not isa.startswith(FOREIGN)]
    if limit is not None and limit not in known:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(known)}, got {limit!r}")
    there = supported()
    if limit is not None and there and limit not in there:
        raise ValueError(f"{VARIABLE} is {limit}, which this processor lacks; it has {', '.join(there)}")
    order = list(ISAS)
    within = [isa for isa in there if limit is None or order.index(isa) <= order.index(limit)]
    for isa in reversed(within):
        library = _load(isa)
        if isinstance(library, Library):
            return library, "the best of this processor" if limit is None else f"{VARIABLE}={limit}"
    return None, str(_load("portable"))


@cache
def _load(isa: str) -> Library | str:
    """The library of an instruction set, or why there is none."""
    path = _file(isa)
    if path is None:
        return "the extension was not built when lastlayer was installed (it needs a C++ compiler)"
    try:
        library = Library(isa, ctypes.CDLL(str(path)))
        _hand_threads(library, (0, 0) if _state.forked else _threads())
    except (OSError, AttributeError) as error:  # not a library of this system, or not one of ours
        return f"the extension could not be loaded: {error}"
    lacking = sorted(name for name in _names if not hasattr(library.handle, f"lastlayer_{name}"))
    if lacking:
        return f"the extension is of another version (it has no {', '.join(lacking)}): install lastlayer again"
    _state.loaded += (library,)
    return library


def _file(isa: str) -> Path | None:
    """Where the library of an instruction set lies: beside this file, or where an editable install put it."""
    spec = importlib.util.find_spec(__package__ or "")
    folders = [Path(__file__).parent, *(() if spec is None else spec.submodule_search_locations or ())]
    places = (Path(folder) / "engines" / f"engine_{isa}.so" for folder in folders)
    return next((place for place in places if place.is_file()), None)


@cache
def _threads() -> tuple[int, int]:
    """The addresses of PyTorch's own `parallel_for` and thread count, of its stable C interface; zeros without."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        try:
            torch_cpu = ctypes.CDLL(str(folder / name))
            found = torch_cpu.torch_parallel_for, torch_cpu.torch_get_num_threads
        except (OSError, AttributeError):
            continue
        parallel_for, number = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found)
        return parallel_for, number
    return 0, 0


def _hand_threads(library: Library, addresses: tuple[int, int]) -> None:
    Kernel("use_threads", "pp").function_of(library)(*addresses)


def _run_alone() -> None:
    """In a forked child, where PyTorch's pool of threads does not exist: a parallel region would never end."""
    _state.forked = True
    for library in _state.loaded:
        _hand_threads(library, (0, 0))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_run_alone)

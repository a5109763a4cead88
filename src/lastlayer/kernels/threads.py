"""Work on PyTorch's own threads.

After an operation PyTorch's threads go on spinning for a while, so that they are there for the next one. Threads
of another pool, Python's or numba's, would share the cores with them; work on PyTorch's own finds them awake.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Result = TypeVar("Result")
BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class OpenMP(NamedTuple):
    """Three functions of the OpenMP that PyTorch is linked with."""

    GOMP_parallel: Any  # (body, argument, threads, flags): calls body(argument) on every thread of a team
    omp_get_thread_num: Any
    omp_get_num_threads: Any  # of the team; fewer than were asked for, it may be


def _library() -> ctypes.CDLL:
    """PyTorch's, which also looks in what it is linked with."""
    (library,) = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
    return ctypes.CDLL(str(library))


@cache
def openmp() -> OpenMP | None:
    """PyTorch's OpenMP; None where it is not found, or is not spoken to in this way."""
    with suppress(OSError, AttributeError, ValueError):
        handle = _library()
        found = OpenMP(*(getattr(handle, name) for name in OpenMP._fields))
        found.GOMP_parallel.argtypes = [BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        found.GOMP_parallel.restype = None
        return found
    return None


def at_once(work: Callable[[int], Result], parts: int) -> list[Result]:
    """`[work(0), ..., work(parts - 1)]`, on as many threads; gains where `work` drops the interpreter's lock."""
    if parts == 1:
        return [work(0)]
    shared = openmp()
    if shared is None:
        with ThreadPoolExecutor(parts) as pool:
            return list(pool.map(work, range(parts)))
    results: dict[int, Result] = {}
    failures: list[BaseException] = []

    def run(_: Any) -> None:
        try:
            for part in range(shared.omp_get_thread_num(), parts, shared.omp_get_num_threads()):
                results[part] = work(part)
        except BaseException as failure:  # it cannot pass through OpenMP
            failures.append(failure)

    shared.GOMP_parallel(BODY(run), None, parts, 0)
    if failures:
        raise failures[0]
    return [results[part] for part in range(parts)]

"""Token ids from files of nothing else: `.npy` arrays, `.bin` as nanoGPT writes it."""

from pathlib import Path

import numpy as np

from lastlayer.study.errors import StudyError
from lastlayer.study.files import mapped_array

IDS_SUFFIXES = {".npy", ".bin"}
BIN_DTYPES = ("uint16", "uint32")
MAX_IDS = 50_000_000  # tokens read of a file at most: more than a comparison of hours trains on


def read_ids(path: Path, bin_dtype: str = BIN_DTYPES[0]) -> tuple[np.ndarray, int]:
    """`(ids (tokens,), how many the file holds)`: its first `MAX_IDS`, as int64.

    Args:
        path: a `.npy` of integers in any shape, rows one after the other; else raw numbers, without a header.
        bin_dtype: of raw numbers, in this machine's byte order.

    Raises:
        StudyError: it cannot be read, or holds something else.
    """
    try:
        array = _npy(path) if path.suffix.lower() == ".npy" else _raw(path, np.dtype(bin_dtype))
        ids = np.array(array[:MAX_IDS], dtype=np.int64)
    except (OSError, ValueError, EOFError) as problem:
        raise StudyError(f"cannot read the token ids of {path}: {problem}") from None
    if len(ids) and ids.min() < 0:
        raise StudyError(f"{path} holds the negative id {ids.min()}; token ids count from 0")
    return ids, len(array)


def _npy(path: Path) -> np.ndarray:
    array = mapped_array(path)
    if array.dtype.kind not in "iu":
        raise ValueError(f"it holds {array.dtype} {array.shape}, not integers")
    return array.reshape(-1)


def _raw(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    if size == 0:
        return np.empty(0, dtype)
    if size % dtype.itemsize:
        raise ValueError(f"its {size:,} bytes are no whole number of {dtype} ids")
    array = np.memmap(path, dtype, mode="r")
    if dtype.itemsize == 2 and len(array) >= 8 and not array[: 2 * (len(array[:MAX_IDS]) // 2)][1::2].any():
        raise ValueError("every second uint16 is zero, as in a file of uint32: give --ids-dtype uint32")
    return array

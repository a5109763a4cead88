"""Files that are whole or not there: written beside their place, then moved onto it."""

import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lastlayer.study.errors import StudyError
from lastlayer.study.processes import is_first

Record = dict[str, Any]  # what results.json holds of one layer, setting or case
Records = list[Record]
ABANDONED = 600.0  # seconds after which what a killed process left behind is removed


def make_folder(path: Path) -> Path:
    """`path` as a folder that can be written to, or a StudyError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as problem:
        raise StudyError(f"cannot write to the folder {path}: {problem.strerror}") from problem


def is_special(path: Path) -> bool:
    """Whether `path` is a device or a pipe, such as /dev/stdout: written to, never replaced."""
    return path.exists() and not (path.is_file() or path.is_dir())


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and moves what it wrote onto `path`; on failure `path` is as it was.

    The temporary file is in a new folder of a random name that only this user may enter, beside `path`: in a
    folder that others share, nobody can put a link in its place. Of several processes of one command the first
    writes.

    Raises:
        StudyError: the file cannot be written, or `path` is a symbolic link that another user made.
    """
    if not is_first():
        return
    if is_special(path):
        _or_study_error(path, lambda: write(path))
        return
    goal = _goal(path)
    prefix, suffix = f".{goal.name}.", ".partial"

    def whole() -> None:
        _remove_abandoned(goal.parent, prefix, suffix)
        with tempfile.TemporaryDirectory(suffix, prefix, goal.parent) as folder:
            temporary = Path(folder) / goal.name
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(goal)

    _or_study_error(path, whole)


def _or_study_error(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except Exception as problem:
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise StudyError(f"cannot write {path}: {reason}") from problem


def _goal(path: Path) -> Path:
    """What is replaced: the file itself, or what a link of this user's own (or the administrator's) points to."""
    if path.is_symlink() and hasattr(os, "getuid") and path.lstat().st_uid not in (os.getuid(), 0):
        raise StudyError(f"cannot write {path}: it is a symbolic link that another user made; remove it first")
    return path.resolve()


def _remove_abandoned(folder: Path, prefix: str, suffix: str) -> None:
    """Removes the temporary folders of processes that were killed while they wrote."""
    for left in folder.glob(f"{glob.escape(prefix)}*{suffix}"):
        with suppress(OSError):
            if left.is_dir() and not left.is_symlink() and time.time() - left.lstat().st_mtime > ABANDONED:
                shutil.rmtree(left, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def mapped_array(path: Path) -> np.ndarray:
    """The array in a `.npy`, mapped, not read.

    So a header that promises more numbers than the file holds is an error, not an allocation.

    Raises:
        OSError, ValueError, EOFError: it cannot be read, or holds something else.
    """
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays (.npz); save the one that is meant as .npy")
    return array

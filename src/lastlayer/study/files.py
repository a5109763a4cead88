"""Files that are whole or not there: written beside their place, then moved onto it."""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lastlayer.study.errors import StudyError


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
    """Calls `write(temporary)` and moves what it wrote onto `path`; on failure `path` is as it was."""
    special = is_special(path)
    goal = path if special else path.resolve()  # what a link points to is replaced, not the link
    temporary = goal if special else goal.with_name(f".{goal.name}.partial")
    try:
        write(temporary)
        if not special:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(goal)
    except BaseException as problem:
        with suppress(OSError):
            if not special:
                temporary.unlink(missing_ok=True)
        if not isinstance(problem, Exception):  # Ctrl-C
            raise
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
        raise StudyError(f"cannot write {path}: {reason}") from problem


def write_text(path: Path, text: str) -> None:
    """Writes `text` in UTF-8, whole or not at all."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")

"""Which files a text is: one or several, a folder, standard input; which to train on and which to hold out."""

import os
import random
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.text.ids import IDS_SUFFIXES
from lastlayer.study.text.lines import STANDARD_INPUT, is_binary

LIBRARY = "Python's standard library"  # the text that every machine has
MOST_NAMES = 3  # of several files, how many are named
ROLES = {  # the words of a file's name that say what it is for
    "train": {"train", "training"},
    "held out": {"valid", "validation", "val", "dev"},
    "test": {"test", "testing"},
}


@dataclass(frozen=True)
class TextFiles:
    """Which files to train on and which to hold out; none held out: a part of the training files will be."""

    name: str  # how a report calls this text
    training: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()
    skipped: tuple[Path, ...] = ()  # of a folder, what is neither text nor ids

    def notes(self) -> list[str]:
        """What was decided by the names and the contents of files."""
        notes = []
        if self.held_out:
            notes.append(f"to train on: {_names_of(self.training)}; held out: {_names_of(self.held_out)}")
        if self.skipped:
            notes.append(f"left out, not being text: {_names_of(self.skipped)}")
        return notes


def _names_of(paths: tuple[Path, ...]) -> str:
    """The first few, and how many more."""
    more = f" and {len(paths) - MOST_NAMES} more" if len(paths) > MOST_NAMES else ""
    return ", ".join(path.name for path in paths[:MOST_NAMES]) + more


def find_files(paths: list[Path]) -> TextFiles:
    """The text files that `paths` mean; `-` is standard input.

    Where some have `train` and others `valid`, `val` or `dev` as a word of their names (`wiki.train.tokens`,
    `val.bin`), those are the two parts, and a test file is never read. All files are trained on otherwise, in the
    order given, those of a folder sorted; hidden files and, in a folder, files that are not text are left out.

    Raises:
        UsageError: a path that is not there, no path at all, or a folder without a text file.
    """
    if not paths:
        raise UsageError("no text was given")
    found: list[Path] = []
    skipped: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside, others = _files_of(path)
            found += inside
            skipped += others
        elif path == STANDARD_INPUT or path.exists():
            found.append(path)
        else:
            raise UsageError(f"there is no text file {path}")
    if found.count(STANDARD_INPUT) > 1:
        raise UsageError("standard input (-) can be read once only")
    name = _name(paths, found)
    roles = [_role(path) for path in found]
    parts = {role: tuple(p for p, r in zip(found, roles, strict=True) if r == role) for role in ROLES}
    if parts["train"] and parts["held out"]:
        if all(path.is_file() for path in paths):
            name = _name([paths[0].resolve().parent], found)
        return TextFiles(name, parts["train"], parts["held out"], tuple(skipped))
    if parts["train"] and any(path.is_dir() for path in paths):
        found = [path for path, role in zip(found, roles, strict=True) if role != "test"]
    return TextFiles(name, tuple(found), (), tuple(skipped))


def _role(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", path.name.lower()))
    roles = [role for role, names in ROLES.items() if words & names]
    return roles[0] if len(roles) == 1 else None


def _name(paths: list[Path], found: list[Path]) -> str:
    first = paths[0]
    name = "standard input" if first == STANDARD_INPUT else first.resolve().name
    more = 0 if len(paths) == 1 else len(found) - 1
    return name if more == 0 else f"{name} and {more} more"


def _files_of(folder: Path) -> tuple[list[Path], list[Path]]:
    """The text files in a folder and its subfolders, and what is there besides; hidden ones are left out."""
    texts, others = [], []
    try:
        for path in sorted(folder.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if not hidden and path.is_file():
                is_text = path.suffix.lower() in IDS_SUFFIXES or not is_binary(path)
                (texts if is_text else others).append(path)
    except OSError as problem:
        raise StudyError(f"cannot read {folder}: {problem.strerror or problem}") from None
    if not texts:
        held = f"only {len(others)} that are not text" if others else "no file"
        raise UsageError(f"the folder {folder} holds no text: {held}")
    return texts, others


def library_lines() -> Iterator[str]:
    """The lines that are not blank of every module of Python's standard library, in a fixed shuffled order.

    About 7 million tokens of 120,000 kinds where the library's own tests are installed, else fewer.
    """
    root = sysconfig.get_paths()["stdlib"]
    paths = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in ("site-packages", "dist-packages")]
        paths += [Path(folder, name) for name in files if name.endswith(".py")]
    if not paths:
        raise StudyError(f"there is no Python source in {root}; give a text of your own with --text")
    paths.sort()
    random.Random(0).shuffle(paths)
    for path in paths:
        with suppress(UnicodeDecodeError, OSError):  # a few tests are in other encodings on purpose
            yield from (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())

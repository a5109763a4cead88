"""The text that every machine has: the source of Python's own standard library."""

import random
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lastlayer.study.errors import StudyError

NAME = "Python's standard library"


def library_lines() -> Iterator[str]:
    """The lines that are not blank of every module, tests included; the files in a fixed shuffled order.

    About 7 million tokens of 120,000 kinds where the library's own tests are installed, else fewer.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    if not paths:
        raise StudyError(f"there is no Python source in {root}; give a text of your own with --text")
    random.Random(0).shuffle(paths)
    for path in paths:
        with suppress(UnicodeDecodeError, OSError):  # a few tests are in other encodings on purpose
            yield from (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())

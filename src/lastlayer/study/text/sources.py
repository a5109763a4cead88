"""Text files: plain or compressed, one or several, or a folder that comes already split."""

import bz2
import gzip
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lastlayer.study.errors import StudyError, UsageError

OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
TRAINING, HELD_OUT, TEST = "train", "valid", "test"


@dataclass(frozen=True)
class TextFiles:
    """Which files to train on and which to hold out; none held out: a part of the training files will be."""

    training: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        """How a report calls this text."""
        first = self.training[0]
        if self.held_out:
            return first.resolve().parent.name
        return first.name if len(self.training) == 1 else f"{first.name} and {len(self.training) - 1} more"


def find_files(paths: list[Path]) -> TextFiles:
    """The text files that `paths` mean; test files are never read.

    A folder must hold one file each with `train` and `valid` in its name, as WikiText-2 does; so may several
    paths. Any other files are all trained on, in the order given.

    Raises:
        UsageError: a path that is not there, no path at all, or a folder that is not split so.
    """
    if not paths:
        raise UsageError("no text was given")
    for path in paths:
        if not path.exists():
            raise UsageError(f"there is no text file {path}")
    if len(paths) == 1 and paths[0].is_dir():
        return _split_folder(paths[0])
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; give one folder alone, or files")
    split = _split_by_name(paths)
    return split or TextFiles(tuple(paths))


def _split_folder(folder: Path) -> TextFiles:
    split = _split_by_name(sorted(path for path in folder.iterdir() if path.is_file()))
    if split is None:
        raise UsageError(
            f"the folder {folder} does not hold one training and one validation file "
            "(such as wiki.train.tokens and wiki.valid.tokens); give the text files themselves"
        )
    return split


def _split_by_name(paths: list[Path]) -> TextFiles | None:
    """One training and one validation file told by their names; None where there are not."""
    roles = {role: [p for p in paths if role in p.name.lower().split(".")] for role in (TRAINING, HELD_OUT)}
    if any(len(found) != 1 for found in roles.values()):
        return None
    return TextFiles(tuple(roles[TRAINING]), tuple(roles[HELD_OUT]))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, decompressed if its name ends in .xz, .gz or .bz2.

    Raises:
        StudyError: it cannot be read, is damaged, is not text, or is in another encoding.
    """
    opener = OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise StudyError(f"{path} is not a text file: line {number} holds a zero byte")
                yield line
    except UnicodeDecodeError as problem:
        wrong = problem.object[problem.start]
        raise StudyError(
            f"{path} is not UTF-8 text (it holds the byte 0x{wrong:02x}): a binary file, or another encoding; "
            "convert it first, for example with: iconv -f latin1 -t utf-8"
        ) from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as problem:
        raise StudyError(f"{path} is damaged or not what its name says: {problem}") from None
    except OSError as problem:
        raise StudyError(f"cannot read {path}: {problem.strerror or problem}") from None

"""The lines of text files: plain or compressed, JSON lines, standard input."""

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lastlayer.study.errors import StudyError
from lastlayer.study.text.kinds import HEAD, compression, is_json_lines, why_not_text
from lastlayer.study.text.sources import STANDARD_INPUT

OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
DEFAULT_FIELD = "text"


def read_lines(path: Path, field: str | None = None) -> Iterator[str]:
    """The lines of a UTF-8 text file, decompressed if its name ends in .xz, .gz or .bz2; `-` is standard input.

    Args:
        field: the file holds JSON lines, and the text is in this field of each; files called .jsonl or .ndjson do
            in any case, and their field is "text" unless another is named.

    Raises:
        StudyError: it cannot be read, is damaged, is not text, or is in another encoding; JSON lines without text.
    """
    for _, text in _texts(path, field):
        if not isinstance(text, str):
            raise StudyError(f"{path}: the field {field or DEFAULT_FIELD!r} holds {type(text).__name__}, not text")
        yield from [text] if "\n" not in text[:-1] else io.StringIO(text, newline=None)


def read_id_lines(path: Path, field: str | None = None) -> Iterator[list[int]]:
    """Sequences of token ids: one a line, between blanks or commas; or a list in a field of JSON lines."""
    for number, text in _texts(path, field):
        parts = text.replace(",", " ").split() if isinstance(text, str) else text
        try:
            ids = [int(part) for part in parts]
        except (TypeError, ValueError):
            raise StudyError(f"{path}, line {number}: {_short(parts)} is no sequence of token ids") from None
        if any(token < 0 for token in ids):
            raise StudyError(f"{path}, line {number}: token ids must not be negative, got {min(ids)}")
        yield ids


def read_item_lines(path: Path, field: str | None = None) -> Iterator[list[str]]:
    """Sequences of names: one a line, between blanks; or a list, or a string, in a field of JSON lines."""
    for number, text in _texts(path, field):
        if isinstance(text, str):
            yield text.split()
        elif isinstance(text, list) and all(isinstance(name, str | int) for name in text):
            yield [str(name) for name in text]
        else:
            raise StudyError(f"{path}, line {number}: {_short(text)} is no sequence of ids or names")


def _texts(path: Path, field: str | None) -> Iterator[tuple[int, Any]]:
    """Each line with its number, or what the field of each JSON line holds."""
    lines = enumerate(_decoded(path), 1)
    if field is None and not is_json_lines(path):
        yield from lines
        return
    name = field or DEFAULT_FIELD
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise StudyError(f"{path}, line {number}: no JSON object ({problem})") from None
        if not isinstance(record, dict) or name not in record:
            has = ", ".join(map(repr, record)) if isinstance(record, dict) else "no object"
            raise StudyError(f"{path}, line {number}: no field {name!r}, but {has or 'none'}; name one by --field")
        yield number, record[name]


def _decoded(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            head = file.peek(HEAD)[:HEAD]
            said = why_not_text(head)
            if said is not None:
                raise StudyError(f"{path} is {said}")
            text = io.TextIOWrapper(file, encoding="utf-8-sig")
            for number, line in enumerate(text, 1):
                if "\0" in line:
                    raise StudyError(f"{path} is a binary file: line {number} holds a zero byte")
                yield line
    except UnicodeDecodeError as problem:
        wrong = problem.object[problem.start]
        raise StudyError(
            f"{path} is not UTF-8 text: it holds the byte 0x{wrong:02x}, as text in Latin-1 or Windows-1252 does; "
            "convert it first, for example with: iconv -f latin1 -t utf-8"
        ) from None
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as problem:
        raise StudyError(f"{path} is damaged or not what its name says: {problem}") from None
    except OSError as problem:
        raise StudyError(f"cannot read {path}: {problem.strerror or problem}") from None


def _open(path: Path) -> io.BufferedReader:
    if path == STANDARD_INPUT:
        return io.BufferedReader(_without_closing(sys.stdin.buffer))
    suffix = compression(path)
    if suffix is None:
        return path.open("rb")
    return io.BufferedReader(OPENERS[suffix](path, "rb"))  # pyright: ignore[reportArgumentType]


def _short(value: Any) -> str:
    shown = repr(" ".join(map(str, value)) if isinstance(value, list) else value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


class _without_closing(io.RawIOBase):
    """A stream that stays open when its reader is closed: standard input is not ours."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

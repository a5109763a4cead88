"""The lines of text files: plain or compressed, JSON lines, standard input; what is no UTF-8 text is named."""

import bz2
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lastlayer.study.errors import StudyError

STANDARD_INPUT = Path("-")
OPENERS = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}  # by the end of a file's name
JSON_LINES_SUFFIXES = {".jsonl", ".ndjson"}
DEFAULT_FIELD = "text"
HEAD = 4096  # bytes that tell what a file is
HEAD_LINES = 100
SIGNATURES = {
    b"\x1f\x8b": "compressed by gzip; its name must end in .gz",
    b"\xfd7zXZ\0": "compressed by xz; its name must end in .xz",
    b"BZh": "compressed by bzip2; its name must end in .bz2",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; decompress it first: zstd -d",
    b"PK\x03\x04": "a ZIP archive; unpack it and give the text files or their folder",
    b"PAR1": "a Parquet file; write its text column as JSON lines (.jsonl), which are read with --field",
    b"ARROW1": "an Arrow file; write its text column as JSON lines (.jsonl), which are read with --field",
    b"%PDF": "a PDF; extract its text first, for example with: pdftotext",
    b"\x93NUMPY": "a NumPy array; token ids are read from files whose names end in .npy",
}
MARKS = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


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
        if min(ids, default=0) < 0:
            raise StudyError(f"{path}, line {number}: token ids must not be negative, got {min(ids)}")
        yield ids


def read_item_lines(path: Path, field: str | None = None) -> Iterator[list[str]]:
    """Sequences of names: one a line, between blanks; or a list, or a string, in a field of JSON lines."""
    for number, text in _texts(path, field):
        names = text.split() if isinstance(text, str) else text
        if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise StudyError(f"{path}, line {number}: {_short(text)} is no sequence of ids or names")
        yield [str(name) for name in names]


def is_binary(path: Path) -> bool:
    """Whether a file is neither text in some encoding nor compressed as its name says."""
    if path.suffix.lower() in OPENERS:
        return False
    with path.open("rb") as file:
        said = _why_not_text(file.read(HEAD))
    return said is not None and "iconv" not in said


def _texts(path: Path, field: str | None) -> Iterator[tuple[int, Any]]:
    """Each line with its number, or what the field of each JSON line holds."""
    lines = enumerate(_decoded(path), 1)
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in OPENERS]
    if field is None and not (suffixes and suffixes[-1] in JSON_LINES_SUFFIXES):
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
    standard_input = path == STANDARD_INPUT
    open_file = OPENERS.get(path.suffix.lower(), open)
    try:
        with nullcontext(sys.stdin.buffer) if standard_input else open_file(path, "rb") as file:
            first = list(islice(file, HEAD_LINES))
            said = _why_not_text(b"".join(first)[:HEAD])
            if said is not None:
                raise StudyError(f"{path} is {said}")
            for number, line in enumerate(chain(first, file), 1):
                if b"\0" in line:
                    raise StudyError(f"{path} is a binary file: line {number} holds a zero byte")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
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


def _why_not_text(head: bytes) -> str | None:
    """What a file that begins with `head` is instead of UTF-8 text, and what to do; None where it may be text."""
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), None)
    said = next((said for signature, said in SIGNATURES.items() if head.startswith(signature)), None)
    if said is None and encoding is None and b"\0" in head:
        said = "a binary file: it holds zero bytes"
        odd, even = head[1::2], head[::2]
        for name, high, low in (("utf-16le", odd, even), ("utf-16be", even, odd)):
            if high.count(0) > 0.8 * len(high) and low.count(0) < 0.05 * len(low):  # letters, each in two bytes
                encoding = name
    if encoding is None:
        return said
    return f"{encoding.upper()} text, not UTF-8; convert it first, for example with: iconv -f {encoding} -t utf-8"


def _short(value: Any) -> str:
    shown = repr(" ".join(map(str, value)) if isinstance(value, list) else value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."

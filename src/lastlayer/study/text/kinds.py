"""What kind of file it is, by its first bytes: so that an error names the kind of what is no UTF-8 text."""

from pathlib import Path

HEAD = 4096  # bytes looked at
OPENED_BY_NAME = {".xz", ".gz", ".bz2"}  # decompressed while they are read
IDS_SUFFIXES = {".npy", ".bin"}
JSON_LINES_SUFFIXES = {".jsonl", ".ndjson"}

_SIGNATURES = (
    (b"\x1f\x8b", "compressed by gzip; its name must end in .gz"),
    (b"\xfd7zXZ\0", "compressed by xz; its name must end in .xz"),
    (b"BZh", "compressed by bzip2; its name must end in .bz2"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard; decompress it first: zstd -d"),
    (b"PK\x03\x04", "a ZIP archive; unpack it and give the text files or their folder"),
    (b"PAR1", "a Parquet file; write its text column as JSON lines (.jsonl), which are read with --field"),
    (b"ARROW1", "an Arrow file; write its text column as JSON lines (.jsonl), which are read with --field"),
    (b"%PDF", "a PDF; extract its text first, for example with: pdftotext"),
    (b"\x93NUMPY", "a NumPy array; token ids are read from files whose names end in .npy"),
    (b"\x7fELF", "a binary file (a program)"),
    (b"\x89PNG", "a binary file (a PNG picture)"),
    (b"\xff\xd8\xff", "a binary file (a JPEG picture)"),
    (b"SQLite format 3\0", "a binary file (an SQLite database)"),
)


def compression(path: Path) -> str | None:
    """The suffix by which a file is decompressed; None where it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in OPENED_BY_NAME else None


def is_json_lines(path: Path) -> bool:
    """Whether the name says JSON lines, compressed or not."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in OPENED_BY_NAME:
        suffixes.pop()
    return bool(suffixes) and suffixes[-1] in JSON_LINES_SUFFIXES


def why_not_text(head: bytes) -> str | None:
    """What a file that begins with `head` is instead of UTF-8 text, and what to do; None where it may be text."""
    for order, mark in (("utf-32", b"\xff\xfe\0\0"), ("utf-32", b"\0\0\xfe\xff")):
        if head.startswith(mark):
            return _encoded(order)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _encoded("utf-16")
    for signature, said in _SIGNATURES:
        if head.startswith(signature):
            return said
    if b"\0" not in head:
        return None
    whole = head[: len(head) // 2 * 2]
    for order, high, low in (("utf-16le", whole[1::2], whole[::2]), ("utf-16be", whole[::2], whole[1::2])):
        if high.count(0) > 0.8 * len(high) and low.count(0) < 0.05 * len(low):  # letters, each in two bytes
            return _encoded(order)
    return "a binary file: it holds zero bytes"


def is_binary(path: Path) -> bool:
    """Whether a file is neither text in some encoding nor compressed as its name says."""
    if compression(path):
        return False
    with path.open("rb") as file:
        said = why_not_text(file.read(HEAD))
    return said is not None and "iconv" not in said


def _encoded(encoding: str) -> str:
    return f"{encoding.upper()} text, not UTF-8; convert it first, for example with: iconv -f {encoding} -t utf-8"

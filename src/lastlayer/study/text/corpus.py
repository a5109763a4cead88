"""From text, or token ids, to class ids: a vocabulary of the training text, and what is held out."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.text.batches import Batches, Streams
from lastlayer.study.text.embedded import NAME as EMBEDDED_NAME
from lastlayer.study.text.embedded import library_lines
from lastlayer.study.text.encode import Encoded, encode_arrays, encode_items
from lastlayer.study.text.held_out import hold_out
from lastlayer.study.text.ids import read_ids
from lastlayer.study.text.kinds import IDS_SUFFIXES
from lastlayer.study.text.lines import read_id_lines, read_lines
from lastlayer.study.text.reading import Reading
from lastlayer.study.text.sources import TextFiles, find_files
from lastlayer.study.text.tokenizers import TokenizerFile
from lastlayer.study.text.vocabulary import END_OF_LINE, MIN_COUNT, UNKNOWN, by_frequency

MIN_TOKENS = 200
MOST_NAMES = 3  # of several files, how many are named


@dataclass(frozen=True)
class Corpus:
    """A text as class ids, sorted by decreasing frequency in the training part: 0 is the most frequent."""

    name: str
    words: list[str]  # (V,), the word of each id
    counts: Tensor  # (V,), how often each is in the training part
    train: Tensor  # (tokens,)
    held_out: Tensor  # (tokens,)
    unit: str = "words"  # what a token is called: words, characters, tokens or items
    notes: tuple[str, ...] = ()  # what a user should know of how it was read

    @property
    def num_classes(self) -> int:
        """V, the size of the vocabulary, with UNKNOWN and END_OF_LINE."""
        return len(self.words)

    def fingerprint(self) -> str:
        """Equal for equal texts under equal options."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for ids in self._tensors():
            digest.update(ids.numpy().tobytes())
        return digest.hexdigest()[:16]

    def training_batches(self, batch: int, window: int, device: torch.device) -> Batches:
        """The training part as `batch` parallel streams."""
        return Streams(self.train, batch, window, device)

    def held_out_batches(self, batch: int, window: int, device: torch.device) -> Batches:
        """The held-out part as `batch` parallel streams."""
        return Streams(self.held_out, batch, window, device)

    def _tensors(self) -> tuple[Tensor, ...]:
        """What makes up the text, beside its words."""
        return self.train, self.held_out


def load_corpus(
    paths: list[Path] | None = None, *, min_count: int | None = None, reading: Reading | None = None
) -> Corpus:
    """Reads a text; without paths the source of Python's standard library.

    Args:
        paths: as `sources.find_files` takes them: text files, plain or compressed; JSON lines; token ids as `.npy`
            or `.bin`; a folder of such; `-` for standard input.
        min_count: training tokens seen less often become `<unk>`; None is 3 for words of a text without `<unk>`,
            else 1.
        reading: what a token is.

    Raises:
        UsageError: a path that is not there; options that contradict each other or the files.
        StudyError: a file that is no UTF-8 text, or a text with too little in it.
    """
    reading = reading or Reading()
    if not paths:
        return _embedded(min_count, reading)
    files = find_files(paths)
    notes = notes_of(files)
    encoded = _encoded_ids(files, reading, notes) if _are_ids(files) else _encoded_text(files, reading)
    return _corpus(files.name, encoded, min_count, tuple(notes))


def make_corpus(
    name: str,
    lines: Iterable[str],
    held_out_lines: Iterable[str] | None = None,
    *,
    min_count: int | None = None,
    split_signs: bool = False,
) -> Corpus:
    """The corpus of lines of words; without held-out lines, 5% of the text in ten places are held out."""
    split = Reading(split_signs=split_signs).split()
    return _corpus(name, encode_items(lines, held_out_lines, split, "words"), min_count)


def _embedded(min_count: int | None, reading: Reading) -> Corpus:
    if reading.ids or reading.field is not None:
        raise UsageError(f"{'--ids' if reading.ids else '--field'} is about files: give them with --text")
    if not reading.units():
        reading = Reading(split_signs=True)
        min_count = MIN_COUNT if min_count is None else min_count  # the library itself contains "<unk>"
    return _corpus(EMBEDDED_NAME, _encoded_lines(library_lines(), None, reading), min_count)


def _are_ids(files: TextFiles) -> bool:
    paths = (*files.training, *files.held_out)
    of_ids = [path for path in paths if path.suffix.lower() in IDS_SUFFIXES]
    if of_ids and len(of_ids) < len(paths):
        raise UsageError(f"{of_ids[0]} holds token ids and other files text; give files of one kind")
    return bool(of_ids)


def notes_of(files: TextFiles) -> list[str]:
    """What was decided by the names and the contents of files."""
    notes = []
    if files.held_out:
        notes.append(f"to train on: {_names_of(files.training)}; held out: {_names_of(files.held_out)}")
    if files.skipped:
        notes.append(f"left out, not being text: {_names_of(files.skipped)}")
    return notes


def _names_of(paths: tuple[Path, ...]) -> str:
    """The first few, and how many more."""
    more = f" and {len(paths) - MOST_NAMES} more" if len(paths) > MOST_NAMES else ""
    return ", ".join(path.name for path in paths[:MOST_NAMES]) + more


def _encoded_ids(files: TextFiles, reading: Reading, notes: list[str]) -> Encoded:
    wrong = [option for option in reading.units() if option != "--ids"]
    if wrong:
        raise UsageError(f"{wrong[0]} is for text, and {files.training[0]} holds token ids")

    def read(paths: tuple[Path, ...]) -> np.ndarray:
        parts = []
        for path in paths:
            ids, held = read_ids(path, reading.ids_dtype)
            parts.append(ids)
            if len(ids) < held:
                notes.append(f"of the {held:,} ids in {path.name} the first {len(ids):,} are used")
        return np.concatenate(parts)

    return encode_arrays(read(files.training), read(files.held_out) if files.held_out else None, str)


def _encoded_text(files: TextFiles, reading: Reading) -> Encoded:
    def chained(read: Callable[[Path, str | None], Iterator[Any]], paths: tuple[Path, ...]) -> Iterator[Any]:
        return (item for path in paths for item in read(path, reading.field))

    read = read_id_lines if reading.ids else read_lines
    held_out = chained(read, files.held_out) if files.held_out else None
    if reading.ids:
        return encode_items(chained(read, files.training), held_out, lambda ids: ids, "tokens")
    return _encoded_lines(chained(read, files.training), held_out, reading)


def _encoded_lines(lines: Iterable[str], held_out: Iterable[str] | None, reading: Reading) -> Encoded:
    if reading.tokenizer is None:
        unit = "characters" if reading.characters else "words"
        return encode_items(lines, held_out, reading.split(), unit)
    tokenizer = TokenizerFile(reading.tokenizer)
    train = tokenizer.encode(lines)
    return encode_arrays(train, None if held_out is None else tokenizer.encode(held_out), tokenizer.name)


def _corpus(name: str, encoded: Encoded, min_count: int | None, notes: tuple[str, ...] = ()) -> Corpus:
    words, train, held_out, end, unit, default = encoded
    _check_enough(name, train, end, unit)
    if held_out is None:
        train, held_out = hold_out(train, end)
    elif len(held_out) < 2:
        raise StudyError(f"the held-out part of {name} is empty")
    min_count = min_count or default
    kept, counts, new_ids = by_frequency(words, train, min_count)
    if not set(kept) - {UNKNOWN, END_OF_LINE}:
        raise StudyError(f"no {unit[:-1]} of {name} is seen {min_count} times in training; lower --min-count")
    train, held_out = (torch.from_numpy(new_ids[ids]) for ids in (train, held_out))
    return Corpus(name, kept, torch.from_numpy(counts), train, held_out, unit, notes)


def _check_enough(name: str, ids: np.ndarray, end: int | None, unit: str) -> None:
    tokens = ids if end is None else ids[ids != end]
    one = unit[:-1]
    if len(tokens) == 0:
        raise StudyError(f"{name} is empty: it holds no {one}")
    if bool((tokens == tokens[0]).all()):
        raise StudyError(f"{name} holds one kind of {one} only, so there is nothing to predict")
    if len(ids) < MIN_TOKENS:
        raise StudyError(
            f"{name} is too short: {len(tokens)} {unit}; a comparison needs at least {MIN_TOKENS} tokens"
        )

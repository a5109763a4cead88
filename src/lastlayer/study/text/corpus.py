"""From text, or token ids, to class ids: a vocabulary of the training text, and what is held out."""

import hashlib
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.text.batches import Batches, Sequences, Streams
from lastlayer.study.text.ids import IDS_SUFFIXES, read_ids
from lastlayer.study.text.lines import read_id_lines, read_lines
from lastlayer.study.text.reading import END_OF_LINE, UNKNOWN, Encoded, Reading, encode_arrays, encode_lines
from lastlayer.study.text.sources import LIBRARY, TextFiles, find_files, library_lines

MIN_COUNT = 3  # words seen less often become UNKNOWN, unless the text has it already
MIN_TOKENS = 200
HELD_OUT_SHARE, HELD_OUT_PLACES = 0.05, 10


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
    lengths: tuple[Tensor, Tensor] | None = None  # of the sequences of both parts, where none is another's context

    @property
    def num_classes(self) -> int:
        """V, the size of the vocabulary, with UNKNOWN and END_OF_LINE."""
        return len(self.words)

    def fingerprint(self) -> str:
        """Equal for equal texts under equal options."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for ids in (self.train, self.held_out, *(self.lengths or ())):
            digest.update(ids.numpy().tobytes())
        return digest.hexdigest()[:16]

    def training_batches(self, batch: int, window: int, device: torch.device) -> Batches:
        """The training part as `batch` parallel streams; of sequences, whole ones, shuffled."""
        if self.lengths is None:
            return Streams(self.train, batch, window, device)
        return Sequences(self.train, self.lengths[0], batch, window, device)

    def held_out_batches(self, batch: int, window: int, device: torch.device) -> Batches:
        """The same of the held-out part."""
        if self.lengths is None:
            return Streams(self.held_out, batch, window, device)
        return Sequences(self.held_out, self.lengths[1], batch, window, device)

    def vocabulary(self) -> str:
        """`word<TAB>count` lines by id; what cannot be seen in a word is escaped as Python does."""
        shown = (word if word.isprintable() and word else ascii(word)[1:-1] for word in self.words)
        return "".join(f"{word}\t{count}\n" for word, count in zip(shown, self.counts.tolist(), strict=True))


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
    if paths:
        files = find_files(paths)
        notes = files.notes()
        encoded = _encoded_ids(files, reading, notes) if _are_ids(files) else _encoded_text(files, reading)
        return _corpus(files.name, encoded, min_count, tuple(notes))
    if reading.ids or reading.field is not None:
        raise UsageError(f"{'--ids' if reading.ids else '--field'} is about files: give them with --text")
    if not reading.units():
        reading = Reading(split_signs=True)
        min_count = MIN_COUNT if min_count is None else min_count  # the library itself contains "<unk>"
    return _corpus(LIBRARY, encode_lines(library_lines(), None, reading), min_count)


def _are_ids(files: TextFiles) -> bool:
    paths = (*files.training, *files.held_out)
    of_ids = [path for path in paths if path.suffix.lower() in IDS_SUFFIXES]
    if of_ids and len(of_ids) < len(paths):
        raise UsageError(f"{of_ids[0]} holds token ids and other files text; give files of one kind")
    return bool(of_ids)


def _encoded_ids(files: TextFiles, reading: Reading, notes: list[str]) -> Encoded:
    wrong = [option for option in reading.units() if option != "--ids"]
    if wrong:
        raise UsageError(f"{wrong[0]} is for text, and {files.training[0]} holds token ids")

    def read(path: Path) -> np.ndarray:
        ids, held = read_ids(path, reading.ids_dtype)
        if len(ids) < held:
            notes.append(f"of the {held:,} ids in {path.name} the first {len(ids):,} are used")
        return ids

    return encode_arrays(
        [np.concatenate([read(p) for p in part]) for part in (files.training, files.held_out) if part]
    )


def _encoded_text(files: TextFiles, reading: Reading) -> Encoded:
    read = read_id_lines if reading.ids else read_lines
    train, held_out = (
        chain.from_iterable(read(path, reading.field) for path in part)
        for part in (files.training, files.held_out)
    )
    return encode_lines(train, held_out if files.held_out else None, reading)


def _corpus(name: str, encoded: Encoded, min_count: int | None, notes: tuple[str, ...] = ()) -> Corpus:
    words, train, held_out, end, unit = encoded
    _check_enough(name, train, end, unit)
    if min_count is None:
        known = UNKNOWN in words and words.index(UNKNOWN) in train
        min_count = MIN_COUNT if unit == "words" and not known else 1
    if held_out is None:
        train, held_out = _hold_out(train, end)
    elif len(held_out) < 2:
        raise StudyError(f"the held-out part of {name} is empty")
    kept, counts, new_ids = _by_frequency(words, train, min_count)
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


def _hold_out(ids: np.ndarray, end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the text into ten pieces and holds out the last 5% of each, at the end of a line where one is near."""
    places = max(1, min(HELD_OUT_PLACES, len(ids) // 2000))
    line_ends = np.array([0]) if end is None else np.append(0, np.flatnonzero(ids == end) + 1)

    def near_line_end(position: int) -> int:
        after = int(np.searchsorted(line_ends, position))
        near = after < len(line_ends) and line_ends[after] - position <= 0.01 * len(ids) / places
        return int(line_ends[after]) if near else position

    train, held_out = [], []
    borders = [near_line_end(len(ids) * place // places) for place in range(places)] + [len(ids)]
    for start, stop in pairwise(borders):
        cut = near_line_end(stop - max(2, int(HELD_OUT_SHARE * (stop - start))))
        train.append(ids[start:cut])
        held_out.append(ids[cut:stop])
    return np.concatenate(train), np.concatenate(held_out)


def _by_frequency(words: list[str], train: np.ndarray, min_count: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """`(kept words, their counts, the new id of every old one)`, by decreasing frequency."""
    seen = np.bincount(train, minlength=len(words))
    special = np.array([word in (UNKNOWN, END_OF_LINE) for word in words])
    keep = np.flatnonzero((seen >= min_count) & (seen > 0) | special)
    names = [words[i] for i in keep]
    counts = seen[keep]
    if UNKNOWN not in names:
        names.append(UNKNOWN)
        counts = np.append(counts, 0)
    unknown = names.index(UNKNOWN)
    counts[unknown] += len(train) - counts.sum()
    order = np.argsort(-counts, kind="stable")
    rank = np.argsort(order)
    new_ids = np.full(len(words), rank[unknown], dtype=np.int64)
    new_ids[keep] = rank[: len(keep)]
    return [names[i] for i in order], counts[order].astype(np.int64), new_ids

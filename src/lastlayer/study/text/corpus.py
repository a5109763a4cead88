"""From text to class ids: tokens, a vocabulary of the training text, and what is held out."""

import hashlib
import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lastlayer.study.errors import StudyError
from lastlayer.study.text.embedded import NAME as EMBEDDED_NAME
from lastlayer.study.text.embedded import library_lines
from lastlayer.study.text.sources import find_files, read_lines

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
MIN_COUNT = 3  # words seen less often become UNKNOWN, unless the text has it already
MIN_TOKENS = 200
HELD_OUT_SHARE, HELD_OUT_PLACES = 0.05, 10

split_at_spaces = str.split
split_words_and_signs = re.compile(r"<unk>|\w+|[^\w\s]").findall


@dataclass(frozen=True)
class Corpus:
    """A text as class ids, sorted by decreasing frequency in the training part: 0 is the most frequent."""

    name: str
    words: list[str]  # (V,), the word of each id
    counts: Tensor  # (V,), how often each is in the training part
    train: Tensor  # (tokens,)
    held_out: Tensor  # (tokens,)

    @property
    def num_classes(self) -> int:
        """V, the size of the vocabulary, with UNKNOWN and END_OF_LINE."""
        return len(self.words)

    def fingerprint(self) -> str:
        """Equal for equal texts under equal options."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for ids in (self.train, self.held_out):
            digest.update(ids.numpy().tobytes())
        return digest.hexdigest()[:16]


def load_corpus(
    paths: list[Path] | None = None, *, min_count: int | None = None, split_signs: bool = False
) -> Corpus:
    """Reads a text; without paths the source of Python's standard library.

    Args:
        paths: as `sources.find_files` takes them.
        min_count: training words seen less often become `<unk>`; None is 3, or 1 where the text has `<unk>`.
        split_signs: separate punctuation from words; otherwise tokens are what stands between spaces.

    Raises:
        UsageError: a path that is not there.
        StudyError: a file that is no UTF-8 text, or a text with too little in it.
    """
    if not paths:
        least = MIN_COUNT if min_count is None else min_count  # the library itself speaks of "<unk>"
        return make_corpus(EMBEDDED_NAME, library_lines(), min_count=least, split_signs=True)
    files = find_files(paths)
    held_out = _lines_of(files.held_out) if files.held_out else None
    return make_corpus(
        files.name, _lines_of(files.training), held_out, min_count=min_count, split_signs=split_signs
    )


def _lines_of(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        yield from read_lines(path)


def make_corpus(
    name: str,
    lines: Iterable[str],
    held_out_lines: Iterable[str] | None = None,
    *,
    min_count: int | None = None,
    split_signs: bool = False,
) -> Corpus:
    """The corpus of lines of text; without held-out lines, 5% of the text in ten places are held out."""
    split = split_words_and_signs if split_signs else split_at_spaces
    index: defaultdict[str, int] = defaultdict()  # words in order of appearance
    index.default_factory = index.__len__
    end = index[END_OF_LINE]
    train = _encode(lines, split, index)
    _check_enough(name, train, end, len(index))
    if held_out_lines is None:
        train, held_out = _hold_out(train, end)
    else:
        held_out = _encode(held_out_lines, split, index)
        if len(held_out) < 2:
            raise StudyError(f"the held-out part of {name} is empty")
    words = list(index)
    if min_count is None:
        min_count = 1 if UNKNOWN in index else MIN_COUNT
    kept, counts, new_ids = _by_frequency(words, train, min_count)
    if not set(kept) - {UNKNOWN, END_OF_LINE}:
        raise StudyError(f"no word of {name} is seen {min_count} times in training; lower --min-count")
    train, held_out = (torch.from_numpy(new_ids[ids]) for ids in (train, held_out))
    return Corpus(name, kept, torch.from_numpy(counts), train, held_out)


def _encode(lines: Iterable[str], split: Callable[[str], list[str]], index: defaultdict[str, int]) -> np.ndarray:
    """Ids in order of appearance, an END_OF_LINE after each line."""
    ids = array("i")
    end = index[END_OF_LINE]
    for line in lines:
        ids.extend(map(index.__getitem__, split(line)))
        ids.append(end)
    return np.frombuffer(ids, dtype=np.intc) if len(ids) else np.empty(0, np.intc)


def _check_enough(name: str, ids: np.ndarray, end: int, kinds: int) -> None:
    words = int((ids != end).sum())
    if words == 0:
        raise StudyError(f"{name} is empty: it holds no word")
    if kinds == 2:  # END_OF_LINE is one
        raise StudyError(f"{name} holds one kind of word only, so there is nothing to predict")
    if len(ids) < MIN_TOKENS:
        raise StudyError(f"{name} is too short: {words} words; a comparison needs at least {MIN_TOKENS} tokens")


def _hold_out(ids: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the text into ten pieces and holds out the last 5% of each, at the end of a line where one is near."""
    places = max(1, min(HELD_OUT_PLACES, len(ids) // 2000))
    line_ends = np.append(0, np.flatnonzero(ids == end) + 1)

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
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    new_ids = np.full(len(words), rank[unknown], dtype=np.int64)
    new_ids[keep] = rank[: len(keep)]
    return [names[i] for i in order], counts[order].astype(np.int64), new_ids

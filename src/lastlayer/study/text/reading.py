"""What a token of a text is, and texts as arrays of numbers before a vocabulary is chosen."""

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.text.ids import BIN_DTYPES

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
LINES_AT_ONCE = 1000  # that a tokenizer is given
words_and_signs = re.compile(r"<unk>|\w+|[^\w\s]").findall


@dataclass(frozen=True)
class Reading:
    """How files become tokens: the options of the command line; at most one of the first four.

    Args:
        split_signs: separate punctuation from words; otherwise tokens are what stands between spaces.
        characters: every character is a token.
        tokenizer: a `tokenizer.json` of the tokenizers package; its tokens.
        ids: text files hold token ids, one sequence a line; `.npy` and `.bin` do in any case.
        ids_dtype: of the numbers in a `.bin`.
        field: of JSON lines; None is "text" in .jsonl files, and no JSON in others.
    """

    split_signs: bool = False
    characters: bool = False
    tokenizer: Path | None = None
    ids: bool = False
    ids_dtype: str = BIN_DTYPES[0]
    field: str | None = None

    def __post_init__(self) -> None:
        chosen = self.units()
        if len(chosen) > 1:
            raise UsageError(f"give one of {' and '.join(chosen)}, not both")
        if self.ids_dtype not in BIN_DTYPES:
            raise UsageError(f"--ids-dtype must be one of {', '.join(BIN_DTYPES)}; got {self.ids_dtype!r}")

    def units(self) -> list[str]:
        """The options that say what a token is, of those that were chosen."""
        chosen = {
            "--split-signs": self.split_signs,
            "--characters": self.characters,
            "--tokenizer": self.tokenizer is not None,
            "--ids": self.ids,
        }
        return [option for option, on in chosen.items() if on]

    def unit(self) -> str:
        """What a token is called, in the plural."""
        return "tokens" if self.ids else "characters" if self.characters else "words"

    def split(self) -> Callable[[Any], Iterable[Hashable]]:
        """A line to its tokens."""
        if self.ids:
            return lambda ids: ids  # as they were read
        if self.characters:
            return lambda line: line.rstrip("\r\n")
        return words_and_signs if self.split_signs else str.split


class Encoded(NamedTuple):
    """A text in numbers, each a place in `words`."""

    words: list[str]
    train: np.ndarray  # (tokens,)
    held_out: np.ndarray | None  # (tokens,); None where a part of `train` is still to be held out
    end: int | None = None  # what stands at the end of each line; None where nothing does
    unit: str = "tokens"  # what a token is called, in the plural


def encode_lines(lines: Iterable[Any], held_out: Iterable[Any] | None, reading: Reading) -> Encoded:
    """Lines, or sequences of ids, split into tokens, with an END_OF_LINE after each but those of a tokenizer."""
    if reading.tokenizer is not None:
        tokenizer = _tokenizer(reading.tokenizer)
        parts = [_tokenized(tokenizer, part) for part in (lines, held_out) if part is not None]
        return encode_arrays(parts, lambda token: tokenizer.id_to_token(token) or str(token))
    index: defaultdict[Hashable, int] = defaultdict()  # tokens in order of appearance
    index.default_factory = index.__len__
    end, split = index[END_OF_LINE], reading.split()

    def encoded(part: Iterable[Any]) -> np.ndarray:
        ids = array("i")
        for line in part:
            ids.extend(map(index.__getitem__, split(line)))
            ids.append(end)
        return np.array(ids, np.intc)

    train = encoded(lines)
    rest = None if held_out is None else encoded(held_out)
    return Encoded([str(token) for token in index], train, rest, end, reading.unit())


def encode_arrays(parts: list[np.ndarray], name_of: Callable[[int], str] = str) -> Encoded:
    """Token ids to train on and, where there are two parts, those held out; the words name those that occur."""
    present = np.unique(np.concatenate([np.unique(part) for part in parts]))
    words = [name_of(token) for token in present.tolist()]
    train, *held_out = (np.searchsorted(present, part) for part in parts)
    return Encoded(words, train, held_out[0] if held_out else None)


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a `tokenizer.json` of the tokenizers package, or of a folder that holds one.

    Raises:
        UsageError: a path that is not there.
        StudyError: the package is not installed; another kind of file.
    """
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.exists():
        raise UsageError(f"--tokenizer: there is no file {path}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise StudyError(
            "--tokenizer needs the tokenizers package, which comes with: pip install 'lastlayer[transformers]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # the package raises nothing more special
        reason = next(iter(str(problem).splitlines()), "no reason given")
        raise StudyError(f"{path} is no JSON file of the tokenizers package: {reason}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _tokenized(tokenizer: Any, lines: Iterable[str]) -> np.ndarray:  # (tokens,), int64
    """The ids of all lines, one after the other, without the tokens that mark beginnings and ends."""
    ids, ahead = array("q"), iter(lines)
    while block := list(islice(ahead, LINES_AT_ONCE)):
        for line in tokenizer.encode_batch(block, add_special_tokens=False):
            ids.extend(line.ids)
    return np.array(ids, np.int64)

"""How a line becomes tokens: at spaces, words and signs, characters, or by a file of the tokenizers package."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from lastlayer.study.errors import StudyError, UsageError

LINES_AT_ONCE = 1000

split_at_spaces = str.split
split_words_and_signs = re.compile(r"<unk>|\w+|[^\w\s]").findall


def split_characters(line: str) -> list[str]:
    """Every character of a line but the end of it."""
    return list(line.rstrip("\r\n"))


class TokenizerFile:
    """A `tokenizer.json` of the tokenizers package, or a folder that holds one.

    Raises:
        UsageError: a path that is not there.
        StudyError: the package is not installed; another kind of file.
    """

    def __init__(self, path: Path) -> None:
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
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as problem:  # the package raises nothing more special
            reason = next(iter(str(problem).splitlines()), "no reason given")
            raise StudyError(f"{path} is no JSON file of the tokenizers package: {reason}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, lines: Iterable[str]) -> np.ndarray:  # (tokens,), int64
        """The ids of all lines, one after the other, without the tokens that mark beginnings and ends."""
        parts = [np.empty(0, np.int64)]
        for block in _blocks(lines):
            encoded = self.tokenizer.encode_batch(block, add_special_tokens=False)
            parts.append(np.concatenate([np.array(line.ids, np.int64) for line in encoded]))
        return np.concatenate(parts)

    def name(self, token: int) -> str:
        """How the tokenizer writes a token."""
        return self.tokenizer.id_to_token(token) or str(token)


def _blocks(lines: Iterable[str]) -> Iterator[list[str]]:
    ahead = iter(lines)
    while block := list(islice(ahead, LINES_AT_ONCE)):
        yield block

"""What a token of a text is: the options of the command line as one value."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lastlayer.study.errors import UsageError
from lastlayer.study.text.ids import BIN_DTYPES
from lastlayer.study.text.tokenizers import split_at_spaces, split_characters, split_words_and_signs


@dataclass(frozen=True)
class Reading:
    """How files become tokens; at most one of the first four.

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

    def split(self) -> Callable[[str], list[str]]:
        """A line of text to its tokens."""
        if self.characters:
            return split_characters
        return split_words_and_signs if self.split_signs else split_at_spaces

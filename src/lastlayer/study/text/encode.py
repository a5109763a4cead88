"""Texts and token ids as arrays of numbers, before a vocabulary is chosen."""

from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np

from lastlayer.study.text.ids import compact
from lastlayer.study.text.vocabulary import END_OF_LINE, MIN_COUNT, UNKNOWN


class Encoded(NamedTuple):
    """A text in numbers, each a place in `words`."""

    words: list[str]
    train: np.ndarray  # (tokens,)
    held_out: np.ndarray | None  # (tokens,); None where a part of `train` is still to be held out
    end: int | None  # what stands at the end of each line; None where nothing does
    unit: str  # what a token is called, in the plural
    min_count: int  # below which a token becomes UNKNOWN, where nothing else is said


def encode_items(
    items: Iterable[Any],
    held_out: Iterable[Any] | None,
    split: Callable[[Any], Iterable[Hashable]],
    unit: str,
) -> Encoded:
    """Lines, or sequences, each split into tokens, with an END_OF_LINE after each."""
    index: defaultdict[Hashable, int] = defaultdict()  # tokens in order of appearance
    index.default_factory = index.__len__
    end = index[END_OF_LINE]
    train = _encode(items, split, index)
    knows_unknown = UNKNOWN in index
    held_out_ids = None if held_out is None else _encode(held_out, split, index)
    least = MIN_COUNT if unit == "words" and not knows_unknown else 1
    return Encoded([str(token) for token in index], train, held_out_ids, end, unit, least)


def encode_arrays(train: np.ndarray, held_out: np.ndarray | None, name_of: Callable[[int], str]) -> Encoded:
    """Token ids; the words are the names of those that occur."""
    present, parts = compact([train] if held_out is None else [train, held_out])
    words = [name_of(token) for token in present.tolist()]
    return Encoded(words, parts[0], None if held_out is None else parts[1], None, "tokens", 1)


def _encode(
    items: Iterable[Any], split: Callable[[Any], Iterable[Hashable]], index: defaultdict[Hashable, int]
) -> np.ndarray:
    ids = array("i")
    end = index[END_OF_LINE]
    for item in items:
        ids.extend(map(index.__getitem__, split(item)))
        ids.append(end)
    return np.frombuffer(ids, dtype=np.intc) if len(ids) else np.empty(0, np.intc)

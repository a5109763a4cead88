"""The vocabulary of a training text: which kinds of token are kept, and their ids by falling frequency."""

import numpy as np

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
MIN_COUNT = 3  # words seen less often become UNKNOWN, unless the text has it already


def by_frequency(words: list[str], train: np.ndarray, min_count: int) -> tuple[list[str], np.ndarray, np.ndarray]:
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


def as_lines(words: list[str], counts: list[int]) -> str:
    """`word<TAB>count` lines in the order of the ids; what cannot be seen in a word is escaped as Python does."""
    shown = (word if word.isprintable() and word else ascii(word)[1:-1] for word in words)
    return "".join(f"{word}\t{count}\n" for word, count in zip(shown, counts, strict=True))

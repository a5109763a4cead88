"""The bytes that the collectives of layers over several processes send, counted."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

_counters: list[Counter[str]] = []


@contextmanager
def count_bytes() -> Iterator[Counter[str]]:
    """Counts the bytes that each collective of a layer over several processes sends from this one, by its name.

    By the usual ring algorithms, with R ranks and n bytes of result: `2 (R - 1) / R n` for an all-reduce,
    `(R - 1) / R n` for an all-gather and a broadcast. Equal parts are sent: the largest counts.

    >>> with count_bytes() as sent:
    ...     pass  # a step
    >>> sent.total()
    0
    """
    counter: Counter[str] = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


def count_sent(name: str, sent: float) -> None:
    """Adds the bytes of one collective."""
    for counter in _counters:
        counter[name] += round(sent)

"""How numbers are written for a reader, and what a table or chart shows of every record."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lastlayer.study.files import Record


def figure(value: float) -> str:
    """Three figures at least, thousands set apart: 0.0123, 4.50, 67.8, 12,345, 6.02e+23."""
    if abs(value) >= 1e12:
        return f"{value:.2e}"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = min(6, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{decimals}f}"


def percent(share: float) -> str:
    """`12.3%`, `0.0046%`: a share above 0 is never written as 0."""
    return f"{share:.1%}" if share == 0 or share >= 0.01 else f"{100 * share:.2g}%"


def counted(number: int, thing: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    if seconds < 90:
        return counted(max(1, round(seconds)), "second")
    if seconds < 5400:
        minutes = round(seconds / 30) / 2 if seconds < 600 else round(seconds / 60)
        return f"{minutes:g} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 2 * 86_400 else counted(round(seconds / 86_400), "day")


@dataclass(frozen=True)
class Measure:
    """A figure that every record has: how it is called, found and written; of some the best is marked."""

    title: str
    value: Callable[[Record], float | None]
    shown: Callable[[float], str]
    better: str = "lower"  # or "higher"; "" where none is the best
    note: str = ""  # said of its chart; without one it has none
    brief: bool = True  # whether the table in the terminal has it

    def text(self, record: Record) -> str:
        """The figure as it is written; `-` where there is none."""
        value = self.value(record)
        return "-" if value is None else self.shown(value)

    def best(self, records: Sequence[Record]) -> set[str]:
        """How the best value is written; none where most are written so, or there is one only."""
        known = [(value, self.shown(value)) for record in records if (value := self.value(record)) is not None]
        if not self.better or len(known) < 2:
            return set()
        best = (min if self.better == "lower" else max)(known)[1]
        return {best} if sum(shown == best for _, shown in known) <= len(known) / 2 else set()

"""A figure that every record has: one column of a table, and of a page's table the best is marked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lastlayer.study.files import Record


@dataclass(frozen=True)
class Measure:
    """How a figure of a record is called, found and written."""

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

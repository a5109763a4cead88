"""How tables and progress reach a terminal."""

import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from lastlayer.study.files import Records
from lastlayer.study.report.figures import Measure, duration, figure

LEAST_COLUMNS = 80  # what every table is laid out for
EVERY = 10.0  # seconds between lines about the same thing, where the output is no terminal


def show(console: Console, title: str, records: Records, fields: Sequence[str]) -> None:
    """Prints those fields of the records, a column each; what is the same in every row is said in the title."""
    first, *others = records
    shown = [name for name in fields if any(record.get(name) is not None for record in records)]
    same = [name for name in shown if others and all(record.get(name) == first.get(name) for record in others)]
    title += "".join(f", {_heading(name)} {_cell(first[name])}" for name in same)
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in (name for name in shown if name not in same):
        cells = [_cell(record.get(name)) for record in records]
        text = any(isinstance(record.get(name), str) for record in records)
        widest = None if text else max(map(len, cells))  # a figure is never cut
        table.add_column(_heading(name), justify="left" if text else "right", min_width=widest)
    for record in records:
        table.add_row(*(Text(_cell(record.get(name))) for name in shown if name not in same))
    print_table(console, table)


def _heading(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else figure(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_measures(
    console: Console, title: str, heading: str, names: Sequence[Text], records: Records, columns: Sequence[Measure]
) -> None:
    """Prints a row for each record: its name, then its measures."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column(heading)  # the only one that gives way on a narrow terminal
    for measure in columns:
        table.add_column(measure.title.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, record in zip(names, records, strict=True):
        table.add_row(name, *(measure.text(record) for measure in columns))
    print_table(console, table)


def say(console: Console, line: str) -> None:
    """A line as it is: with brackets, which a name may hold, and of any length."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Prints a table; a terminal too narrow for it gets a block of lines for each row, no figure cut."""
    options = console.options.update(width=max(console.width, LEAST_COLUMNS))
    if console.width < min(LEAST_COLUMNS, Measurement.get(console, options, table).maximum):
        _print_blocks(console, table)
    else:
        console.print(Segments(console.render(table, options)), crop=False, end="")


def _print_blocks(console: Console, table: Table) -> None:
    """`name`, then `heading: figure` lines, for each row."""
    if table.title is not None:
        console.print(table.title, highlight=False)
    names, *columns = ([str(column.header), *column.cells] for column in table.columns)
    for row in range(1, len(names)):
        console.print(str(names[row]), style="bold", highlight=False, markup=False)
        for heading, *cells in columns:
            said = " ".join(heading.split())
            console.print(f"  {said}: {cells[row - 1]}", highlight=False, markup=False, soft_wrap=True)


class Steps:
    """What a long command is doing: a line that changes in a terminal; in a log a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.status = console.status("...") if console.is_terminal else None
        self.said, self.at = "", 0.0

    def __enter__(self) -> Self:
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def say(self, doing: str, done: int, total: int, seconds_left: float | None) -> None:
        """Shows that `done` steps of `total` are done, and what the next one is."""
        left = "" if seconds_left is None else f", about {duration(seconds_left)} left"
        line = f"{doing} ({done} of {total} done{left})"
        if self.status is not None:
            self.status.update(line)
        elif doing != self.said or time.monotonic() - self.at > EVERY:
            say(self.console, line)
            self.said, self.at = doing, time.monotonic()

"""How tables and progress reach a terminal."""

import time
from collections.abc import Callable, Sequence
from typing import Self

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from lastlayer.study.files import Record
from lastlayer.study.report.figures import duration

Column = tuple[str, Callable[[Record], str]]  # heading, and what it shows of a record

LEAST_COLUMNS = 80  # what every table is laid out for
EVERY = 10.0  # seconds between lines about the same thing, where the output is no terminal


def plain_table(title: str, headings: tuple[str, ...]) -> Table:
    """An empty table of figures without lines; the first column is for names."""
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


def table_of(title: str, columns: Sequence[Column], records: Sequence[Record]) -> Table:
    """A plain table with a row for each record; of each column its heading, and how it shows a record."""
    table = plain_table(title, tuple(heading for heading, _ in columns))
    for record in records:
        table.add_row(*(shown(record) for _, shown in columns))
    return table


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

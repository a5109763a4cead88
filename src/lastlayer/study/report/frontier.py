"""What `speedup` found, as a table in the terminal."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import print_table
from lastlayer.study.report.verdict import screen_name

Record = dict[str, Any]


def show(records: list[Record], console: Console) -> None:
    """The table of all that were tried, `*` marks the chosen one; below it those whose turn did not come."""
    tried = [record for record in records if record["ms"] is not None]
    untried = [screen_name(record) for record in records if record["ms"] is None]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("screen")  # the only one that gives way on a narrow terminal
    for heading in ("top-1", "top-k", "KL", "bytes", "proved", "ms", "times\nas fast"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in tried:
        dropped = record["dropped"]
        name = ("* " if record["chosen"] else "") + screen_name(record) + (f": {dropped}" if dropped else "")
        table.add_row(
            name,
            _cell(record["agreement_top1"], "{:.2%}".format),
            _cell(record["agreement_topk"], "{:.2%}".format),
            _cell(record["kl"], figure),
            _cell(record["bytes_read_fraction"], "{:.1%}".format),
            _cell(record["certified_fraction"], "{:.1%}".format),
            _cell(record["ms"], figure),
            _cell(record["ratio"], figure),
        )
    print_table(console, table)
    if untried:
        said = f"Not tried, for --seconds were over: {'; '.join(untried)}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def _cell(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)

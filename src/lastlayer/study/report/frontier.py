"""What `speedup` found, as a table in the terminal."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import Record, print_table, say
from lastlayer.study.report.verdict import screen_name

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # heading, field, and how it is shown
    ("top-1", "agreement_top1", "{:.2%}".format),
    ("top-k", "agreement_topk", "{:.2%}".format),
    ("KL", "kl", figure),
    ("bytes", "bytes_read_fraction", "{:.1%}".format),
    ("proved", "certified_fraction", "{:.1%}".format),
    ("ms", "ms", figure),
    ("times\nas fast", "ratio", figure),
)


def show(records: list[Record], console: Console) -> None:
    """The table of all that were tried, `*` marks the chosen one; below it those whose turn did not come."""
    untried = [screen_name(record) for record in records if record["ms"] is None]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("screen")  # the only one that gives way on a narrow terminal
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for record in (record for record in records if record["ms"] is not None):
        dropped = record["dropped"]
        name = ("* " if record["chosen"] else "") + screen_name(record) + (f": {dropped}" if dropped else "")
        shown = ("-" if record[field] is None else write(record[field]) for _, field, write in COLUMNS)
        table.add_row(name, *shown)
    print_table(console, table)
    if untried:
        say(console, f"Not tried, for --seconds were over: {'; '.join(untried)}")

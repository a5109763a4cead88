"""How tables reach a terminal."""

from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table

LEAST_COLUMNS = 80  # what every table is laid out for


def plain_table(title: str, headings: tuple[str, ...]) -> Table:
    """An empty table of figures without lines; the first column is for names."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


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

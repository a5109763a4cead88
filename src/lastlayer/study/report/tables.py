"""How tables reach a terminal."""

from rich.console import Console
from rich.segment import Segments
from rich.table import Table

LEAST_COLUMNS = 80  # what every table is laid out for


def print_table(console: Console, table: Table) -> None:
    """Prints a table; in a terminal too narrow for it lines run on, where rich would cut figures short."""
    options = console.options.update(width=max(console.width, LEAST_COLUMNS))
    console.print(Segments(console.render(table, options)), crop=False, end="")

"""Flat records as tables: a column for each field that differs; what is the same in every row is in the title."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lastlayer.study.files import Records
from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import print_table


def show(console: Console, title: str, records: Records, fields: Sequence[str]) -> None:
    """Prints those fields of the records; a field that none of them has is left out."""
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


def over_seeds(records: Records, by: Sequence[str]) -> Records:
    """One record for each setting of the fields `by`: the mean of every figure that differs, with its spread."""
    groups: dict[tuple[Any, ...], Records] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in by), []).append(record)
    return [{name: _combined([run[name] for run in runs]) for name in runs[0]} for runs in groups.values()]


def _combined(values: list[Any]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    return f"{figure(mean(values))} ± {figure(stdev(values))}"


def _heading(name: str) -> str:
    return name.replace("_", " ")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else figure(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

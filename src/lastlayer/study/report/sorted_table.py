"""A table in HTML whose columns the page's script sorts; the best figure of each column is marked."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from lastlayer.study.files import Record
from lastlayer.study.report.bars import best_figures


@dataclass(frozen=True)
class Measure:
    """One group of bars, or one column of a table: a figure of every record. Without a note none is the best."""

    title: str
    note: str
    value: Callable[[Record], float | None]
    shown: Callable[[float], str]
    lower_is_better: bool = True


def sorted_table(
    heading: str, names: list[str], records: list[Record], columns: tuple[Measure, ...], winner: int | None
) -> str:
    """A row for each record, in their order; `winner` is the row that is marked as a whole.

    The script sorts by `data-value`, the best first; what is not known has none and comes last.
    """
    heads = f'<th data-first="ascending">{escape(heading)}</th>' + "".join(map(_head, columns))
    cells = [_cells(column, records) for column in columns]
    rows = "".join(
        f"<tr{' class=winner' if i == winner else ''}><td>{escape(name)}</td>"
        f"{''.join(column[i] for column in cells)}</tr>"
        for i, name in enumerate(names)
    )
    return (
        '<p class="quiet hint">The table is wider than the screen: it scrolls sideways →</p>\n'
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
        '<p class="quiet"><b class="best">Best</b> of each column; a click on a heading sorts.</p>'
    )


def _head(column: Measure) -> str:
    first = "ascending" if column.lower_is_better else "descending"
    return f'<th data-first="{first}">{escape(column.title)}</th>'


def _cells(column: Measure, records: list[Record]) -> list[str]:
    values = [column.value(record) for record in records]
    known = [value for value in values if value is not None]
    shown = [column.shown(value) for value in known]
    best = best_figures(shown, known, column.lower_is_better) if column.note else set()
    cells = []
    for value in values:
        said = "-" if value is None else column.shown(value)
        number = "" if value is None else f' data-value="{value!r}"'
        cells.append(
            f'<td{number}><b class="best">{said}</b></td>' if said in best else f"<td{number}>{said}</td>"
        )
    return cells

"""Tables keep their figures in a narrow terminal."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from lastlayer.study.report.tables import print_table


@pytest.mark.parametrize("columns", [20, 40, 80, 120])
def test_no_figure_is_cut(columns):
    table = Table()
    table.add_column("screen")
    for _ in range(4):
        table.add_column("milliseconds", justify="right", no_wrap=True)
    table.add_row("SVD, calibrated, float32, window 64", *["123.4567"] * 4)
    written = io.StringIO()
    print_table(Console(file=written, width=columns, force_terminal=True), table)
    text = written.getvalue()
    assert text.count("123.4567") == 4
    assert "calibrated" in text

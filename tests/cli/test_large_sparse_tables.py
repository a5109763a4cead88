"""The tables of `lastlayer reproduce large-sparse-targets` fit a terminal."""

import io

from rich.console import Console

from lastlayer.cli.reproduce import show_cases


def shown(case, *records, columns=80):
    written = io.StringIO()
    show_cases(Console(file=written, width=columns), [{"case": case, **record} for record in records])
    return written.getvalue()


def timed(name, **fields):
    sizes = {"num_classes": 793_471, "in_features": 300, "batch": 128}
    quartiles = {"low_ms": 1.91919, "high_ms": 2.92929, "mean_ms": 3.93939, "rounds": 77}
    return {"name": name, **sizes, **fields, **quartiles}


def test_no_figure_is_cut_and_what_is_the_same_is_said_once():
    name = "HierarchicalSoftmax of a long name, sparse gradients, SGD"
    text = shown(
        "output layer",
        timed("nn.Linear", times_faster_than_plain=1.0, times_faster_than_fused=0.18, ms=2290.5),
        timed(name, times_faster_than_plain=1192.4, times_faster_than_fused=345.6, ms=1.92),
        timed("in place", times_faster_than_plain=None, times_faster_than_fused=1.0, ms=0.000004),
    )
    assert max(map(len, text.splitlines())) <= 80
    title, _, table = text.partition("\nname")
    assert " ".join(title.split()) == "output layer, num classes 793,471, in features 300, batch 128"
    rows = [line.split() for line in table.splitlines()]
    assert ["nn.Linear", "1.00", "0.180", "2,290"] in rows
    assert any(row[-3:] == ["1,192", "346", "1.92"] for row in rows)
    assert ["in", "place", "1.00", "4.0e-06"] in rows
    assert all(word in table for word in name.split())
    assert text.splitlines()[-1] == "the paper, V=793,471, d=300: 763 times faster †"
    assert not any(number in text for number in ("2.93", "3.94", "77"))


def test_one_record_keeps_its_columns():
    assert "num classes in features batch" in " ".join(shown("scaling", timed("x", ms=1.5)).split())


def test_neighbours_are_lines_of_their_own():
    near = "self._file: [bold]names[/bold] _MODE_READ; returned: [] else:"
    text = shown("embeddings", {"name": "Z-loss", "top10_accuracy": 0.354, "neighbours": near}, columns=200)
    assert text.splitlines()[-1] == f"Z-loss: {near}"
    assert "neighbours" not in text

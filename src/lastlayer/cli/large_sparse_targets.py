"""`lastlayer reproduce large-sparse-targets`: the claims of Vincent et al. (2015) beside what is measured here."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lastlayer.cli.options import Common, Records
from lastlayer.reproduce.large_sparse_targets.classifiers import measure_classifiers
from lastlayer.reproduce.large_sparse_targets.exactness import measure_exactness
from lastlayer.reproduce.large_sparse_targets.speed import (
    measure_scaling,
    measure_speed,
    measure_whole_model,
    multiply_adds,
)
from lastlayer.reproduce.large_sparse_targets.words import EMBEDDING_METHODS, MODEL_METHODS, train_words
from lastlayer.study.errors import UsageError
from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import print_table
from lastlayer.study.text.corpus import load_corpus

PARTS = ("speed", "scaling", "exactness", "embeddings", "classifiers", "models")
BATCH = 128
NEIGHBOURS = "neighbours"
NOT_IN_TABLES = ("case", "low_ms", "high_ms", "mean_ms", "rounds", NEIGHBOURS)
CLAIMS = {  # at V=793,471, d=300, batch 128, on a CPU, against a plain update; as remembered
    "output layer": "763 times faster †",
    "whole model": "501 times faster †",
}


def large_sparse_targets(
    common: Common,
    parts: Annotated[
        str, typer.Option(metavar="NAMES", help=f"Which parts, with commas: {', '.join(PARTS)}.")
    ] = ",".join(PARTS),
    num_classes: Annotated[
        int, typer.Option(min=400, help="V of the speed table; the paper's is 793,471.")
    ] = 793_471,
    in_features: Annotated[int, typer.Option(min=2, help="d of the speed table.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the speed table; a plain step takes seconds.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the exactness run.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=0.1, help="Training time of each method on text.")] = 30.0,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text, as `compare` takes it. Not given: Python's own source.")
    ] = None,
) -> Records:
    """Exact SGD at a cost without V: speed, scaling with V and d, drift, and what the losses are good for."""
    common.require_cpu()
    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        problem = f"there is no part {unknown[0]!r}" if unknown else "no part was named"
        raise UsageError(f"{problem}; the parts are: {', '.join(PARTS)}")
    console = Console()
    corpus = load_corpus(text) if {"embeddings", "classifiers", "models"} & set(chosen) else None
    largest = [v for v in (1_000, 10_000, 100_000, 1_000_000) if v <= max(2 * num_classes, 1_000)]
    widths = [*(d for d in (64, 128, 256) if d < in_features), in_features]

    def classifiers() -> Records:
        assert corpus is not None
        return measure_classifiers(corpus, seed=common.seed)

    def words(names: tuple[str, ...], deep: bool) -> Records:
        assert corpus is not None
        return train_words(corpus, names, deep=deep, seconds=seconds, steps=None, seed=common.seed)

    measure: dict[str, Callable[[], Records]] = {
        "speed": lambda: (
            measure_speed(num_classes, in_features, BATCH, rounds, common.seed)
            + measure_whole_model(num_classes, in_features, BATCH, rounds, common.seed)
        ),
        "scaling": lambda: measure_scaling(largest, widths, BATCH, rounds, common.seed),
        "exactness": lambda: measure_exactness(steps, seed=common.seed),
        "embeddings": lambda: words(EMBEDDING_METHODS, False),
        "classifiers": classifiers,
        "models": lambda: words(MODEL_METHODS, True),
    }
    records: Records = []
    for part in chosen:
        with console.status(f"{part} ..."):
            found = measure[part]()
        if part == "speed":
            count = multiply_adds(num_classes, in_features, BATCH)
            console.print(
                f"arithmetic of a plain step over the factored one: {figure(count['plain'] / count['factored'])}"
            )
        for case in dict.fromkeys(record["case"] for record in found):
            _show(console, case, [record for record in found if record["case"] == case])
        records += found
        common.keep(records)
    if "speed" in chosen:
        console.print("† as remembered; not verified against the paper")
    return records


def _show(console: Console, case: str, records: Records) -> None:
    """A case as a table, and below it which words came out near to each other."""
    print_table(console, _table(case, records))
    for record in records:
        if NEIGHBOURS in record:
            console.print(f"{record['name']}: {record[NEIGHBOURS]}", highlight=False, markup=False)


def _table(case: str, records: Records) -> Table:
    """A case with a column for each of its fields that differs; what is the same in all rows is in the title."""
    first, *others = records
    shown = [name for name in first if name not in NOT_IN_TABLES and any(r[name] is not None for r in records)]
    same = [name for name in shown if others and all(record[name] == first[name] for record in others)]
    said = "".join(f", {name.replace('_', ' ')} {_cell(first[name])}" for name in same)
    claim = f"; the paper, V=793,471, d=300: {CLAIMS[case]}" if case in CLAIMS else ""
    table = Table(title=case + said + claim, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in (name for name in shown if name not in same):
        cells = [_cell(record[name]) for record in records]
        text = any(isinstance(record[name], str) for record in records)
        widest = None if text else max(map(len, cells))  # a figure is never cut
        table.add_column(name.replace("_", " "), justify="left" if text else "right", min_width=widest)
    for record in records:
        table.add_row(*(_cell(record[name]) for name in shown if name not in same))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else figure(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)

"""How the SVD-softmax study is shown: its tables, and each claim beside what was measured for it."""

from typing import Any

from rich.console import Console
from rich.table import Table

from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import print_table

REMEMBERED = "† (as remembered; not verified against the paper)"
Record = dict[str, Any]


def claims(records: list[Record]) -> list[Record]:
    """Each claim, what was measured for it, and under which conditions."""
    by = {(r["kind"], r["window"], r["candidates_share"]): r for r in records if r["case"] == "quality"}
    speeds = [r for r in records if r["case"] == "speed"]
    plain, tuned = by["plain", "d/8", 0.05], by["calibrated", "d/8", 0.05]
    said = "operations: perplexity {} against {} of the full softmax, KL {}, {:.1%} of the top 10"
    figures = [
        f"{r['operations']:.0%} of the "
        + said.format(*map(figure, (r["perplexity"], r["full_perplexity"], r["kl"])), r["coverage"])
        for r in (plain, tuned)
    ]
    setting = "window d/8, 5% of the classes"
    found = [
        ("about a fifth of the operations keeps the quality [paper: abstract]", figures[0], f"plain, {setting}"),
        ("none: calibration is no part of the paper", figures[1], f"calibrated, {setting}"),
    ]
    if speeds:
        near = min(speeds, key=lambda r: abs(r["num_classes"] - 2**18))
        for claim, r in (
            ("more than 3 times as fast at V = 800,000 on a GPU [paper: abstract]", speeds[-1]),
            (f"V of about 2^18 on a CPU: from 1541 to 189 ms {REMEMBERED}", near),
        ):
            times = f"{figure(r['ratio'])} times as fast, from {figure(r['full_ms'])} to {figure(r['ms'])} ms"
            threads = f"{r['threads']} CPU threads"
            found.append((claim, times, f"V = {r['num_classes']:,}, d = {r['width']}, one query, {threads}"))
    return [{"case": "claim", "claim": c, "measured": m, "conditions": w} for c, m, w in found]


def show(records: list[Record], console: Console) -> None:
    """Both tables, then the claims."""
    table = Table(title="Quality", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("window", "candidates", "operations", "perplexity", "KL", "top 10 kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in records:
        if r["case"] == "quality":
            shown = f"{r['operations']:.1%}", figure(r["perplexity"]), figure(r["kl"]), f"{r['coverage']:.1%}"
            table.add_row(f"{r['window']} {r['kind']}", f"{r['candidates_share']:.0%}", *shown)
    print_table(console, table)
    speeds = [r for r in records if r["case"] == "speed"]
    if speeds:
        print_table(console, _speed_table(speeds))
    for r in records:
        if r["case"] == "claim":
            said = f"claimed:  {r['claim']}\nmeasured: {r['measured']}\n          ({r['conditions']})\n"
            console.print(said, highlight=False, markup=False, soft_wrap=True)


def _speed_table(speeds: list[Record]) -> Table:
    table = Table(title="Time of one query", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("classes", "full ms", "SVD ms", "times as fast", "bytes", "exact int8 ms", "times as fast"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in speeds:
        shown = figure(r["full_ms"]), figure(r["ms"]), figure(r["ratio"]), f"{r['bytes_read_fraction']:.1%}"
        shown += figure(r["int8_exact_ms"]), figure(r["int8_exact_ratio"])
        table.add_row(f"{r['num_classes']:,}", *shown)
    return table

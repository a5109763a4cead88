"""Writes docs/benchmarks.md: the figures of every file in benchmarks/results on one page, by processor."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lastlayer.study.report.figures import counted, figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
LONG = 16  # rows, from which a table is folded
HEADINGS = {
    "num_classes": "V",
    "in_features": "d",
    "batch": "N",
    "peak_bytes": "peak MB",
    "layer": "name",
    "ms": "ms",
    "low_ms": "low",
    "high_ms": "high",
}
SHARES = (
    *("share", "fraction", "coverage", "accuracy", "agreement", "recall"),
    *("certified", "certified_before_widening", "identical", "same_classes", "identical_in_order"),
)
INTRO = """# Benchmarks by processor

All figures of `benchmarks/results`: a section for each processor, a heading for each file.
`python benchmarks/page.py` writes this page from the files.

V classes, d features, N rows. `ms` is the median of runs that are interleaved with the others of their table in
one process; `low` and `high` are quartiles unless a note says otherwise; MB are beyond the parameters. The
machines were shared with other work: compare the figures of one table with each other, not with those of another.
What they mean is said on the page of each layer.
"""

Record = dict[str, Any]


def page(files: Iterable[Path]) -> str:
    """The whole page; processors whose kernels are known come before those of earlier versions."""
    sections: dict[str, list[str]] = {}
    for path in sorted(files):
        results = json.loads(path.read_text(encoding="utf-8"))
        sections.setdefault(processor(results["environment"]), []).append(_section(path, results))
    known = sorted(sections, key=lambda name: ("before the compiled" in name, name))
    return "\n".join([INTRO, *(f"## {name}\n\n" + "\n".join(sections[name]) for name in known)])


def processor(environment: Record) -> str:
    """The machine, and which kernels it ran."""
    machine = environment["gpu"] or environment["machine"].replace("(R)", "").removesuffix(" Processor")
    if "isa" not in environment:
        return f"{machine}, before the compiled engine"
    return f"{machine}, {environment['isa'] or 'plain PyTorch'}"


def _section(path: Path, results: Record) -> str:
    """One file: what it is, where it is from, and its tables."""
    where, notes = results["environment"], results.get("notes") or ""
    command = " ".join(Path(part).name for part in where["command"].split())  # without the folders of one machine
    parts = [
        f"### {path.stem.replace('_', ' ')}",
        f"`benchmarks/results/{path.name}`: `{command}`, {counted(where['threads'], 'thread')}, "
        f"PyTorch {where['torch'].split('+')[0]}, commit {where['commit'] or 'not recorded'}, "
        f"{where['time'][:10]}." + (f" {notes[0].upper()}{notes[1:].rstrip('.')}." if notes else ""),
    ]
    for records in _groups(results["records"]):
        parts += _table(records)
    return "\n\n".join(parts) + "\n"


def _groups(records: list[Record]) -> list[list[Record]]:
    """The records of one case, and with the same fields, are one table."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        fields = tuple(name for name, value in record.items() if _is_shown(name, value))
        groups.setdefault((record.get("case"), record.get("part"), *fields), []).append(record)
    return list(groups.values())


def _is_shown(name: str, value: Any) -> bool:
    """Curves, and lists of words, are left to the file."""
    nested = isinstance(value, list) and any(isinstance(item, dict | list) for item in value)
    return not nested and not isinstance(value, dict) and name not in ("case", "part", "neighbours", "text")


def _is_setting(name: str, value: Any) -> bool:
    """Whether a field says what was measured, not what came out."""
    measured = isinstance(value, float) and name != "learning_rate"
    return not measured and name not in ("name", "layer") and not name.endswith("bytes")


def _table(records: list[Record]) -> list[str]:
    """What is the same in all rows stands above the table."""
    first = records[0]
    names = [name for name, value in first.items() if _is_shown(name, value)]
    if "name" in names and "layer" in names:
        names.remove("layer")  # the same
    alike = [
        name
        for name in names
        if len(records) > 1 and _is_setting(name, first[name]) and all(r[name] == first[name] for r in records)
    ]
    columns = [name for name in names if name not in alike]
    case = first.get("case") or first.get("part")
    said = [f"{_heading(name)} {_cell(name, first[name])}" for name in alike if first[name] is not None]
    title = ", ".join(([f"**{case}**"] if case else []) + said)
    rows = [[_cell(name, record[name]) for name in columns] for record in records]
    lines = [[_heading(name) for name in columns], ["---"] * len(columns), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    parts = [title] if title else []
    if len(records) < LONG:
        return [*parts, table]
    summary = f"<summary>{counted(len(records), 'row')}</summary>"
    return [*parts, f'<details markdown="1">{summary}', table, "</details>"]


def _heading(name: str) -> str:
    if name.endswith("_bytes") and name not in HEADINGS:
        return f"{name.removesuffix('_bytes').replace('_', ' ')} MB"
    return HEADINGS.get(name, name.replace("_", " "))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_cell(name, item) for item in value)
    if not isinstance(value, int | float):
        return str(value).replace("|", "\\|")
    if name.endswith("bytes"):
        return figure(value / 1e6)
    if name.endswith(SHARES) and 0 <= value <= 1:
        return f"{value:.4g}" if isinstance(value, int) else f"{100 * value:.4g}%"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else figure(value)


if __name__ == "__main__":
    PAGE.write_text(page(RESULTS.glob("*.json")), encoding="utf-8")

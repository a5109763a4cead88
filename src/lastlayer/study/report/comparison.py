"""What a comparison found: a table in the terminal, results.json, and a page."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lastlayer.study.choices import CHOICES
from lastlayer.study.files import write_json, write_text
from lastlayer.study.measuring.measure import environment
from lastlayer.study.report.figures import figure
from lastlayer.study.report.page import render, screen_remark
from lastlayer.study.report.quality import why_no_perplexity
from lastlayer.study.report.tables import Column, print_table, say
from lastlayer.study.training.trainer import Point

PERPLEXITY: Column = ("perplexity", lambda r: "-" if r["perplexity"] is None else figure(r["perplexity"]))
COSTS: tuple[Column, ...] = (  # UNIT stands for words, characters, tokens or items
    ("UNIT/s", lambda r: figure(r["tokens_per_second"])),
    ("layer\nms/step", lambda r: figure(r["output_layer_ms"])),
    ("query\nms", lambda r: figure(r["query_ms"])),
    ("screen\nms", lambda r: "-" if r["screened_query_ms"] is None else figure(r["screened_query_ms"])),
)
OF_TEXT: tuple[Column, ...] = (
    PERPLEXITY,
    ("top-10", lambda r: f"{r['top10_accuracy']:.1%}"),
    *COSTS,
    ("step\nMB", lambda r: figure(r["peak_bytes"] / 1e6)),
    ("params\nM", lambda r: figure(r["parameters"] / 1e6)),
)
OF_ITEMS: tuple[Column, ...] = (
    PERPLEXITY,
    ("recall\n@10", lambda r: f"{r['top10_accuracy']:.3f}"),
    ("NDCG\n@10", lambda r: f"{r['ndcg10']:.3f}"),
    ("MRR\n@10", lambda r: f"{r['mrr10']:.3f}"),
    *COSTS,
)


@dataclass(frozen=True)
class Report:
    """Everything that is shown of a comparison; records are sorted, the best first."""

    text: dict[str, Any]
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    curves: dict[str, list[Point]]

    def as_json(self) -> dict[str, Any]:
        """The content of results.json, from which the page is made."""
        return {
            "environment": environment(),
            "text": self.text,
            "settings": self.settings,
            "layers": {name: CHOICES[name].description for name in self.curves},
            "records": self.records,
            "curves": {name: [asdict(point) for point in curve] for name, curve in self.curves.items()},
        }


def write_report(out: Path, report: Report) -> None:
    """Writes `results.json` and `index.html` into `out`."""
    content = report.as_json()
    write_json(out / "results.json", content)
    write_text(out / "index.html", render(content))


def show(report: Report, out: Path, console: Console) -> None:
    """Prints the table, and where the page is."""
    unit = report.text["unit"]
    title = f"{report.text['name']}, {report.text['num_classes']:,} different {unit}"
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    columns = OF_ITEMS if "sequences" in report.text else OF_TEXT
    for heading, _ in columns:
        table.add_column(heading.replace("UNIT", unit), justify="right", no_wrap=True)
    for record in report.records:
        style = "bold" if record is report.records[0] and len(report.records) > 1 else None  # the best
        table.add_row(record["layer"], *(shown(record) for _, shown in columns), style=style)
    print_table(console, table)
    for record in report.records:
        if reason := why_no_perplexity(record, unit):
            say(console, f"{record['layer']} has no perplexity: {reason}")
        if remark := screen_remark(record):
            say(console, f"{record['layer']}, screened: {remark}")
    say(console, f"The page: {out / 'index.html'}")

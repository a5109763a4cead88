"""The page of the screens that were tried for a layer: the frontier of time and agreement, and every figure."""

from html import escape
from pathlib import Path

from lastlayer.screening import ScreenedSoftmax
from lastlayer.study.files import Record, write_text
from lastlayer.study.measuring.measure import environment
from lastlayer.study.report.charts import NARROW, WIDE, Point, scatter_chart
from lastlayer.study.report.document import document, machine, sorted_table, versions
from lastlayer.study.report.verdict import measures, screen_name, verdict

LEGEND = (
    '<p class="quiet">Squares: every result is proved; circles: not. Ring: the chosen one. Stepped line: the '
    "frontier, what agreement is to be had for a time. Dashed: the full layer's time. Dotted: the agreement "
    "required. Numbers: the rows of the table.</p>"
)


def save_frontier(
    screen: ScreenedSoftmax, records: list[Record], path: str | Path, *, agreement: float = 0.999, k: int = 1
) -> None:
    """Writes what `choose_screen` found as a page: one file that any browser shows, with no other.

    Args:
        screen, records: what `choose_screen` returned.
        path: of the page, such as "screens.html".
        agreement, k: what `choose_screen` was called with.

    Raises:
        StudyError: the file cannot be written.
        ImportError: matplotlib and rich are not installed: `pip install 'lastlayer[cli]'`.

    >>> import torch
    >>> from lastlayer import choose_screen
    >>> from lastlayer.study.report.frontier_page import save_frontier
    >>> screen, records = choose_screen(torch.randn(2000, 32), None, torch.randn(64, 32))
    >>> save_frontier(screen, records, "screens.html")
    """
    classes, width = screen.weight.shape
    head = {"name": f"{classes:,} classes, width {width}", "bytes": screen.weight.nbytes}
    write_text(Path(path), render_frontier(report(head, records, agreement, k)))


def report(head: Record, records: list[Record], agreement: float, k: int, source: str | None = None) -> Record:
    """The content of `results.json`, from which the page is made."""
    settings = {"head": head, "source": source, "agreement": agreement, "k": k}
    return {"environment": environment(), **settings, "records": records}


def render_frontier(results: Record) -> str:
    """The whole page."""
    records, head, where = results["records"], results["head"], results["environment"]
    tried = [record for record in records if record["ms"] is not None]
    names = [f"{number} {screen_name(record)}" for number, record in enumerate(tried, 1)]
    winner = next(i for i, record in enumerate(tried) if record["chosen"])
    source = f" Hidden states: {escape(results['source'])}." if results["source"] else ""
    sections = [
        f"<h1>Which screen for {escape(head['name'])}?</h1>",
        f'<p class="answer">{escape(verdict(records, head["bytes"], results["agreement"]))}</p>',
        f'<p class="quiet">One query of the {results["k"]:,} best at a time, on {escape(machine(where))}.'
        f"{source}</p>",
        _picture(tried, results["agreement"]),
        "<h2>All figures</h2>",
        sorted_table("screen", names, tried, measures(results["k"]), winner),
        _left_out(records, names),
        "<h2>How this was measured</h2>",
        "<p>Half of the hidden states calibrates and tunes, the other half, seen by neither, is measured: "
        "agreement with the full layer's best classes, divergence from its probabilities, share proved. "
        "Times are medians of one query at a time, the screens and the full layer interleaved.</p>",
        f"<p>Machine: {escape(machine(where))}; {escape(versions(where))}.</p>",
        f"<p>Command: <code>{escape(where['command'])}</code></p>",
    ]
    return document(f"lastlayer: screens for {head['name']}", sections)


def _picture(tried: list[Record], agreement: float) -> str:
    """The measured screens; those that were dropped have no agreement."""
    points = [
        Point(
            number,
            record["ms"],
            1 - record["agreement_topk"],
            proved=record["certified_fraction"] == 1,
            chosen=record["chosen"],
        )
        for number, record in enumerate(tried, 1)
        if record["agreement_topk"] is not None
    ]
    full_ms, label = tried[0]["full_ms"], "agreement against time"
    wide = scatter_chart(points, full_ms, 1 - agreement, label, width=WIDE, height=380, css="wide")
    narrow = scatter_chart(points, full_ms, 1 - agreement, label, width=NARROW, height=320, css="narrow")
    return (
        '<figure><figcaption>Best classes found, against time <span class="quiet">up and left is better</span>'
        f"</figcaption>\n{wide}\n{narrow}\n{LEGEND}</figure>"
    )


def _left_out(records: list[Record], names: list[str]) -> str:
    """Why some screens have no agreement, and which were not tried."""
    tried = [record for record in records if record["ms"] is not None]
    said = [f"{name}: {r['dropped']}" for name, r in zip(names, tried, strict=True) if r["dropped"]]
    said += [f"{screen_name(record)}: {record['dropped']}" for record in records if record["ms"] is None]
    if not said:
        return ""
    return f'<p class="quiet">Left out: {escape("; ".join(said))}.</p>'

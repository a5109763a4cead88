"""The learning curves of a comparison, against time and against what was read, with a switch between them."""

from html import escape
from typing import Any

from lastlayer.study.report.chart import Line, line_chart, useful_top
from lastlayer.study.report.measures import unit_of
from lastlayer.study.report.page_style import NARROW, WIDE
from lastlayer.study.report.quality import why_no_perplexity
from lastlayer.study.training.trainer import CURVE_TOKENS

SWITCH = (
    '<div class="switch" role="radiogroup" aria-label="Horizontal axis">against'
    '<label><input type="radio" name="axis" value="time" checked>time</label>'
    '<label><input type="radio" name="axis" value="read">{unit} read</label></div>'
)


def learning_curves(results: dict[str, Any], colours: dict[str, int]) -> str:
    """Two measurements, each called by its name: the curve on few tokens, its end on all of them.

    The switch works by style alone: radio buttons, and `:has` of the figure that holds them. Layers without a
    perplexity are named below, and why; where there is none with one there is no picture.
    """
    unit = unit_of(results["text"])
    seconds = _lines(results, colours, "seconds", 1)
    absent = _without_perplexity(results["records"], unit)
    if not seconds:
        return f'<p class="quiet">{absent}</p>'
    scale, word = _scale(max(point["tokens"] for curve in results["curves"].values() for point in curve))
    read = _lines(results, colours, "tokens", scale)
    tokens = max(record["held_out_tokens"] for record in results["records"])
    few = min(CURVE_TOKENS, tokens)
    said = (
        f"Lines: during training, on the first {few:,} held-out {unit}. Diamonds: at the end, on {tokens:,}: "
        "the figures above."
    )
    cut = useful_top(seconds) < max(y for line in seconds for _, y in line.points)
    said += " The beginning, far worse, is cut off." if cut else ""
    said += f" {absent}" if absent else ""
    return (
        '<figure class="curves"><figcaption>Held-out perplexity <span class="quiet">lower is better</span>'
        f"</figcaption>\n{SWITCH.format(unit=escape(unit))}\n"
        f'<div class="over-time">{_charts(seconds, "seconds of training", "time")}</div>\n'
        f'<div class="over-read">{_charts(read, f"{word}{unit} read", "read")}</div>\n'
        f'<p class="quiet">{said}</p></figure>'
    )


def _lines(results: dict[str, Any], colours: dict[str, int], axis: str, scale: float) -> list[Line]:
    ends = {record["layer"]: record for record in results["records"]}
    lines = []
    for name, curve in results["curves"].items():
        end = ends[name]["perplexity"]
        points = [(p[axis] / scale, p["perplexity"]) for p in curve if p["perplexity"] is not None]
        if end is not None and points:
            lines.append(Line(name, colours[name], points, end))
    return lines


def _without_perplexity(records: list[dict[str, Any]], unit: str) -> str:
    """Which layers have none, and why."""
    reasons = [(record["layer"], why_no_perplexity(record, unit)) for record in records]
    said = "; ".join(escape(f"{name}: {reason}") for name, reason in reasons if reason)
    return f"Without a perplexity: {said}." if said else ""


def _scale(most: float) -> tuple[float, str]:
    """A unit in which ticks are short."""
    return (1e6, "million ") if most >= 2e6 else (1e3, "thousand ") if most >= 2e3 else (1, "")


def _charts(lines: list[Line], x_label: str, axis: str) -> str:
    """The same chart for a wide and for a narrow screen."""
    labels: dict[str, Any] = {"x_label": x_label, "y_label": f"held-out perplexity over {x_label}"}
    wide = line_chart(lines, width=WIDE, height=340, css="wide", key=f"wide-{axis}", **labels)
    narrow = line_chart(
        lines, width=NARROW, height=320, css="narrow", key=f"narrow-{axis}", figures=False, **labels
    )
    return f"{wide}\n{narrow}"

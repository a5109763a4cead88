"""The page of a comparison: one file with everything in it, made from the content of results.json."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from lastlayer.study.report.chart import Line, line_chart
from lastlayer.study.report.figures import counted, figure
from lastlayer.study.report.page_style import COLOURS, STYLE

Record = dict[str, Any]


@dataclass(frozen=True)
class Measure:
    """One group of bars: a figure of every layer."""

    title: str
    note: str
    value: Callable[[Record], float | None]
    shown: Callable[[float], str]


def _ms(value: float) -> str:
    return f"{figure(value)} ms"


MEASURES = (
    Measure("Perplexity", "held-out text; lower is better", lambda r: r["perplexity"], figure),
    Measure(
        "Top-10 accuracy",
        "next word among the ten best; higher is better",
        lambda r: r["top10_accuracy"],
        lambda v: f"{v:.1%}",
    ),
    Measure(
        "Training speed",
        "words a second; higher is better",
        lambda r: r["tokens_per_second"],
        figure,
    ),
    Measure(
        "Output layer, one step",
        "forward, backward, update; lower is better",
        lambda r: r["output_layer_ms"],
        _ms,
    ),
    Measure(
        "Memory of that step",
        "beyond the parameters; lower is better",
        lambda r: r["peak_bytes"] / 1e6,
        lambda v: f"{figure(v)} MB",
    ),
)


def render(results: dict[str, Any]) -> str:
    """The whole page; no script, no font, no picture from elsewhere."""
    records = results["records"]
    colours = {name: i % COLOURS for i, name in enumerate(results["layers"])}
    text, settings = results["text"], results["settings"]
    sections = [
        f"<h1>Which output layer for {escape(text['name'])}?</h1>",
        f'<p class="answer">{_answer(records, settings)}</p>',
        f'<p class="quiet">{text["training_tokens"]:,} words to learn from, {text["num_classes"]:,} different '
        f"ones. Each layer trained the same small language model {_length(settings)} on the same machine.</p>",
        _curves(results, colours),
        '<div class="measures">',
        *(_bars(measure, records, colours) for measure in MEASURES),
        _query_bars(records, colours),
        "</div>",
        "<h2>The layers</h2>",
        _descriptions(results, colours),
        "<h2>All figures</h2>",
        _table(records),
        "<h2>How this was measured</h2>",
        _conditions(results),
    ]
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>lastlayer compare: {escape(text['name'])}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _length(settings: Record) -> str:
    if settings["steps"] is not None:
        return f"for {settings['steps']:,} steps"
    return f"for {settings['seconds']:g} seconds of training"


def _answer(records: list[Record], settings: Record) -> str:
    """The one sentence for who reads no further; records are sorted, the best first."""
    best = records[0]
    said = (
        f"After {_length(settings).removeprefix('for ')}, <b>{escape(best['layer'])}</b> predicts the next word "
        f"best: perplexity <b>{figure(best['perplexity'])}</b>"
    )
    if len(records) == 1:
        return f"{said}."
    others = ", ".join(f"{escape(r['layer'])} {figure(r['perplexity'])}" for r in records[1:])
    return f"{said}, against {others}."


def _curves(results: dict[str, Any], colours: dict[str, int]) -> str:
    lines = [
        Line(name, colours[name], [(p["seconds"], p["perplexity"]) for p in curve])
        for name, curve in results["curves"].items()
    ]
    labels: dict[str, Any] = {
        "x_label": "seconds of training",
        "y_label": "held-out perplexity over training time",
    }
    labels["cap"] = results["text"]["num_classes"]  # worse than a guess at random: not worth the room
    wide = line_chart(lines, width=760, height=340, css="wide", **labels)
    narrow = line_chart(lines, width=380, height=300, css="narrow", **labels)
    return (
        '<figure><figcaption>Held-out perplexity over training time <span class="quiet">lower is better</span>'
        f"</figcaption>\n{wide}\n{narrow}</figure>"
    )


def _bars(measure: Measure, records: list[Record], colours: dict[str, int]) -> str:
    values = [(r["layer"], measure.value(r), colours[r["layer"]]) for r in records]
    return _bar_group(measure.title, measure.note, values, measure.shown)


def _query_bars(records: list[Record], colours: dict[str, int]) -> str:
    values: list[tuple[str, float | None, int]] = []
    for r in records:
        values.append((r["layer"], r["query_ms"], colours[r["layer"]]))
        if r["screened_query_ms"] is not None:
            values.append((f"{r['layer']}, screened", r["screened_query_ms"], colours[r["layer"]]))
    return _bar_group("One query", "the ten best next words; lower is better", values, _ms)


def _bar_group(
    title: str, note: str, values: list[tuple[str, float | None, int]], shown: Callable[[float], str]
) -> str:
    most = max((value for _, value, _ in values if value is not None), default=0.0) or 1.0
    rows = [
        f'<div class="row"><span>{escape(name)}</span><span class="value">{shown(value)}</span>'
        f'<div class="bar fill-{colour}" style="width:{max(0.5, 100 * value / most):.1f}%"></div></div>'
        for name, value, colour in values
        if value is not None
    ]
    return f'<section><h3>{escape(title)}</h3><p class="quiet">{escape(note)}</p>{"".join(rows)}</section>'


def _descriptions(results: dict[str, Any], colours: dict[str, int]) -> str:
    rows = [
        f'<dt><i class="fill-{colours[name]}"></i>{escape(name)}</dt><dd>{escape(description)}</dd>'
        for name, description in results["layers"].items()
    ]
    return f"<dl>{''.join(rows)}</dl>"


def _table(records: list[Record]) -> str:
    columns: list[tuple[str, Callable[[Record], str]]] = [
        ("layer", lambda r: escape(r["layer"])),
        ("perplexity", lambda r: figure(r["perplexity"])),
        ("top-10", lambda r: f"{r['top10_accuracy']:.1%}"),
        ("words seen", lambda r: f"{r['tokens']:,}"),
        ("words/s", lambda r: figure(r["tokens_per_second"])),
        ("layer step ms", lambda r: figure(r["output_layer_ms"])),
        ("query ms", lambda r: figure(r["query_ms"])),
        ("screened ms", lambda r: "-" if r["screened_query_ms"] is None else figure(r["screened_query_ms"])),
        ("same ten", lambda r: "-" if r["screened_agreement"] is None else f"{r['screened_agreement']:.0%}"),
        ("step MB", lambda r: figure(r["peak_bytes"] / 1e6)),
        ("million parameters", lambda r: figure(r["parameters"] / 1e6)),
    ]
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in columns)
    rows = "".join(f"<tr>{''.join(f'<td>{cell(r)}</td>' for _, cell in columns)}</tr>" for r in records)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _conditions(results: dict[str, Any]) -> str:
    where, settings, first = results["environment"], results["settings"], results["records"][0]
    device = (
        where["gpu"]
        if settings["device"] != "cpu"
        else f"{where['machine']}, {counted(where['threads'], 'thread')}"
    )
    return (
        f"<p>Machine: {escape(str(device))}; PyTorch {escape(str(where['torch']))}, lastlayer "
        f"{escape(str(where['lastlayer']))}, commit {escape(str(where['commit']))}, {escape(where['time'])}.</p>"
        f"<p>Model: embedding, one LSTM and the output layer, {settings['width']} wide; batches of "
        f"{first['batch']:,} words, in order; Adam for the LSTM, Adagrad for embedding and output layer, the same "
        "rates for every layer. Only training counts as time, not evaluation. Perplexity is taken from each "
        f"layer's own exact probabilities on {first['held_out_tokens']:,} held-out words (the curve on fewer), "
        f"the ten best on {first['top10_tokens']:,}. Step and query are medians of interleaved runs on the "
        "trained layers.</p>"
        f"<p>Command: <code>{escape(where['command'])}</code></p>"
    )

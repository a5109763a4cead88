"""The page of a comparison, made from the content of results.json."""

from html import escape
from typing import Any

from lastlayer.study.files import Record
from lastlayer.study.report.charts import NARROW, WIDE, Line, are_alike, bar_chart, line_chart, useful_top
from lastlayer.study.report.comparison import (
    have_perplexities,
    measures,
    of_items,
    remarks,
    unit_of,
)
from lastlayer.study.report.document import document, machine, sorted_table, versions
from lastlayer.study.report.figures import Measure, figure
from lastlayer.study.report.page_style import COLOURS
from lastlayer.study.training.trainer import CURVE_TOKENS

Results = dict[str, Any]
SWITCH = (
    '<div class="switch" role="radiogroup" aria-label="Horizontal axis">against'
    '<label><input type="radio" name="axis" value="time" checked>time</label>'
    '<label><input type="radio" name="axis" value="read">{unit} read</label></div>'
)


def render(results: Results) -> str:
    """The whole page."""
    records, text, settings = results["records"], results["text"], results["settings"]
    unit, names = unit_of(text), [record["layer"] for record in records]
    shown = measures(text, records)
    sections = [
        f"<h1>Which output layer for {escape(text['name'])}?</h1>",
        f'<p class="answer">{_answer(records, settings, unit)}</p>',
        f'<p class="quiet">{text["training_tokens"]:,} {unit} to learn from, {text["num_classes"]:,} different '
        f"ones{_sequences(text)}. Each layer trained the same small language model {_length(settings)} "
        f"on one machine ({escape(machine(results['environment'], settings['device']))}).</p>",
        _learning_curves(results),
        '<p class="quiet">' + "".join(f"{escape(remark)}. " for remark in remarks(records, unit)) + "</p>",
        '<div class="measures">',
        *(_bars(measure, results) for measure in shown if measure.note),
        "</div>",
        "<h2>The layers</h2>",
        _descriptions(results),
        "<h2>All figures</h2>",
        sorted_table("layer", names, records, shown, 0 if len(records) > 1 else None),
        "<h2>How this was measured</h2>",
        _conditions(results),
    ]
    return document(f"lastlayer compare: {text['name']}", sections)


def _sequences(text: Record) -> str:
    return f", in {text['sequences']:,} sequences" if of_items(text) else ""


def _length(settings: Record) -> str:
    if settings["steps"] is not None:
        return f"for {settings['steps']:,} steps"
    return f"for {settings['seconds']:g} seconds of training"


def _answer(records: list[Record], settings: Record, unit: str) -> str:
    """The one sentence for who reads no further; records are sorted, the best first."""
    after = f"After {_length(settings).removeprefix('for ')}, <b>{escape(records[0]['layer'])}</b>"
    if have_perplexities(records):
        said, shown = f"predicts the next {unit[:-1]} best: perplexity", [figure(r["perplexity"]) for r in records]
    else:
        said = f"has the next {unit[:-1]} among its ten best most often:"
        shown = [f"{r['top10_accuracy']:.1%}" for r in records]
    best, *others = shown
    against = ", ".join(f"{escape(r['layer'])} {other}" for r, other in zip(records[1:], others, strict=True))
    return f"{after} {said} <b>{best}</b>{', against ' if others else ''}{against}."


def _learning_curves(results: Results) -> str:
    """Perplexity against time and against what was read, with a switch; nothing where no layer has a perplexity.

    Two measurements, each called by its name: the curve on few tokens, its end on all of them. The switch works by
    style alone: radio buttons, and `:has` of the figure that holds them.
    """
    unit = unit_of(results["text"])
    most = max(point["tokens"] for curve in results["curves"].values() for point in curve)
    scale, word = (1e6, "million ") if most >= 2e6 else (1e3, "thousand ") if most >= 2e3 else (1, "")
    seconds, read = _lines(results, "seconds", 1), _lines(results, "tokens", scale)
    if not seconds:
        return ""
    tokens = max(record["held_out_tokens"] for record in results["records"])
    said = (
        f"Lines: during training, on the first {min(CURVE_TOKENS, tokens):,} held-out {unit}. "
        f"Diamonds: at the end, on {tokens:,}: the figures above."
    )
    if useful_top(seconds) < max(y for line in seconds for _, y in line.points):
        said += " The beginning, far worse, is cut off."
    return (
        '<figure class="curves"><figcaption>Held-out perplexity <span class="quiet">lower is better</span>'
        f"</figcaption>\n{SWITCH.format(unit=escape(unit))}\n"
        f'<div class="over-time">{_charts(seconds, "seconds of training")}</div>\n'
        f'<div class="over-read">{_charts(read, f"{word}{unit} read")}</div>\n'
        f'<p class="quiet">{said}</p></figure>'
    )


def _lines(results: Results, axis: str, scale: float) -> list[Line]:
    """The curves of the layers that have a perplexity."""
    ends = {record["layer"]: record["perplexity"] for record in results["records"]}
    lines = []
    for number, name in enumerate(results["layers"]):
        curve = results["curves"][name]
        points = [(p[axis] / scale, p["perplexity"]) for p in curve if p["perplexity"] is not None]
        if ends[name] is not None and points:
            lines.append(Line(name, number, points, ends[name]))
    return lines


def _charts(lines: list[Line], x_label: str) -> str:
    """The same chart for a wide and for a narrow screen."""
    label = f"held-out perplexity over {x_label}"
    wide = line_chart(lines, x_label, label, width=WIDE, css="wide")
    return f"{wide}\n{line_chart(lines, x_label, label, width=NARROW, css='narrow')}"


def _bars(measure: Measure, results: Results) -> str:
    """A card with the figure of every layer that has it, the best one marked."""
    records = [record for record in results["records"] if measure.value(record) is not None]
    numbers = list(results["layers"])
    note = f"{measure.note}; {measure.better} is better"
    values = [float(measure.value(record) or 0) for record in records]
    if are_alike(values):
        note += "; the scale does not start at zero"
    drawn = bar_chart(
        [record["layer"] for record in records],
        values,
        [measure.text(record) for record in records],
        [numbers.index(record["layer"]) for record in records],
        measure.best(records),
        measure.title,
    )
    title = measure.title[0].upper() + measure.title[1:]
    return f'<section><h3>{escape(title)}</h3><p class="quiet">{escape(note)}</p>{drawn}</section>'


def _descriptions(results: Results) -> str:
    rows = [
        f'<dt><i style="background:var(--c{number % COLOURS})"></i>{escape(name)}</dt><dd>{escape(said)}</dd>'
        for number, (name, said) in enumerate(results["layers"].items())
    ]
    return f"<dl>{''.join(rows)}</dl>"


def _batches(results: Results) -> str:
    """What a training step takes."""
    if of_items(results["text"]):
        return f"batches of {results['settings']['batch']} sequences, shuffled, each from its beginning"
    return f"batches of {results['records'][0]['batch']:,} {unit_of(results['text'])}, in order"


def _conditions(results: Results) -> str:
    unit = unit_of(results["text"])
    where, settings, first = results["environment"], results["settings"], results["records"][0]
    return (
        f"<p>Machine: {escape(machine(where, settings['device']))}; {escape(versions(where))}.</p>"
        f"<p>Model: embedding, one LSTM and the output layer, {settings['width']} wide; {_batches(results)}; "
        "Adam for the LSTM, Adagrad for embedding and output layer, the "
        "same rates for every layer. Only training counts as time, not evaluation. Perplexity is taken from each "
        f"layer's own exact probabilities on {first['held_out_tokens']:,} held-out {unit} (the lines of the "
        f"picture on fewer), the ten best on {first['top10_tokens']:,}. Step and query are medians of interleaved "
        "runs on the trained layers.</p>"
        f"<p>Command: <code>{escape(where['command'])}</code></p>"
    )

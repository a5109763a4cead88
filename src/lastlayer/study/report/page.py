"""The page of a comparison: one file with everything in it, made from the content of results.json."""

from html import escape
from typing import Any

from lastlayer.study.files import Record
from lastlayer.study.report.bars import Bar, bar_group
from lastlayer.study.report.curves import learning_curves
from lastlayer.study.report.document import document, machine, versions
from lastlayer.study.report.figures import figure
from lastlayer.study.report.measures import columns, measures, milliseconds, of_items, unit_of
from lastlayer.study.report.page_style import COLOURS
from lastlayer.study.report.quality import have_perplexities
from lastlayer.study.report.sorted_table import Measure, sorted_table


def render(results: dict[str, Any]) -> str:
    """The whole page."""
    records = results["records"]
    colours = {name: i % COLOURS for i, name in enumerate(results["layers"])}
    text, settings = results["text"], results["settings"]
    unit, names = unit_of(text), [record["layer"] for record in records]
    sections = [
        f"<h1>Which output layer for {escape(text['name'])}?</h1>",
        f'<p class="answer">{_answer(records, settings, unit)}</p>',
        f'<p class="quiet">{text["training_tokens"]:,} {unit} to learn from, {text["num_classes"]:,} different '
        f"ones{_sequences(text)}. Each layer trained the same small language model {_length(settings)} "
        f"on one machine ({escape(machine(results['environment'], settings['device']))}).</p>",
        learning_curves(results, colours),
        '<div class="measures">',
        *(_bars(measure, records, colours) for measure in measures(text, records)),
        _query_bars(records, colours, unit),
        "</div>",
        "<h2>The layers</h2>",
        _descriptions(results, colours),
        "<h2>All figures</h2>",
        sorted_table("layer", names, records, columns(text, records), 0 if len(records) > 1 else None),
        "<h2>How this was measured</h2>",
        _conditions(results),
    ]
    return document(f"lastlayer compare: {text['name']}", sections)


def _sequences(text: dict[str, Any]) -> str:
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


def _bars(measure: Measure, records: list[Record], colours: dict[str, int]) -> str:
    bars = [Bar(r["layer"], measure.value(r), colours[r["layer"]]) for r in records]
    return bar_group(measure.title, measure.note, bars, measure.shown, lower_is_better=measure.lower_is_better)


def _query_bars(records: list[Record], colours: dict[str, int], unit: str) -> str:
    bars = []
    for r in records:
        bars.append(Bar(r["layer"], r["query_ms"], colours[r["layer"]]))
        if r["screened_query_ms"] is not None:
            name = f"{r['layer']}, screened"
            bars.append(Bar(name, r["screened_query_ms"], colours[r["layer"]], screen_remark(r)))
    return bar_group(
        "One query", f"the ten best next {unit}; lower is better", bars, milliseconds, lower_is_better=True
    )


def screen_remark(record: Record) -> str:
    """A word on a screen that is slower than the layer that it is to speed up."""
    screened, plain = record["screened_query_ms"], record["query_ms"]
    if screened is None or screened <= plain:
        return ""
    return f"{screened / plain:.1f} times as slow as the layer itself: no screen is needed here"


def _descriptions(results: dict[str, Any], colours: dict[str, int]) -> str:
    rows = [
        f'<dt><i class="fill-{colours[name]}"></i>{escape(name)}</dt><dd>{escape(description)}</dd>'
        for name, description in results["layers"].items()
    ]
    return f"<dl>{''.join(rows)}</dl>"


def _batches(results: dict[str, Any]) -> str:
    """What a training step takes."""
    if of_items(results["text"]):
        return f"batches of {results['settings']['batch']} sequences, shuffled, each from its beginning"
    return f"batches of {results['records'][0]['batch']:,} {unit_of(results['text'])}, in order"


def _conditions(results: dict[str, Any]) -> str:
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

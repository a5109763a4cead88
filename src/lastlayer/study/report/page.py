"""The page of a comparison: one file with everything in it, made from the content of results.json."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from lastlayer.study.report.bars import Bar, bar_group, best_figures
from lastlayer.study.report.chart import Line, line_chart, useful_top
from lastlayer.study.report.figures import counted, figure
from lastlayer.study.report.page_style import COLOURS, STYLE
from lastlayer.study.training.trainer import CURVE_TOKENS

Record = dict[str, Any]
PLACES = (("NDCG@10", "ndcg10"), ("MRR@10", "mrr10"))  # of items: the place among the ten counts


@dataclass(frozen=True)
class Measure:
    """One group of bars, or one column of the table: a figure of every layer."""

    title: str
    note: str
    value: Callable[[Record], float | None]
    shown: Callable[[float], str]
    lower_is_better: bool = True


def _ms(value: float) -> str:
    return f"{figure(value)} ms"


def _measures(text: dict[str, Any]) -> tuple[Measure, ...]:
    unit = _unit(text)
    held_out = "sequences" if _of_items(text) else "text"
    return (
        Measure("Perplexity", f"held-out {held_out}; lower is better", lambda r: r["perplexity"], figure),
        *_rankings(text),
        Measure(
            "Training speed",
            f"{unit} a second; higher is better",
            lambda r: r["tokens_per_second"],
            figure,
            lower_is_better=False,
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


def _of_items(text: dict[str, Any]) -> bool:
    return "sequences" in text


def _unit(text: dict[str, Any]) -> str:
    return text.get("unit", "words")


def _rankings(text: dict[str, Any]) -> tuple[Measure, ...]:
    """How well the ten best contain the next token; of items also at which place they have it."""
    note = f"next {_unit(text)[:-1]} among the ten best; higher is better"
    if not _of_items(text):
        return (
            Measure(
                "Top-10 accuracy", note, lambda r: r["top10_accuracy"], lambda v: f"{v:.1%}", lower_is_better=False
            ),
        )
    named = (("Recall@10", "top10_accuracy", note), *((name, key, "higher is better") for name, key in PLACES))
    return tuple(
        Measure(name, said, lambda r, key=key: r[key], lambda v: f"{v:.4f}", lower_is_better=False)
        for name, key, said in named
    )


def _columns(text: dict[str, Any]) -> tuple[Measure, ...]:
    """Of the table; where nothing is better than anything else there is no note."""
    unit = _unit(text)
    lower, higher = "lower is better", "higher is better"
    return (
        Measure("perplexity", lower, lambda r: r["perplexity"], figure),
        *(replace(measure, note=higher) for measure in _rankings(text)),
        Measure(f"{unit} seen", higher, lambda r: r["tokens"], lambda v: f"{v:,}", lower_is_better=False),
        Measure(f"{unit}/s", higher, lambda r: r["tokens_per_second"], figure, lower_is_better=False),
        Measure("layer step ms", lower, lambda r: r["output_layer_ms"], figure),
        Measure("query ms", lower, lambda r: r["query_ms"], figure),
        Measure("screened ms", lower, lambda r: r["screened_query_ms"], figure),
        Measure("same ten", "", lambda r: r["screened_agreement"], lambda v: f"{v:.0%}"),
        Measure("step MB", lower, lambda r: r["peak_bytes"] / 1e6, figure),
        Measure("million parameters", "", lambda r: r["parameters"] / 1e6, figure),
    )


def render(results: dict[str, Any]) -> str:
    """The whole page; no script, no font, no picture from elsewhere."""
    records = results["records"]
    colours = {name: i % COLOURS for i, name in enumerate(results["layers"])}
    text, settings = results["text"], results["settings"]
    unit = _unit(text)
    sections = [
        f"<h1>Which output layer for {escape(text['name'])}?</h1>",
        f'<p class="answer">{_answer(records, settings, unit)}</p>',
        f'<p class="quiet">{text["training_tokens"]:,} {unit} to learn from, {text["num_classes"]:,} different '
        f"ones{_sequences(text)}. Each layer trained the same small language model {_length(settings)} "
        "on the same machine.</p>",
        _curves(results, colours),
        '<div class="measures">',
        *(_bars(measure, records, colours) for measure in _measures(text)),
        _query_bars(records, colours, unit),
        "</div>",
        "<h2>The layers</h2>",
        _descriptions(results, colours),
        "<h2>All figures</h2>",
        _table(records, text),
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


def _sequences(text: dict[str, Any]) -> str:
    return f", in {text['sequences']:,} sequences" if _of_items(text) else ""


def _length(settings: Record) -> str:
    if settings["steps"] is not None:
        return f"for {settings['steps']:,} steps"
    return f"for {settings['seconds']:g} seconds of training"


def _answer(records: list[Record], settings: Record, unit: str) -> str:
    """The one sentence for who reads no further; records are sorted, the best first."""
    best = records[0]
    said = (
        f"After {_length(settings).removeprefix('for ')}, <b>{escape(best['layer'])}</b> predicts the next "
        f"{unit[:-1]} best: perplexity <b>{figure(best['perplexity'])}</b>"
    )
    if len(records) == 1:
        return f"{said}."
    others = ", ".join(f"{escape(r['layer'])} {figure(r['perplexity'])}" for r in records[1:])
    return f"{said}, against {others}."


def _curves(results: dict[str, Any], colours: dict[str, int]) -> str:
    """Two measurements, each called by its name: the curve on few tokens, its end on all of them."""
    unit = _unit(results["text"])
    ends = {record["layer"]: record for record in results["records"]}
    lines = [
        Line(name, colours[name], [(p["seconds"], p["perplexity"]) for p in curve], ends[name]["perplexity"])
        for name, curve in results["curves"].items()
    ]
    labels: dict[str, Any] = {
        "x_label": "seconds of training",
        "y_label": "held-out perplexity over training time",
    }
    wide = line_chart(lines, width=760, height=340, css="wide", **labels)
    narrow = line_chart(lines, width=380, height=320, css="narrow", figures=False, **labels)
    tokens = max(record["held_out_tokens"] for record in results["records"])
    few = min(CURVE_TOKENS, tokens)
    said = (
        f"Lines: during training, on the first {few:,} held-out {unit}. Diamonds: at the end, on {tokens:,}: "
        "the figures above."
    )
    cut = useful_top(lines) < max(y for line in lines for _, y in line.points)
    said += " The beginning, far worse, is cut off." if cut else ""
    return (
        '<figure><figcaption>Held-out perplexity over training time <span class="quiet">lower is better</span>'
        f'</figcaption>\n{wide}\n{narrow}<p class="quiet">{said}</p></figure>'
    )


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
    return bar_group("One query", f"the ten best next {unit}; lower is better", bars, _ms, lower_is_better=True)


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


def _table(records: list[Record], text: dict[str, Any]) -> str:
    """The first row, and the best figure of each column, are marked."""
    columns = _columns(text)
    head = "".join(f"<th>{escape(column.title)}</th>" for column in columns)
    cells = [_cells(column, records) for column in columns]
    rows = "".join(
        f"<tr{' class=winner' if i == 0 and len(records) > 1 else ''}><td>{escape(record['layer'])}</td>"
        f"{''.join(column[i] for column in cells)}</tr>"
        for i, record in enumerate(records)
    )
    return (
        '<p class="quiet hint">The table is wider than the screen: it scrolls sideways →</p>\n'
        f'<div class="scroll" tabindex="0"><table><thead><tr><th>layer</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
        '<p class="quiet"><b class="best">Best</b> of each column.</p>'
    )


def _cells(column: Measure, records: list[Record]) -> list[str]:
    values = [column.value(record) for record in records]
    known = [value for value in values if value is not None]
    shown = [column.shown(value) for value in known]
    best = best_figures(shown, known, column.lower_is_better) if column.note else set()
    cells = []
    for value in values:
        said = "-" if value is None else column.shown(value)
        cells.append(f'<td><b class="best">{said}</b></td>' if said in best else f"<td>{said}</td>")
    return cells


def _batches(results: dict[str, Any]) -> str:
    """What a training step takes."""
    if _of_items(results["text"]):
        return f"batches of {results['settings']['batch']} sequences, shuffled, each from its beginning"
    return f"batches of {results['records'][0]['batch']:,} {_unit(results['text'])}, in order"


def _kernels(where: Record) -> str:
    """Which kernels ran; older results do not say."""
    if "isa" not in where:
        return ""
    return ", kernels in plain PyTorch" if where["isa"] is None else f", kernels for {where['isa']}"


def _conditions(results: dict[str, Any]) -> str:
    unit = _unit(results["text"])
    where, settings, first = results["environment"], results["settings"], results["records"][0]
    device = (
        where["gpu"]
        if settings["device"] != "cpu"
        else f"{where['machine']}, {counted(where['threads'], 'thread')}"
    )
    return (
        f"<p>Machine: {escape(str(device) + _kernels(where))}; PyTorch {escape(str(where['torch']))}, lastlayer "
        f"{escape(str(where['lastlayer']))}, commit {escape(str(where['commit']))}, {escape(where['time'])}.</p>"
        f"<p>Model: embedding, one LSTM and the output layer, {settings['width']} wide; {_batches(results)}; "
        "Adam for the LSTM, Adagrad for embedding and output layer, the "
        "same rates for every layer. Only training counts as time, not evaluation. Perplexity is taken from each "
        f"layer's own exact probabilities on {first['held_out_tokens']:,} held-out {unit} (the lines of the "
        f"picture on fewer), the ten best on {first['top10_tokens']:,}. Step and query are medians of interleaved "
        "runs on the trained layers.</p>"
        f"<p>Command: <code>{escape(where['command'])}</code></p>"
    )

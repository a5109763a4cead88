"""What a comparison shows of every layer, in words and as a table in the terminal; some have no perplexity."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from lastlayer.study.files import Record
from lastlayer.study.report.figures import Measure, figure, percent
from lastlayer.study.report.tables import say, show_measures


def of_items(text: dict[str, Any]) -> bool:
    """Whether the data is sequences of items, where the place among the ten best counts too."""
    return "sequences" in text


def unit_of(text: dict[str, Any]) -> str:
    """What a token is: words, characters, tokens or items."""
    return text.get("unit", "words")


def measures(text: dict[str, Any], records: list[Record]) -> list[Measure]:
    """The figures of every layer, without those that none has."""
    unit = unit_of(text)
    found = [
        Measure("perplexity", lambda r: r["perplexity"], figure, note=f"on held-out {unit}"),
        Measure(
            "zero probability",
            lambda r: zero_share(r) or None,
            percent,
            note=f"share of held-out {unit} of probability 0",
            brief=False,
        ),
        *_rankings(text),
        Measure(f"{unit} seen", lambda r: r["tokens"], lambda v: f"{v:,}", "higher", brief=False),
        Measure(f"{unit}/s", lambda r: r["tokens_per_second"], figure, "higher", note="training speed"),
        Measure(
            "layer step ms",
            lambda r: r["output_layer_ms"],
            figure,
            note="forward, backward and update of the output layer",
        ),
        Measure("query ms", lambda r: r["query_ms"], figure, note=f"the ten best next {unit}"),
        Measure("screen ms", lambda r: r["screened_query_ms"], figure, note="the same, through a screen"),
        Measure("same ten", lambda r: r["screened_agreement"], lambda v: f"{v:.0%}", "", brief=False),
        Measure(
            "step MB",
            lambda r: r["peak_bytes"] / 1e6,
            figure,
            note="memory of a layer step beyond the parameters",
            brief=not of_items(text),
        ),
        Measure(
            "million parameters", lambda r: r["parameters"] / 1e6, figure, better="", brief=not of_items(text)
        ),
    ]
    return [measure for measure in found if any(measure.value(record) is not None for record in records)]


def _rankings(text: dict[str, Any]) -> list[Measure]:
    """How well the ten best contain the next token; of items also at which place they have it."""
    note = f"next {unit_of(text)[:-1]} among the ten best"
    if not of_items(text):
        return [Measure("top-10", lambda r: r["top10_accuracy"], lambda v: f"{v:.1%}", "higher", note=note)]
    named = (("recall@10", "top10_accuracy", note), ("NDCG@10", "ndcg10", ""), ("MRR@10", "mrr10", ""))
    return [
        Measure(name, lambda r, key=key: r[key], lambda v: f"{v:.4f}", "higher", note=said or "its place counts")
        for name, key, said in named
    ]


def have_perplexities(records: list[Record]) -> bool:
    """Whether all layers have one, so that it can say which of them is best."""
    return all(record["perplexity"] is not None for record in records)


def best_first(records: list[Record]) -> list[Record]:
    """By perplexity; where a layer has none, all by how often their ten best have the next token."""
    if have_perplexities(records):
        return sorted(records, key=lambda record: record["perplexity"])
    return sorted(records, key=lambda record: (-record["top10_accuracy"], -record.get("mrr10", 0.0)))


def zero_share(record: Record) -> float | None:
    """The share of held-out tokens of probability 0; None for scores, and in results of earlier versions."""
    return record.get("zero_probability_share")


def why_no_perplexity(record: Record, unit: str) -> str:
    """The reason in a few words, or nothing where there is a perplexity."""
    if record["perplexity"] is not None:
        return ""
    share = zero_share(record)
    if share is None:
        return "its scores are no probabilities"
    return f"{percent(share)} of the held-out {unit} have probability 0"


def in_a_line(record: Record, unit: str) -> str:
    """The perplexity, or what there is in its place, and why."""
    if record["perplexity"] is not None:
        return f"perplexity {figure(record['perplexity'])}"
    return f"top-10 accuracy {record['top10_accuracy']:.1%} (no perplexity: {why_no_perplexity(record, unit)})"


def remarks(records: list[Record], unit: str) -> list[str]:
    """What is said of single layers: why one has no perplexity, and where a screen slows it down."""
    said = []
    for record in records:
        screened, plain = record["screened_query_ms"], record["query_ms"]
        if reason := why_no_perplexity(record, unit):
            said.append(f"{record['layer']} has no perplexity: {reason}")
        if screened is not None and screened > plain:
            times = f"{screened / plain:.1f} times as slow as the layer itself"
            said.append(f"{record['layer']}, screened: {times}: no screen is needed here")
    return said


def show(results: dict[str, Any], out: Path, console: Console) -> None:
    """Prints the table, and where the page is."""
    text, records = results["text"], results["records"]
    title = f"{text['name']}, {text['num_classes']:,} different {unit_of(text)}"
    best, *others = (record["layer"] for record in records)
    names = [Text(best, style="bold" if others else ""), *map(Text, others)]
    columns = [measure for measure in measures(text, records) if measure.brief]
    show_measures(console, title, "layer", names, records, columns)
    for remark in remarks(records, unit_of(text)):
        say(console, remark)
    say(console, f"The page: {out / 'index.html'}")

"""What a comparison shows of every layer: a figure each, as a group of bars or a column of the table."""

from dataclasses import replace
from typing import Any

from lastlayer.study.report.figures import figure
from lastlayer.study.report.quality import percent, zero_share
from lastlayer.study.report.sorted_table import Measure

PLACES = (("NDCG@10", "ndcg10"), ("MRR@10", "mrr10"))  # of items: the place among the ten counts


def milliseconds(value: float) -> str:
    return f"{figure(value)} ms"


def measures(text: dict[str, Any], records: list[dict[str, Any]]) -> tuple[Measure, ...]:
    """The groups of bars; what no layer has is left out."""
    return tuple(measure for measure in _measures(text) if _is_known(measure, records))


def _is_known(measure: Measure, records: list[dict[str, Any]]) -> bool:
    return any(measure.value(record) is not None for record in records)


def _measures(text: dict[str, Any]) -> tuple[Measure, ...]:
    unit = unit_of(text)
    held_out = "sequences" if of_items(text) else "text"
    return (
        Measure("Perplexity", f"held-out {held_out}; lower is better", lambda r: r["perplexity"], figure),
        Measure(
            "Zero probability",
            f"share of held-out {unit} of probability 0; lower is better",
            lambda r: zero_share(r) or None,
            percent,
        ),
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
            milliseconds,
        ),
        Measure(
            "Memory of that step",
            "beyond the parameters; lower is better",
            lambda r: r["peak_bytes"] / 1e6,
            lambda v: f"{figure(v)} MB",
        ),
    )


def of_items(text: dict[str, Any]) -> bool:
    return "sequences" in text


def unit_of(text: dict[str, Any]) -> str:
    return text.get("unit", "words")


def _rankings(text: dict[str, Any]) -> tuple[Measure, ...]:
    """How well the ten best contain the next token; of items also at which place they have it."""
    note = f"next {unit_of(text)[:-1]} among the ten best; higher is better"
    if not of_items(text):
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


def columns(text: dict[str, Any], records: list[dict[str, Any]]) -> tuple[Measure, ...]:
    """Of the table; where nothing is better than anything else there is no note."""
    unit = unit_of(text)
    has_zeros = any(zero_share(record) for record in records)
    lower, higher = "lower is better", "higher is better"
    return (
        Measure("perplexity", lower, lambda r: r["perplexity"], figure),
        *([Measure("zero probability", lower, zero_share, percent)] if has_zeros else []),
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

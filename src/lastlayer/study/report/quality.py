"""What a record says of how well a layer predicts, and which layer is best; some layers have no perplexity."""

from lastlayer.study.files import Record
from lastlayer.study.report.figures import figure


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


def percent(share: float) -> str:
    """`12.3%`, `0.0046%`: a share above 0 is never written as 0."""
    return f"{share:.1%}" if share == 0 or share >= 0.01 else f"{100 * share:.2g}%"

"""What `lastlayer speedup` does: hidden states, the screens that were tried, the frontier, the saved head."""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lastlayer.screening import choose_screen
from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.files import make_folder, write_json, write_whole
from lastlayer.study.heads import LoadedHead, load_hidden
from lastlayer.study.measuring.measure import environment
from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import print_table
from lastlayer.study.text.embedded import library_lines
from lastlayer.study.text.lines import read_lines
from lastlayer.study.text.sources import STANDARD_INPUT, find_files

WINDOW, BATCH = 256, 4  # tokens in a row, rows at a time
WORTH_IT = 1.2  # a smaller gain is not worth a second copy of the weight

Record = dict[str, Any]


def speed_up(
    head: LoadedHead,
    calibration: Path | None,
    *,
    agreement: float,
    k: int,
    tokens: int,
    out: Path,
    console: Console,
) -> list[Record]:
    """Chooses, shows and saves a screen of `head`; returns one record for each that was tried."""
    classes, width = head.weight.shape
    if k > classes:
        raise UsageError(f"--k must be at most the head's {classes} classes, got {k}")
    make_folder(out)
    with console.status("collecting hidden states"):
        hidden, source = collect_hidden(head, calibration, tokens)
    console.print(
        f"{head.name}: {classes:,} classes, width {width}; {len(hidden):,} hidden states from {source}, "
        "half to calibrate and tune, half to measure",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    try:
        with console.status("trying previews"):
            screen, records = choose_screen(head.weight, head.bias, hidden, agreement=agreement, k=k)
    except ValueError as problem:
        raise StudyError(f"these hidden states do not serve: {problem}") from problem
    _show(records, console)
    chosen = next(record for record in records if record["chosen"])
    screen.save(out / "screen", include_weight=head.model is None)
    given = "weight=" if head.bias is None else "weight= and bias="
    loading = "" if head.model is None else f" with {given}, the model's own in float32"
    write_json(out / "results.json", {"environment": environment(), "source": source, "records": records})
    write_whole(out / "frontier.png", lambda path: _plot(records, agreement, path))
    saved = f"Saved: {out / 'screen'} (ScreenedSoftmax.load{loading}), {out / 'frontier.png'}"
    for line in (f"* {_verdict(chosen, agreement)}", saved):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return records


def collect_hidden(head: LoadedHead, calibration: Path | None, tokens: int) -> tuple[Tensor, str]:
    """Hidden states (n, d), and where they are from: a file of them, or the model run over text."""
    if calibration is not None and calibration != STANDARD_INPUT and not calibration.exists():
        raise UsageError(f"there is no calibration file {calibration}")
    if calibration is not None and calibration.suffix == ".npy":
        return load_hidden(calibration, head.weight.shape[-1]), calibration.name
    if head.model is None:
        raise UsageError("a bare head needs hidden states that it meets: --calibration HIDDEN.npy, shape (n, d)")
    if head.tokenizer is None:
        raise UsageError(f"{head.name} has no tokenizer to read text with: --calibration HIDDEN.npy, shape (n, d)")
    lines, source = library_lines(), "Python's standard library"
    if calibration is not None:
        files = find_files([calibration])
        lines, source = chain.from_iterable(map(read_lines, files.training)), files.name
    from lastlayer.transformers import hidden_states

    window = min(WINDOW, getattr(head.model.config, "max_position_embeddings", None) or WINDOW)
    batches = _token_batches(head.tokenizer, lines, tokens, source, window)
    return torch.cat(list(hidden_states(head.model, batches)))[:tokens].float(), source


def _token_batches(
    tokenizer: Any, lines: Iterator[str], tokens: int, source: str, window: int
) -> Iterator[Tensor]:
    """Token ids (N, T) of the text's beginning; about `tokens` of them."""
    text = "\n".join(islice(lines, 2 * tokens))[: 12 * tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[0][:tokens]
    if len(ids) < window:
        raise StudyError(f"{source} has only {len(ids)} tokens; at least {window} are needed")
    rows = ids[: len(ids) // window * window].view(-1, window)
    return iter(rows.split(BATCH))


def _verdict(chosen: Record, agreement: float) -> str:
    name = _name(chosen)
    if chosen["ratio"] < WORTH_IT:
        return (
            f"This head is too small to gain: the fastest screen that agrees ({name}) takes "
            f"{figure(chosen['ms'])} ms, the full layer {figure(chosen['full_ms'])} ms. Keep the full layer."
        )
    proved = "; every answer is proved" if chosen["certified_fraction"] == 1 else ""
    return (
        f"{name}: {figure(chosen['ratio'])} times as fast as the full layer, "
        f"agreement {chosen['agreement_topk']:.4%} (asked for {agreement:.4%}){proved}."
    )


def _name(record: Record) -> str:
    window = "" if record["window"] is None else f", window {record['window']}"
    return f"{record['preview']}{window}, {record['candidates']:,} candidates"


def _show(records: list[Record], console: Console) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("screen")  # the only one that gives way on a narrow terminal
    for heading in ("top-1", "top-k", "KL", "bytes", "proved", "ms", "times\nas fast"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in records:
        table.add_row(
            ("* " if record["chosen"] else "") + _name(record),
            f"{record['agreement_top1']:.2%}",
            f"{record['agreement_topk']:.2%}",
            figure(record["kl"]),
            f"{record['bytes_read_fraction']:.1%}",
            f"{record['certified_fraction']:.1%}",
            figure(record["ms"]),
            figure(record["ratio"]),
        )
    print_table(console, table)


def _plot(records: list[Record], agreement: float, path: Path) -> None:
    """Disagreement against time, both logarithmic; the full layer's time and the target as lines."""
    from matplotlib.figure import Figure

    plot = Figure(figsize=(8, 6), layout="constrained")
    axes = plot.add_subplot()
    floor = 1e-5  # drawn for none missed, which a logarithm cannot show
    for number, record in enumerate(records):
        kind = 2 if record["chosen"] else "certified" not in record["preview"]
        missed = max(floor, 1 - record["agreement_topk"])
        style = {"marker": "so*"[kind], "markersize": (8, 7, 15)[kind], "color": f"C{number % 10}"}
        axes.plot(record["ms"], missed, linestyle="none", label=_name(record), **style)
    axes.axvline(records[0]["full_ms"], linestyle="--", color="grey", label="the full layer")
    axes.axhline(max(floor, 1 - agreement), linestyle=":", color="grey", label="asked for")
    axes.set(xscale="log", yscale="log", xlabel="milliseconds a query", ylabel="share of the true top-k missed")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: "none" if value < 1.01 * floor else f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    plot.legend(loc="outside lower center", fontsize=8, ncols=2)
    plot.savefig(path, format="png", dpi=130)

"""What `lastlayer speedup` does: hidden states, the screens that are tried, and the one that is saved."""

import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lastlayer.screening import ScreenedSoftmax, choose_screen
from lastlayer.study.errors import StudyError, UsageError
from lastlayer.study.files import Record, make_folder, write_json, write_text
from lastlayer.study.heads import LoadedHead, load_hidden
from lastlayer.study.report.frontier_page import render_frontier, report
from lastlayer.study.report.tables import Steps, say
from lastlayer.study.report.verdict import show, verdict
from lastlayer.study.text.lines import STANDARD_INPUT, read_lines
from lastlayer.study.text.sources import LIBRARY, find_files, library_lines

WINDOW, BATCH = 256, 4  # tokens in a row, rows at a time
SECONDS = 120.0  # about how long all of it may take, loading left out
SHARE_OF_STATES = 0.4  # of that, for the hidden states: fewer of them where the model is slow
LEAST_STATES = 2048  # collected in any case, where the text has them


def speed_up(
    head: LoadedHead,
    calibration: Path | None,
    *,
    agreement: float,
    k: int,
    tokens: int,
    out: Path,
    console: Console,
    seconds: float = SECONDS,
) -> list[Record]:
    """Chooses and shows a screen of `head`, and saves it where it is faster; one record for each screen."""
    classes, width = head.weight.shape
    if k > classes:
        raise UsageError(f"--k must be at most the head's {classes} classes, got {k}")
    make_folder(out)
    start = time.perf_counter()
    with Steps(console) as steps:
        hidden, source = collect_hidden(head, calibration, tokens, steps, SHARE_OF_STATES * seconds)
    say(
        console,
        f"{head.name}: {classes:,} classes, width {width}; {len(hidden):,} hidden states from {source}, "
        "half to calibrate and tune, half to measure",
    )
    try:
        with Steps(console) as steps:
            screen, records = choose_screen(
                head.weight,
                head.bias,
                hidden,
                agreement=agreement,
                k=k,
                seconds=max(1.0, seconds - (time.perf_counter() - start)),
                on_progress=lambda at: steps.say(at.doing, at.done, at.total, at.seconds_left),
            )
    except ValueError as problem:
        raise StudyError(f"these hidden states do not serve: {problem}") from problem
    show(records, k, console)
    chosen = next(record for record in records if record["chosen"])
    say(console, f"* {verdict(records, head.weight.nbytes, agreement)}")
    about = {"name": head.name, "num_classes": classes, "in_features": width, "bytes": head.weight.nbytes}
    content = report(about, records, agreement, k, source)
    write_json(out / "results.json", content)
    write_text(out / "index.html", render_frontier(content))
    _save(screen, chosen, head, out, console)
    return records


def _save(screen: ScreenedSoftmax, chosen: Record, head: LoadedHead, out: Path, console: Console) -> None:
    """Saves a screen that is faster than the full layer, and no other."""
    if chosen["ratio"] <= 1:
        say(console, f"No screen is saved. The page: {out / 'index.html'}")
        return
    screen.save(out / "screen", include_weight=head.model is None)
    given = "weight=" if head.bias is None else "weight= and bias="
    loading = "" if head.model is None else f" with {given}, the model's own in float32"
    say(console, f"Saved: {out / 'screen'} (ScreenedSoftmax.load{loading}). The page: {out / 'index.html'}")


def collect_hidden(
    head: LoadedHead, calibration: Path | None, tokens: int, steps: Steps, seconds: float
) -> tuple[Tensor, str]:
    """Hidden states (n, d), and where they are from: a file of them, or the model run over text.

    After `seconds` the model is given no more text, once there are `LEAST_STATES`.
    """
    if calibration is not None and calibration != STANDARD_INPUT and not calibration.exists():
        raise UsageError(f"there is no calibration file {calibration}")
    if calibration is not None and calibration.suffix == ".npy":
        return load_hidden(calibration, head.weight.shape[-1]), calibration.name
    if head.model is None:
        raise UsageError("a bare head needs hidden states that it meets: --calibration HIDDEN.npy, shape (n, d)")
    if head.tokenizer is None:
        raise UsageError(f"{head.name} has no tokenizer to read text with: --calibration HIDDEN.npy, shape (n, d)")
    lines, source = library_lines(), LIBRARY
    if calibration is not None:
        files = find_files([calibration])
        lines, source = chain.from_iterable(map(read_lines, files.training)), files.name
    from lastlayer.transformers import hidden_states

    window = min(WINDOW, getattr(head.model.config, "max_position_embeddings", None) or WINDOW)
    batches = _token_batches(head.tokenizer, lines, tokens, source, window)
    states, start, left = [], time.perf_counter(), None
    found = hidden_states(head.model, batches)
    for number in range(len(batches)):
        steps.say("running the model over text", number, len(batches), left)
        states.append(next(found))
        spent = time.perf_counter() - start
        left = spent / (number + 1) * (len(batches) - number - 1)
        if spent > seconds and sum(map(len, states)) >= LEAST_STATES:
            break
    return torch.cat(states)[:tokens].float(), source


def _token_batches(tokenizer: Any, lines: Iterator[str], tokens: int, source: str, window: int) -> list[Tensor]:
    """Token ids (N, T) of the text's beginning; about `tokens` of them."""
    text = "\n".join(islice(lines, 2 * tokens))[: 12 * tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[0][:tokens]
    if len(ids) < window:
        raise StudyError(f"{source} has only {len(ids)} tokens; at least {window} are needed")
    rows = ids[: len(ids) // window * window].view(-1, window)
    return list(rows.split(BATCH))

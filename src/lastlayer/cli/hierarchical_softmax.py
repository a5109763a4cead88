"""`lastlayer reproduce hierarchical-softmax`: the claims for clusters and trees beside what is measured here."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lastlayer.cli.options import Common, Records
from lastlayer.reproduce.hierarchical_softmax.study import CLASSES, Plan, reproduce
from lastlayer.study.text.corpus import load_corpus


def hierarchical_softmax(
    common: Common,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text files or a folder, as `compare` takes them. Not given: Python's own source."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each layer, where steps are equal.")] = 100,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Training time of each layer, where time is equal.")
    ] = 30.0,
    width: Annotated[int, typer.Option(min=1, help="Of embedding, LSTM and hidden states.")] = 256,
    largest: Annotated[int, typer.Option(min=min(CLASSES), help="Classes of the largest speed case.")] = max(
        CLASSES
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each layer.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("lastlayer-reproduce"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the models in --out.")] = False,
) -> Records:
    """Two levels, trees and adaptive softmax: the Keras thread's benchmark, and quality on a text."""
    console = Console()
    with console.status("reading the text"):
        corpus = load_corpus(text)
    plan = Plan(largest, rounds, steps, seconds, width, common.seed, common.device)
    return reproduce(corpus, plan, out, console, resume=resume)

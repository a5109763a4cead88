"""`lastlayer reproduce svd-softmax`: the paper's figures beside what is measured here."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lastlayer.cli.options import Common, Records
from lastlayer.reproduce.svd_softmax.study import CLASSES, Plan, reproduce
from lastlayer.study.text.corpus import load_corpus


def svd_softmax(
    common: Common,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="The paper's is the WikiText-2 folder. Not given: Python's own source."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Training time of the language model.")] = 120.0,
    width: Annotated[int, typer.Option(min=16, help="Of embedding, LSTM and hidden states.")] = 256,
    positions: Annotated[
        int, typer.Option(min=500, help="Held-out words that each setting is measured on.")
    ] = 1000,
    largest: Annotated[int, typer.Option(min=0, help="Classes of the largest speed case.")] = max(CLASSES),
    out: Annotated[Path, typer.Option(help="Folder for the model and the results.")] = Path("lastlayer-reproduce"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
) -> Records:
    """SVD-softmax (Shim et al., NIPS 2017): quality by window and candidates, time by number of classes."""
    console = Console()
    with console.status("reading the text"):
        corpus = load_corpus(text)
    plan = Plan(seconds, width, positions, largest, common.seed, common.device)
    return reproduce(corpus, plan, out, console, resume)

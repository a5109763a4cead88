"""`lastlayer speedup`: faster queries of a trained model's head."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lastlayer.cli.options import Common, Records
from lastlayer.study.heads import load_head
from lastlayer.study.speedup import SECONDS, speed_up


def speedup(
    common: Common,
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", help="Folder or GGUF of a Transformers model, or a head: .safetensors, .pt, .npy."
        ),
    ],
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text for the model to run over, as `compare` takes it, or hidden states (.npy). "
            "Not given: Python's own source."
        ),
    ] = None,
    agreement: Annotated[float, typer.Option(min=0.5, max=1.0, help="Share of the true top-k to keep.")] = 0.999,
    k: Annotated[int, typer.Option(min=1, help="How many best classes matter.")] = 10,
    seconds: Annotated[
        float,
        typer.Option(min=1.0, metavar="SECONDS", help="About how long it may take, loading left out."),
    ] = SECONDS,
    tokens: Annotated[int, typer.Option(min=512, help="Hidden states to collect from text.")] = 8192,
    tensor: Annotated[
        str | None, typer.Option(metavar="NAME", help="The head's name, where a file holds several.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the screen, the results and the plot.")] = Path(
        "lastlayer-speedup"
    ),
) -> Records:
    """Find the fastest screen of a trained head that agrees with it, and save it if it is faster than the head."""
    common.require_cpu()
    console = Console()
    with console.status("loading the model"):
        head = load_head(model, tensor)
    return speed_up(
        head, calibration, agreement=agreement, k=k, tokens=tokens, out=out, console=console, seconds=seconds
    )

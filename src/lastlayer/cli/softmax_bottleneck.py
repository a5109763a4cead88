"""`lastlayer reproduce softmax-bottleneck`: do mixtures and logit maps help, and at what price?"""

import os
from pathlib import Path
from typing import Annotated

import typer

from lastlayer.cli.options import Common, Records
from lastlayer.reproduce.softmax_bottleneck.study import SIZES, run
from lastlayer.study.errors import UsageError
from lastlayer.study.text.corpus import Corpus, load_corpus

PARTS = "abc"


def softmax_bottleneck(
    common: Common,
    budget: Annotated[str, typer.Option(help="How much is run: minutes, hour or day.")] = "minutes",
    parts: Annotated[
        str, typer.Option(help="Which: a synthetic modes, b language modelling, c time and memory.")
    ] = PARTS,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text of part b. Not given: wikitext-2 in $LASTLAYER_DATA, else Python's standard library."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results, plot and models.")] = Path("softmax-bottleneck"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted in --out.")] = False,
) -> Records:
    """Measure softmaxes against sigsoftmax, PLIF and mixtures, each figure beside the published one."""
    if budget not in SIZES:
        raise UsageError(f"--budget must be one of {', '.join(SIZES)}; got {budget!r}")
    if not parts or set(parts) - set(PARTS):
        raise UsageError(f"--parts must be letters of {PARTS!r}, such as 'ab'; got {parts!r}")

    def corpus() -> Corpus:
        data = Path(os.environ.get("LASTLAYER_DATA", "")) / "wikitext-2"
        return load_corpus(text or ([data] if "LASTLAYER_DATA" in os.environ and data.is_dir() else []))

    return run(parts, SIZES[budget], corpus, out, resume, common.seed, common.device)

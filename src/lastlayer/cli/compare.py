"""`lastlayer compare`: which output layer suits this text?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lastlayer.cli.options import Common, Records
from lastlayer.study.choices import CHOICES, DEFAULT_LAYERS, choose
from lastlayer.study.compare import Comparison, Plan
from lastlayer.study.errors import UsageError
from lastlayer.study.processes import is_first, joined
from lastlayer.study.text.corpus import load_corpus
from lastlayer.study.text.ids import BIN_DTYPES
from lastlayer.study.text.items import load_items
from lastlayer.study.text.reading import Reading
from lastlayer.study.training.trainer import Budget

SECONDS = 60.0
ITEM_BATCH = 64  # sequences; they are shorter than the windows of a text
DEFAULTS = Plan([], Budget())


def compare(
    common: Common,
    more_text: Annotated[list[Path] | None, typer.Argument(metavar="PATH", hidden=True)] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text files (plain, .gz, .bz2, .xz), JSON lines (.jsonl), token ids (.npy, .bin), a folder of "
            "such, or - for standard input. Those with train and valid in their names are the two parts. "
            "Not given: the source of Python's standard library."
        ),
    ] = None,
    items: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Instead of text, sequences of items, such as sessions: ids or names between blanks, one "
            "sequence a line. No sequence is context of another; ranks are reported too.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Split text by this tokenizer.json of the tokenizers package."),
    ] = None,
    characters: Annotated[
        bool, typer.Option("--characters", help="Every character is a class: for text without blanks.")
    ] = False,
    split_signs: Annotated[
        bool, typer.Option("--split-signs", help="Separate punctuation from words, in text where it is not.")
    ] = False,
    ids: Annotated[
        bool, typer.Option("--ids", help="Text files hold token ids: one sequence a line, between blanks.")
    ] = False,
    ids_dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="Of the numbers in a .bin: uint16 or uint32.")
    ] = BIN_DTYPES[0],
    field: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The field of JSON lines that holds the text [default: text, in .jsonl]."
        ),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(metavar="NAMES", help=f"Which layers, with commas between them: {', '.join(CHOICES)}."),
    ] = DEFAULT_LAYERS,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, metavar="SECONDS", help=f"Training time of each layer [default: {SECONDS:g}]."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each layer, instead of --seconds.")
    ] = None,
    min_count: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rarer words become <unk> [default: 3; 1 if the text has <unk>, or for other tokens]."
        ),
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Of embedding, LSTM and hidden states.")] = DEFAULTS.width,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Parallel streams through the text [default: {DEFAULTS.batch}], or sequences of --items "
            f"[default: {ITEM_BATCH}].",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Words of each stream in a step.")] = DEFAULTS.window,
    learning_rate: Annotated[
        float, typer.Option(min=1e-9, help="Of Adagrad; Adam for the LSTM has a fiftieth.")
    ] = DEFAULTS.learning_rate,
    held_out_tokens: Annotated[
        int, typer.Option(min=1, help="At most so many held-out words for the final perplexity.")
    ] = DEFAULTS.held_out_tokens,
    out: Annotated[Path, typer.Option(help="Folder for the page, the results and the models.")] = Path(
        "lastlayer-compare"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted in --out.")] = False,
) -> Records:
    """Train the same small language model under each output layer for the same time, and compare them.

    Under torchrun the classes of each layer are divided among the processes.
    """
    if seconds is not None and steps is not None:
        raise UsageError("give --seconds or --steps, not both")
    plan = Plan(
        choose(layers),
        Budget(steps=steps) if steps is not None else Budget(seconds=seconds or SECONDS),
        width=width,
        batch=batch or (ITEM_BATCH if items else DEFAULTS.batch),
        window=window,
        learning_rate=learning_rate,
        held_out_tokens=held_out_tokens,
        seed=common.seed,
        device=common.device,
    )
    console = Console(quiet=not is_first())
    paths = [*(text or []), *(more_text or [])]
    reading = Reading(split_signs, characters, tokenizer, ids, ids_dtype, field)
    with console.status(f"reading the {'items' if items else 'text'}"):
        if items:
            _refuse_text_options(paths, reading)
            corpus = load_items(items, min_count=min_count, field=field)
        else:
            corpus = load_corpus(paths, min_count=min_count, reading=reading)
    with joined(common.device):
        return Comparison(corpus, plan, out, console).run(resume)


def _refuse_text_options(paths: list[Path], reading: Reading) -> None:
    """`--items` says what a token is, and where the data is."""
    wrong = ["--text"] if paths else reading.units()
    if wrong:
        raise UsageError(f"give --items or {wrong[0]}, not both")

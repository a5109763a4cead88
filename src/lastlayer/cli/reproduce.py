"""`lastlayer reproduce PAPER`: the figures of each paper, a function each, beside what is measured here."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lastlayer.cli.options import Common, Records
from lastlayer.reproduce.hierarchical_softmax import study as clusters
from lastlayer.reproduce.large_sparse_targets.classifiers import measure_classifiers
from lastlayer.reproduce.large_sparse_targets.exactness import measure_exactness
from lastlayer.reproduce.large_sparse_targets.speed import measure_scaling, measure_speed, multiply_adds
from lastlayer.reproduce.large_sparse_targets.words import EMBEDDING_METHODS, MODEL_METHODS, train_words
from lastlayer.reproduce.softmax_bottleneck import study as bottleneck
from lastlayer.reproduce.svd_softmax import study as svd
from lastlayer.study.errors import UsageError
from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import say, show
from lastlayer.study.text.corpus import Corpus, load_corpus
from lastlayer.study.training.trainer import Budget

BOTTLENECK_PARTS = "abc"
PARTS = ("speed", "scaling", "exactness", "embeddings", "classifiers", "models")  # of large sparse targets
BATCH = 128
NOT_IN_TABLES = ("case", "low_ms", "high_ms", "mean_ms", "rounds", "neighbours")
CLAIMS = {  # at V=793,471, d=300, batch 128, on a CPU, against a plain update; as remembered
    "output layer": "763 times faster †",
    "whole model": "501 times faster †",
}


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
    largest: Annotated[int, typer.Option(min=0, help="Classes of the largest speed case.")] = max(svd.CLASSES),
    out: Annotated[Path, typer.Option(help="Folder for the model and the results.")] = Path("lastlayer-reproduce"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what the folder holds.")] = False,
) -> Records:
    """SVD-softmax (Shim et al., NIPS 2017): quality by window and candidates, time by number of classes."""
    console = Console()
    with console.status("reading the text"):
        corpus = load_corpus(text)
    plan = svd.Plan(seconds, width, positions, largest, common.seed, common.device)
    return svd.reproduce(corpus, plan, out, console, resume)


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
    largest: Annotated[
        int, typer.Option(min=min(clusters.CLASSES), help="Classes of the largest speed case.")
    ] = max(clusters.CLASSES),
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each layer.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("lastlayer-reproduce"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the models in --out.")] = False,
) -> Records:
    """Two levels, trees and adaptive softmax: the Keras thread's benchmark, and quality on a text."""
    console = Console()
    with console.status("reading the text"):
        corpus = load_corpus(text)
    plan = clusters.Plan(largest, rounds, steps, seconds, width, common.seed, common.device)
    return clusters.reproduce(corpus, plan, out, console, resume=resume)


def softmax_bottleneck(
    common: Common,
    budget: Annotated[str, typer.Option(help="How much is run: minutes, hour or day.")] = "minutes",
    parts: Annotated[
        str, typer.Option(help="Which: a synthetic modes, b language modelling, c time and memory.")
    ] = BOTTLENECK_PARTS,
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
    if budget not in bottleneck.SIZES:
        raise UsageError(f"--budget must be one of {', '.join(bottleneck.SIZES)}; got {budget!r}")
    if not parts or set(parts) - set(BOTTLENECK_PARTS):
        raise UsageError(f"--parts must be letters of {BOTTLENECK_PARTS!r}, such as 'ab'; got {parts!r}")

    def corpus() -> Corpus:
        data = Path(os.environ.get("LASTLAYER_DATA", "")) / "wikitext-2"
        return load_corpus(text or ([data] if "LASTLAYER_DATA" in os.environ and data.is_dir() else []))

    return bottleneck.run(parts, bottleneck.SIZES[budget], corpus, out, resume, common.seed, common.device)


def large_sparse_targets(
    common: Common,
    parts: Annotated[
        str, typer.Option(metavar="NAMES", help=f"Which parts, with commas: {', '.join(PARTS)}.")
    ] = ",".join(PARTS),
    num_classes: Annotated[
        int, typer.Option(min=400, help="V of the speed table; the paper's is 793,471.")
    ] = 793_471,
    in_features: Annotated[int, typer.Option(min=2, help="d of the speed table.")] = 300,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the speed table; a plain step takes seconds.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the exactness run.")] = 10_000,
    seconds: Annotated[float, typer.Option(min=0.1, help="Training time of each method on text.")] = 30.0,
    text: Annotated[
        list[Path] | None, typer.Option(help="Text, as `compare` takes it. Not given: Python's own source.")
    ] = None,
) -> Records:
    """Exact SGD at a cost without V: speed, scaling with V and d, drift, and what the losses are good for."""
    common.require_cpu()
    chosen = [part.strip() for part in parts.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        problem = f"there is no part {unknown[0]!r}" if unknown else "no part was named"
        raise UsageError(f"{problem}; the parts are: {', '.join(PARTS)}")
    console = Console()
    on_text = {"embeddings", "classifiers", "models"} & set(chosen)
    corpus = load_corpus(text) if on_text else None
    size, seed = (num_classes, in_features, BATCH), common.seed
    largest = [v for v in (1_000, 10_000, 100_000, 1_000_000) if v <= max(2 * num_classes, 1_000)]
    widths = [*(d for d in (64, 128, 256) if d < in_features), in_features]
    budget = Budget(seconds=seconds)
    measure: dict[str, Callable[[], Records]] = {
        "speed": lambda: (
            measure_speed(*size, rounds, seed) + measure_speed(*size, rounds, seed, ("squared error",), deep=True)
        ),
        "scaling": lambda: measure_scaling(largest, widths, BATCH, rounds, seed),
        "exactness": lambda: measure_exactness(steps, seed=seed),
    }
    if corpus is not None:
        measure |= {
            "embeddings": lambda: train_words(corpus, EMBEDDING_METHODS, budget, deep=False, seed=seed),
            "classifiers": lambda: measure_classifiers(corpus, seed=seed),
            "models": lambda: train_words(corpus, MODEL_METHODS, budget, deep=True, seed=seed),
        }
    records: Records = []
    for part in chosen:
        with console.status(f"{part} ..."):
            found = measure[part]()
        show_cases(console, found)
        if part == "speed":
            count = multiply_adds(*size)
            say(
                console,
                f"arithmetic of a plain step over the factored one: {figure(count['plain'] / count['factored'])}",
            )
            say(console, "† as remembered; not verified against the paper")
        records += found
        common.keep(records)
    return records


def show_cases(console: Console, records: Records) -> None:
    """Each case as a table, and below it which words came out near to each other."""
    for case in dict.fromkeys(record["case"] for record in records):
        found = [record for record in records if record["case"] == case]
        show(console, case, found, [name for name in found[0] if name not in NOT_IN_TABLES])
        if case in CLAIMS:
            say(console, f"the paper, V=793,471, d=300: {CLAIMS[case]}")
        for record in found:
            if record.get("neighbours"):
                say(console, f"{record['name']}: {record['neighbours']}")

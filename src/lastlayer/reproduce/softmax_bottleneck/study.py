"""`reproduce softmax-bottleneck`: three studies at three sizes, resumable, figures beside the published ones."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console

from lastlayer.reproduce.cells import Cells
from lastlayer.reproduce.softmax_bottleneck.language import PUBLISHED, build, time_steps, train
from lastlayer.reproduce.softmax_bottleneck.synthetic import MODELS, STEPS, fit
from lastlayer.study.files import Record, Records
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.report.figures import duration, figure
from lastlayer.study.report.tables import show
from lastlayer.study.text.corpus import Corpus

# A reference run of the same recipe, %: mean of five seeds at 300 contexts, one seed at 1,000.
REFERENCE = {
    ("softmax", 300, 2): 17.3,
    ("softmax", 300, 4): 54.2,
    ("softmax", 300, 8): 88.8,
    ("sigsoftmax", 300, 2): 17.3,
    ("sigsoftmax", 300, 4): 52.7,
    ("sigsoftmax", 300, 8): 88.6,
    ("PLIF", 300, 2): 25.8,
    ("PLIF", 300, 4): 93.3,
    ("PLIF", 300, 8): 99.6,
    ("softmax", 1000, 4): 31.7,
    ("PLIF", 1000, 4): 86.1,
}
WORDS = 300
COST_WIDTH, COST_BATCH = 128, 256


@dataclass(frozen=True)
class Size:
    """How much of each study is run."""

    contexts: tuple[int, ...]
    widths: tuple[int, ...]
    synthetic_seeds: int
    width: int
    components: int
    steps: int
    seeds: int
    cost_classes: tuple[int, ...]
    cost_components: tuple[int, ...]
    held_out_tokens: int  # that perplexity is measured on; fewer where the text has fewer
    seconds: float  # about, on two cores
    synthetic_steps: int = STEPS


SIZES = {
    "minutes": Size((300,), (2, 4, 8), 1, 64, 3, 100, 2, (10_000, 33_278), (1, 3), 50_000, 900),
    "hour": Size((300, 1000), (2, 4, 8), 1, 200, 5, 200, 2, (10_000, 33_278, 128_000), (1, 5, 15), 50_000, 4500),
    # The papers' own sizes, for a GPU.
    "day": Size(
        (300, 1000), (2, 4, 8, 16, 32, 64), 5, 400, 15, 30_000, 5, (33_278, 128_000), (1, 5, 15), 300_000, 2e6
    ),
}


def run(
    parts: str, size: Size, corpus: Callable[[], Corpus], out: Path, resume: bool, seed: int, device: torch.device
) -> Records:
    """Runs the parts ("a", "b", "c") at a size; shows their tables; the records."""
    console = Console()
    cells = Cells(out, resume, console)
    console.print(
        f"about {duration(size.seconds)} in all on two cores; a kill loses one cell at most, see --resume"
    )
    records: Records = []
    if "a" in parts:
        records += synthetic(cells, size, seed)
        title = "a. contexts whose most probable word is found, and in a reference run"
        found = over_seeds(records, ("layer", "contexts", "width"))
        show(console, title, found, ("layer", "contexts", "width", *SYNTHETIC))
        _plot(records, out / "synthetic.png")
    if "b" in parts:
        text = corpus()
        trained, times = language(cells, size, text, seed, out, device), epochs(cells, size, text, device)
        show(console, "b. language models", over_seeds(trained, ("layer",)), LANGUAGE)
        show(console, "b. a training step", times, ("layer", "step_ms", "ratio_to_softmax", "seconds_an_epoch"))
        console.print(PUBLISHED_ARE, highlight=False)
        records += trained + times
    if "c" in parts:
        costs = cost(cells, size, device)
        show(console, "c. a training step of the output layer alone", costs, COST)
        records += costs
    console.print(f"{cells.path} holds every record", highlight=False)
    return records


SYNTHETIC = ("mode_matched_percent", "reference_percent", "kl_nats")
LANGUAGE = ("layer", "text", "steps", "width", "perplexity", "published_perplexity")
LANGUAGE += ("peak_bytes", "parameters", "rank", "effective_rank", "rank_contexts")
COST = ("layer", "num_classes", "in_features", "batch", "ms", "ratio_to_full", "peak_bytes")
PUBLISHED_ARE = (
    "Published: WikiText-2 test perplexity of an AWD-LSTM, 11 seeds, hundreds of epochs (Parthiban, Mao and "
    "Inkpen, AAAI 2021); ours is on held-out text. At this budget perplexities show how fast each learns at "
    "first, not where it ends: the published differences, 0.3 to 2.7, are smaller than what more steps gain. "
    "Time, memory and parameters do carry over, and the order of ranks (the number of contexts bounds them)."
)


def synthetic(cells: Cells, size: Size, seed: int) -> Records:
    """Part a: the share of modes matched, by model, width and number of contexts."""
    keys = [
        {"part": "a", "layer": name, "contexts": contexts, "words": WORDS, "width": width, "seed": seed + s}
        for contexts in size.contexts
        for width in size.widths
        for s in range(size.synthetic_seeds)
        for name in MODELS
    ]

    def work(key: Record) -> Record:
        name, contexts, width = key["layer"], key["contexts"], key["width"]
        measured = fit(name, contexts, WORDS, width, key["seed"], steps=size.synthetic_steps)
        return measured | {"reference_percent": REFERENCE.get((name, contexts, width))}

    return cells.measure(keys, work)


def language(cells: Cells, size: Size, corpus: Corpus, seed: int, folder: Path, device: torch.device) -> Records:
    """Part b: a language model under each layer."""
    common = {"text": corpus.name, "width": size.width, "steps": size.steps}
    keys = [
        {"part": "b", "layer": name, **common, "seed": seed + s} for s in range(size.seeds) for name in PUBLISHED
    ]
    options = {"components": size.components, "held_out_tokens": size.held_out_tokens}
    return cells.measure(keys, lambda key: train(key, corpus, **options, folder=folder, device=device))


def epochs(cells: Cells, size: Size, corpus: Corpus, device: torch.device) -> Records:
    """Part b's times, measured separately from the training: all layers interleaved within a minute or so."""
    sizes = {"width": size.width, "components": size.components}
    times = functools.cache(lambda: time_steps(corpus, **sizes, device=device))
    keys = [{"part": "b time", "layer": name, "text": corpus.name, **sizes} for name in PUBLISHED]
    return cells.measure(keys, lambda key: times()[key["layer"]])


def cost(cells: Cells, size: Size, device: torch.device) -> Records:
    """Part c: time and memory of a training step of the output layer alone, against V and K."""
    components = {"softmax": 1, "sigsoftmax": 1, "PLIF": 1, **{f"mixture of {K}": K for K in size.cost_components}}
    sizes = {"in_features": COST_WIDTH, "batch": COST_BATCH}
    keys = [
        {"part": "c", "layer": name, "num_classes": V, **sizes} for V in size.cost_classes for name in components
    ]

    def work(key: Record) -> Record:
        name, num_classes = key["layer"], key["num_classes"]
        hidden = torch.randn(COST_BATCH, COST_WIDTH, device=device)
        targets = torch.randint(num_classes, (COST_BATCH,), device=device)
        layer = build(name, COST_WIDTH, num_classes, components[name]).to(device)
        plain = build("softmax", COST_WIDTH, num_classes, 1).to(device)
        peers = {
            "own": lambda: layer(hidden, targets).backward(),
            "plain": lambda: plain(hidden, targets).backward(),
        }
        timings = interleaved(peers, rounds=5)
        own, base = timings["own"].ms, timings["plain"].ms
        return {"ms": own, "ratio_to_full": own / base, "peak_bytes": peak_bytes(peers["own"])}

    return cells.measure(keys, work)


def over_seeds(records: Records, by: Sequence[str]) -> Records:
    """One record for each setting of the fields `by`: the mean of every figure that differs, with its spread."""
    groups: dict[tuple[Any, ...], Records] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in by), []).append(record)
    return [{name: _combined([run[name] for run in runs]) for name in runs[0]} for runs in groups.values()]


def _combined(values: list[Any]) -> Any:
    if all(value == values[0] for value in values):
        return values[0]
    return f"{figure(mean(values))} ± {figure(stdev(values))}"


def _plot(records: Records, path: Path) -> None:
    """The modes matched against the width, for the fewest contexts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = min(r["contexts"] for r in records)
    widths = sorted({r["width"] for r in records})
    picture, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in MODELS:
        of_model = [r for r in records if (r["layer"], r["contexts"]) == (name, contexts)]
        shares = [mean(r["mode_matched_percent"] for r in of_model if r["width"] == width) for width in widths]
        axes.plot(widths, shares, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set(xlabel="dimensions", ylabel="modes matched, %")
    axes.set_title(f"{contexts} contexts, {WORDS} words, Dirichlet(0.01)")
    axes.legend()
    picture.savefig(path, dpi=150)
    pyplot.close(picture)

"""`reproduce softmax-bottleneck`: three studies at three sizes, resumable, figures beside the published ones."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sigsoftmax import Sigsoftmax
from lastlayer.reproduce.cells import Cells, Record
from lastlayer.reproduce.softmax_bottleneck.language import PUBLISHED, time_steps, train
from lastlayer.reproduce.softmax_bottleneck.synthetic import MODELS, STEPS, fit
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.report.figures import duration, figure
from lastlayer.study.report.tables import print_table
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
) -> list[Record]:
    """Runs the parts ("a", "b", "c") at a size; shows their tables; the records."""
    console = Console()
    cells = Cells(out, resume)
    console.print(
        f"about {duration(size.seconds)} in all on two cores; a kill loses one cell at most, see --resume"
    )
    records: list[Record] = []
    if "a" in parts:
        records += show_synthetic(synthetic(cells, size, seed, console), out, console)
    if "b" in parts:
        text = corpus()
        trained = language(cells, size, text, out, seed, device, console)
        records += show_language(trained, epochs(cells, size, text, device, console), console)
    if "c" in parts:
        records += show_cost(cost(cells, size, device, console), console)
    console.print(f"{cells.path} holds every record", highlight=False)
    return records


def synthetic(cells: Cells, size: Size, seed: int, console: Console) -> list[Record]:
    """Part a: the share of modes matched, by model, width and number of contexts."""
    keys = [
        {"part": "a", "layer": name, "contexts": contexts, "words": 300, "width": width, "seed": seed + s}
        for contexts in size.contexts
        for width in size.widths
        for s in range(size.synthetic_seeds)
        for name in MODELS
    ]

    def work(key: Record) -> Record:
        sizes = (key[name] for name in ("contexts", "words", "width", "seed"))
        measured = fit(key["layer"], *sizes, steps=size.synthetic_steps)
        return measured | {"reference_percent": REFERENCE.get((key["layer"], key["contexts"], key["width"]))}

    return _all(cells, keys, work, console)


def language(
    cells: Cells, size: Size, corpus: Corpus, out: Path, seed: int, device: torch.device, console: Console
) -> list[Record]:
    """Part b: a language model under each layer."""
    keys = [
        {
            "part": "b",
            "layer": name,
            "text": corpus.name,
            "width": size.width,
            "steps": size.steps,
            "seed": seed + s,
        }
        for s in range(size.seeds)
        for name in PUBLISHED
    ]
    sizes = {"width": size.width, "components": size.components, "steps": size.steps}
    sizes["held_out_tokens"] = size.held_out_tokens
    return _all(
        cells,
        keys,
        lambda key: train(key["layer"], corpus, key["seed"], **sizes, folder=out, device=device),
        console,
    )


def epochs(cells: Cells, size: Size, corpus: Corpus, device: torch.device, console: Console) -> list[Record]:
    """Part b's times, measured separately from the training: all layers interleaved within a minute or so."""
    keys = [
        {"part": "b time", "layer": name, "text": corpus.name, "width": size.width, "components": size.components}
        for name in PUBLISHED
    ]

    @functools.cache
    def measured() -> dict[str, Record]:
        return time_steps(corpus, width=size.width, components=size.components, device=device)

    return _all(cells, keys, lambda key: measured()[key["layer"]], console)


def cost(cells: Cells, size: Size, device: torch.device, console: Console) -> list[Record]:
    """Part c: time and memory of a training step of the output layer alone, against V and K."""
    width, batch = 128, 256
    layers: dict[str, Callable[[int], Any]] = {
        "softmax": lambda V: FullSoftmax(width, V),
        "sigsoftmax": lambda V: FullSoftmax(width, V, logit_map=Sigsoftmax()),
        "PLIF": lambda V: FullSoftmax(width, V, logit_map=PLIF()),
    }
    for components in size.cost_components:
        layers[f"mixture of {components}"] = lambda V, K=components: MixtureOfSoftmaxes(width, V, K)
    keys = [
        {"part": "c", "layer": name, "num_classes": V, "in_features": width, "batch": batch}
        for V in size.cost_classes
        for name in layers
    ]

    def work(key: Record) -> Record:
        layer = layers[key["layer"]](key["num_classes"]).to(device)
        hidden = torch.randn(batch, width, device=device)
        targets = torch.randint(key["num_classes"], (batch,), device=device)
        plain = FullSoftmax(width, key["num_classes"], device=device)
        peers = {
            "own": lambda: layer(hidden, targets).backward(),
            "plain": lambda: plain(hidden, targets).backward(),
        }
        timings = interleaved(peers, rounds=5)
        own, base = timings["own"].ms, timings["plain"].ms
        return {"ms": own, "ratio_to_full": own / base, "peak_bytes": peak_bytes(peers["own"])}

    return _all(cells, keys, work, console)


def _all(cells: Cells, keys: list[Record], work: Callable[[Record], Record], console: Console) -> list[Record]:
    """Every cell, with a line of progress."""
    records = []
    with console.status("") as status:
        for number, key in enumerate(keys, 1):
            what = ", ".join(
                str(value) for name, value in key.items() if name in ("layer", "width", "num_classes", "seed")
            )
            status.update(f"part {key['part']}: {number} of {len(keys)}: {what}")
            records.append(cells.once(key, lambda key=key: work(key)))
    return records


def show_synthetic(records: list[Record], out: Path, console: Console) -> list[Record]:
    """A table and a plot of the modes matched."""
    settings = sorted({(r["contexts"], r["width"]) for r in records})
    table = Table(
        title="a. contexts whose most probable word is found, % (KL in nats; reference run)", title_justify="left"
    )
    for heading in ("", *(f"N={n} d={d}" for n, d in settings)):
        table.add_column(heading)
    for name in MODELS:
        row = []
        for contexts, width in settings:
            found = [r for r in records if (r["layer"], r["contexts"], r["width"]) == (name, contexts, width)]
            reference = found[0]["reference_percent"]
            beside = "" if reference is None else f"; {reference:g}"
            kl = figure(mean(r["kl_nats"] for r in found))
            row.append(f"{_spread(r['mode_matched_percent'] for r in found)} ({kl}{beside})")
        table.add_row(name, *row)
    print_table(console, table)
    _plot(records, out / "synthetic.png")
    return records


def _plot(records: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = min(r["contexts"] for r in records)
    widths = sorted({r["width"] for r in records})
    picture, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in MODELS:
        shares = [
            mean(
                r["mode_matched_percent"]
                for r in records
                if (r["layer"], r["contexts"], r["width"]) == (name, contexts, width)
            )
            for width in widths
        ]
        axes.plot(widths, shares, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xlabel("dimensions")
    axes.set_ylabel("modes matched, %")
    axes.set_title(f"{contexts} contexts, 300 words, Dirichlet(0.01)")
    axes.legend()
    picture.savefig(path, dpi=150)
    pyplot.close(picture)


def show_language(records: list[Record], times: list[Record], console: Console) -> list[Record]:
    """A table of perplexities beside the published ones."""
    epoch = {r["layer"]: r["seconds_an_epoch"] for r in times}
    steps, width = records[0]["steps"], records[0]["width"]
    table = Table(title=f"b. {records[0]['text']}: {steps} steps, width {width}", title_justify="left")
    for heading in ("", "perplexity", "published", "s an epoch", "peak MB", "parameters", "rank", "effective"):
        table.add_column(heading, justify="right" if heading else "left")
    for name in PUBLISHED:
        found = [r for r in records if r["layer"] == name]
        published = PUBLISHED[name]
        table.add_row(
            name,
            _spread(r["perplexity"] for r in found),
            "-" if published is None else f"{published:g}",
            figure(epoch[name]),
            figure(mean(r["peak_bytes"] for r in found) / 1e6),
            f"{found[0]['parameters']:,}",
            figure(mean(r["rank"] for r in found)),
            figure(mean(r["effective_rank"] for r in found)),
        )
    print_table(console, table)
    console.print(
        "Published: WikiText-2 test perplexity of an AWD-LSTM, 11 seeds, hundreds of epochs (Parthiban, Mao and "
        "Inkpen, AAAI 2021); ours is on held-out text. At this budget perplexities show how fast each learns at "
        "first, not where it ends: the published differences, 0.3 to 2.7, are smaller than what more steps gain. "
        "Time, memory and parameters do carry over, and the order of ranks (they are of "
        f"{records[0]['rank_contexts']} contexts, which bounds them)."
    )
    return records + times


def show_cost(records: list[Record], console: Console) -> list[Record]:
    """A table of time and memory."""
    table = Table(title="c. a training step of the output layer alone", title_justify="left")
    for heading in ("", "V", "ms", "times the softmax", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left")
    for r in records:
        table.add_row(
            r["layer"],
            f"{r['num_classes']:,}",
            figure(r["ms"]),
            f"{r['ratio_to_full']:.2f}",
            figure(r["peak_bytes"] / 1e6),
        )
    print_table(console, table)
    return records


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return figure(mean(values)) + (f" ± {figure(stdev(values))}" if len(values) > 1 else "")

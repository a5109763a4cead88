"""`reproduce softmax-bottleneck`: three studies at three sizes, resumable, figures beside the published ones."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console

from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sigsoftmax import Sigsoftmax
from lastlayer.reproduce.cells import Cells, Record
from lastlayer.reproduce.softmax_bottleneck.language import PUBLISHED, time_steps, train
from lastlayer.reproduce.softmax_bottleneck.synthetic import MODELS, STEPS, fit
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.report.figures import duration, figure
from lastlayer.study.report.tables import Column, plain_table, print_table, table_of
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
    study = Study(Cells(out, resume), size, out, seed, device, console)
    console.print(
        f"about {duration(size.seconds)} in all on two cores; a kill loses one cell at most, see --resume"
    )
    records: list[Record] = []
    if "a" in parts:
        records += show_synthetic(study.synthetic(), out, console)
    if "b" in parts:
        text = corpus()
        records += show_language(study.language(text), study.epochs(text), console)
    if "c" in parts:
        records += show_cost(study.cost(), console)
    console.print(f"{study.cells.path} holds every record", highlight=False)
    return records


@dataclass(frozen=True)
class Study:
    """The three parts; each gives the records of its cells."""

    cells: Cells
    size: Size
    out: Path
    seed: int
    device: torch.device
    console: Console

    def synthetic(self) -> list[Record]:
        """Part a: the share of modes matched, by model, width and number of contexts."""
        size = self.size
        keys = [
            {"part": "a", "layer": name, "contexts": contexts, "words": 300, "width": width, "seed": self.seed + s}
            for contexts in size.contexts
            for width in size.widths
            for s in range(size.synthetic_seeds)
            for name in MODELS
        ]

        def work(key: Record) -> Record:
            sizes = (key[name] for name in ("contexts", "words", "width", "seed"))
            measured = fit(key["layer"], *sizes, steps=size.synthetic_steps)
            return measured | {"reference_percent": REFERENCE.get((key["layer"], key["contexts"], key["width"]))}

        return self._all(keys, work)

    def language(self, corpus: Corpus) -> list[Record]:
        """Part b: a language model under each layer."""
        size = self.size
        common = {"text": corpus.name, "width": size.width, "steps": size.steps}
        keys = [
            {"part": "b", "layer": name, **common, "seed": self.seed + s}
            for s in range(size.seeds)
            for name in PUBLISHED
        ]
        sizes = {"width": size.width, "components": size.components, "steps": size.steps}
        sizes["held_out_tokens"] = size.held_out_tokens

        def work(key: Record) -> Record:
            return train(key["layer"], corpus, key["seed"], **sizes, folder=self.out, device=self.device)

        return self._all(keys, work)

    def epochs(self, corpus: Corpus) -> list[Record]:
        """Part b's times, measured separately from the training: all layers interleaved within a minute or so."""
        sizes = {"width": self.size.width, "components": self.size.components}
        keys = [{"part": "b time", "layer": name, "text": corpus.name, **sizes} for name in PUBLISHED]

        @functools.cache
        def measured() -> dict[str, Record]:
            return time_steps(corpus, **sizes, device=self.device)

        return self._all(keys, lambda key: measured()[key["layer"]])

    def cost(self) -> list[Record]:
        """Part c: time and memory of a training step of the output layer alone, against V and K."""
        width, batch, device = 128, 256, self.device
        layers: dict[str, Callable[[int], Any]] = {
            "softmax": lambda V: FullSoftmax(width, V),
            "sigsoftmax": lambda V: FullSoftmax(width, V, logit_map=Sigsoftmax()),
            "PLIF": lambda V: FullSoftmax(width, V, logit_map=PLIF()),
        }
        for components in self.size.cost_components:
            layers[f"mixture of {components}"] = lambda V, K=components: MixtureOfSoftmaxes(width, V, K)
        keys = [
            {"part": "c", "layer": name, "num_classes": V, "in_features": width, "batch": batch}
            for V in self.size.cost_classes
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

        return self._all(keys, work)

    def _all(self, keys: list[Record], work: Callable[[Record], Record]) -> list[Record]:
        """Every cell, with a line of progress."""
        records = []
        with self.console.status("") as status:
            for number, key in enumerate(keys, 1):
                named = ("layer", "width", "num_classes", "seed")
                what = ", ".join(str(key[name]) for name in named if name in key)
                status.update(f"part {key['part']}: {number} of {len(keys)}: {what}")
                records.append(self.cells.once(key, lambda key=key: work(key)))
        return records


def show_synthetic(records: list[Record], out: Path, console: Console) -> list[Record]:
    """A table and a plot of the modes matched."""
    settings = sorted({(r["contexts"], r["width"]) for r in records})
    title = "a. contexts whose most probable word is found, % (KL in nats; reference run)"
    table = plain_table(title, ("", *(f"N={n} d={d}" for n, d in settings)))
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
    by_layer = [{"layer": name, "runs": [r for r in records if r["layer"] == name]} for name in PUBLISHED]

    def mean_of(field: str, unit: float = 1.0) -> Callable[[Record], str]:
        return lambda r: figure(mean(run[field] for run in r["runs"]) / unit)

    columns: tuple[Column, ...] = (
        ("", lambda r: r["layer"]),
        ("perplexity", lambda r: _spread(run["perplexity"] for run in r["runs"])),
        ("published", lambda r: "-" if (known := PUBLISHED[r["layer"]]) is None else f"{known:g}"),
        ("s an epoch", lambda r: figure(epoch[r["layer"]])),
        ("peak MB", mean_of("peak_bytes", 1e6)),
        ("parameters", lambda r: f"{r['runs'][0]['parameters']:,}"),
        ("rank", mean_of("rank")),
        ("effective", mean_of("effective_rank")),
    )
    title = f"b. {records[0]['text']}: {records[0]['steps']} steps, width {records[0]['width']}"
    print_table(console, table_of(title, columns, by_layer))
    console.print(
        "Published: WikiText-2 test perplexity of an AWD-LSTM, 11 seeds, hundreds of epochs (Parthiban, Mao and "
        "Inkpen, AAAI 2021); ours is on held-out text. At this budget perplexities show how fast each learns at "
        "first, not where it ends: the published differences, 0.3 to 2.7, are smaller than what more steps gain. "
        "Time, memory and parameters do carry over, and the order of ranks (they are of "
        f"{records[0]['rank_contexts']} contexts, which bounds them)."
    )
    return records + times


COST: tuple[Column, ...] = (
    ("", lambda r: r["layer"]),
    ("V", lambda r: f"{r['num_classes']:,}"),
    ("ms", lambda r: figure(r["ms"])),
    ("times the softmax", lambda r: f"{r['ratio_to_full']:.2f}"),
    ("peak MB", lambda r: figure(r["peak_bytes"] / 1e6)),
)


def show_cost(records: list[Record], console: Console) -> list[Record]:
    """A table of time and memory."""
    print_table(console, table_of("c. a training step of the output layer alone", COST, records))
    return records


def _spread(values: Iterable[float]) -> str:
    values = list(values)
    return figure(mean(values)) + (f" ± {figure(stdev(values))}" if len(values) > 1 else "")

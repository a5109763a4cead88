"""What `speedup` found: the table of screens, a picture of time against agreement, the verdict and its cause."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lastlayer.kernels.config import config
from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import print_table

WORTH_IT = 1.2  # a smaller gain is not worth a second copy of the weight
SMALL = 1 << 22  # bytes of a weight that stays in the caches, where the full layer is hard to beat

Record = dict[str, Any]


def verdict(records: list[Record], weight_bytes: int, agreement: float) -> str:
    """What came out, in one sentence or two; where no screen gains, why."""
    chosen = next(record for record in records if record["chosen"])
    name = screen_name(chosen)
    if chosen["ratio"] < WORTH_IT:
        little = "is hardly faster than" if chosen["ratio"] > 1 else "is slower than"
        return (
            f"Keep the full layer: the fastest screen that agrees ({name}) {little} it, {figure(chosen['ms'])} ms "
            f"against {figure(chosen['full_ms'])} ms. {why_no_gain(records, weight_bytes)}"
        )
    proved = "; every answer is proved" if chosen["certified_fraction"] == 1 else ""
    return (
        f"{name}: {figure(chosen['ratio'])} times as fast as the full layer, "
        f"agreement {chosen['agreement_topk']:.4%} (required: {agreement:.4%}){proved}."
    )


def why_no_gain(records: list[Record], weight_bytes: int) -> str:
    """The likeliest cause that no screen is faster: the head, the kernels, or the hidden states."""
    here = config()
    if weight_bytes <= SMALL:
        return f"The cause: this head is too small to gain: its {weight_bytes / 1e6:.1f} MB stay in the cache."
    if here["engine"] == "plain":
        return f"The cause: the kernels run as plain PyTorch here ({here['why']}); compiled ones may well gain."
    windows = [r for r in records if r["window"] is not None and r["candidates"] is not None]
    if windows and all("as candidates" in (r["dropped"] or "") for r in windows):
        return "The cause: no preview tells these classes apart on these hidden states."
    processor = f"{here['processor']}, kernels for {here['isa']}"
    return f"The cause: this processor ({processor}) runs the full layer as fast as it reads a preview."


def screen_name(record: Record) -> str:
    """A screen in a few words."""
    window = "" if record["window"] is None else f", window {record['window']}"
    candidates = "" if record["candidates"] is None else f", {record['candidates']:,} candidates"
    return f"{record['preview']}{window}{candidates}"


def show(records: list[Record], console: Console) -> None:
    """The table of all that were tried, `*` marks the chosen one; below it those whose turn did not come."""
    tried = [record for record in records if record["ms"] is not None]
    untried = [screen_name(record) for record in records if record["ms"] is None]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("screen")  # the only one that gives way on a narrow terminal
    for heading in ("top-1", "top-k", "KL", "bytes", "proved", "ms", "times\nas fast"):
        table.add_column(heading, justify="right", no_wrap=True)
    for record in tried:
        dropped = record["dropped"]
        name = ("* " if record["chosen"] else "") + screen_name(record) + (f": {dropped}" if dropped else "")
        table.add_row(
            name,
            _cell(record["agreement_top1"], "{:.2%}".format),
            _cell(record["agreement_topk"], "{:.2%}".format),
            _cell(record["kl"], figure),
            _cell(record["bytes_read_fraction"], "{:.1%}".format),
            _cell(record["certified_fraction"], "{:.1%}".format),
            _cell(record["ms"], figure),
            _cell(record["ratio"], figure),
        )
    print_table(console, table)
    if untried:
        said = f"Not tried, for --seconds were over: {'; '.join(untried)}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def _cell(value: float | None, shown: Callable[[float], str]) -> str:
    return "-" if value is None else shown(value)


def plot(records: list[Record], agreement: float, path: Path) -> None:
    """Disagreement against time, both logarithmic; the full layer's time and the target as lines."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 6), layout="constrained")
    axes = drawing.add_subplot()
    floor = 1e-5  # drawn for none missed, which a logarithm cannot show
    measured = [record for record in records if record["agreement_topk"] is not None]
    for number, record in enumerate(measured):
        kind = 2 if record["chosen"] else "certified" not in record["preview"]
        missed = max(floor, 1 - record["agreement_topk"])
        style = {"marker": "so*"[kind], "markersize": (8, 7, 15)[kind], "color": f"C{number % 10}"}
        axes.plot(record["ms"], missed, linestyle="none", label=screen_name(record), **style)
    axes.axvline(measured[0]["full_ms"], linestyle="--", color="grey", label="the full layer")
    axes.axhline(max(floor, 1 - agreement), linestyle=":", color="grey", label="required")
    axes.set(xscale="log", yscale="log", xlabel="milliseconds a query", ylabel="share of the true top-k missed")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: "none" if value < 1.01 * floor else f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    drawing.legend(loc="outside lower center", fontsize=8, ncols=2)
    drawing.savefig(path, format="png", dpi=130)

"""Charts as SVG: matplotlib draws them, and their colours are the variables of the page, light or dark."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from lastlayer.study.report.figures import figure
from lastlayer.study.report.page_style import COLOURS, LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDE, NARROW = 760, 340  # for a desk and for a phone: about as wide as they are shown
BARS_WIDTH, BAR_HEIGHT = 280, 24
LABEL_GAP = 16  # between the names of neighbouring lines
NEAR = 2.0  # ends of lines within this factor are drawn as if they were this far apart
ALIKE = 0.75  # the smallest over the largest, from which bars that start at zero show no difference
ALL = 1e-5  # share missed at which "none is missed" is drawn, which a logarithm cannot show
FOUND = {ALL: "all", 1e-4: "99.99%", 1e-3: "99.9%", 1e-2: "99%", 0.1: "90%", 1.0: "none"}  # by share missed
SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 12,
    "text.color": LIGHT["text"],
    "axes.labelcolor": LIGHT["quiet"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["quiet"],
    "ytick.labelcolor": LIGHT["quiet"],
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}.{size}": 0 for axis in ("xtick", "ytick") for size in ("major.size", "minor.size")},
}


def chart(draw: Callable[["Axes"], object], label: str, width: int, height: int, css: str = "") -> str:
    """What `draw` draws, about that many pixels large; no other chart of a page has the same `label` and `css`."""
    import matplotlib
    from matplotlib.figure import Figure

    written = io.StringIO()
    settings: Any = SETTINGS | {"svg.hashsalt": label + css}
    with matplotlib.rc_context(settings):
        picture = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(picture.subplots())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        picture.savefig(written, format="svg", transparent=True, metadata=no_metadata)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].strip()  # without the head of an XML file
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.replace("<svg", f'<svg class="{css}" role="img" aria-label="{escape(label)}"', 1)


def colour(number: int) -> str:
    """Of the layer of that number; they repeat."""
    return LIGHT[f"c{number % COLOURS}"]


@dataclass(frozen=True)
class Line:
    """One curve: its name, which colour it has, its points, and its last figure, which is measured otherwise."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    end: float

    @property
    def lowest(self) -> float:
        """The least figure that is drawn."""
        return min(self.end, *(y for _, y in self.points))


def useful_top(lines: Sequence[Line]) -> float:
    """The largest y worth drawing: the differences at the end take up half of the height, or more.

    The first points of a training run are worse by orders of magnitude: drawn, they would squeeze all others.
    """
    low = min(line.lowest for line in lines)
    worst_end = max(max(line.end, line.points[-1][1]) for line in lines)
    highest = max(worst_end, *(y for line in lines for _, y in line.points))
    return min(highest, low * max(worst_end / low, NEAR) ** 2)


def line_chart(
    lines: Sequence[Line], x_label: str, label: str, *, width: int = WIDE, height: int = 340, css: str = ""
) -> str:
    """The lines over a linear x from 0 and a logarithmic y, each named at its right end; no legend to look up.

    What lies above `useful_top` is cut off; a line's `end` is drawn as a diamond at its last point, and its figure
    stands beside the name where the chart is wide.
    """

    def draw(axes: "Axes") -> None:
        for line in lines:
            axes.plot(
                *zip(*line.points, strict=True), "o-", color=colour(line.colour), markersize=5, linewidth=2.5
            )
            axes.plot(line.points[-1][0], line.end, "D", color=colour(line.colour), markersize=9)
        low, high = 0.96 * min(line.lowest for line in lines), 1.03 * useful_top(lines)
        most = max(line.points[-1][0] for line in lines)
        axes.set(xlabel=x_label, xlim=(0, 1.03 * most), yscale="log", ylim=(low, high))
        round_ticks(axes.yaxis, low, high)
        wanted = [math.log(line.end / low) / math.log(high / low) for line in lines]
        for line, place in zip(lines, spread(wanted, LABEL_GAP / (height - 60)), strict=True):
            said = f"{line.name} {figure(line.end)}" if width >= WIDE else line.name
            style: dict[str, Any] = {"color": colour(line.colour), "weight": "bold", "va": "center"}
            axes.annotate(said, (1.01, place), xycoords="axes fraction", annotation_clip=False, **style)

    return chart(draw, label, width, height, css)


def round_ticks(axis: "Axis", low: float, high: float) -> None:
    """Few round numbers on a logarithmic axis, which has powers of ten alone where it spans many."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    if high < 30 * low:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda tick, _: f"{tick:,.6g}")


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions near the wanted ones and in their order, at least `gap` apart."""
    placed, last = list(wanted), -math.inf
    for i in sorted(range(len(wanted)), key=wanted.__getitem__):
        placed[i] = last = max(wanted[i], last + gap)
    return placed


def are_alike(values: Sequence[float]) -> bool:
    """Whether bars that start at zero would hardly show a difference between the values."""
    return len(set(values)) > 1 and min(values) > ALIKE * max(values)


def bar_chart(
    names: list[str], values: list[float], shown: list[str], numbers: list[int], best: set[str], label: str
) -> str:
    """A bar for each name, its figure beside it; dots on a scale of their own where the values `are_alike`.

    Args:
        names, values, shown, numbers: of each bar its name, its length, its figure, and which colour it has.
        best: figures that are marked.
        label: what the chart is about.
    """

    def draw(axes: "Axes") -> None:
        rows, colours = range(len(names)), [colour(number) for number in numbers]
        if are_alike(values):
            axes.scatter(values, rows, color=colours, s=70, clip_on=False)
        else:
            axes.barh(rows, values, color=colours, height=0.5)
            axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks(rows, names, color=LIGHT["text"])
        axes.set_ylim(len(names) - 0.5, -0.5)
        for row, said in zip(rows, shown, strict=True):
            weight: dict[str, Any] = {"weight": "bold", "color": LIGHT["best"]} if said in best else {}
            axes.annotate(said, (1.02, row), xycoords=("axes fraction", "data"), va="center", **weight)

    return chart(draw, label, BARS_WIDTH, BAR_HEIGHT * len(names) + 10)


@dataclass(frozen=True)
class Point:
    """One screen: its number in the table, milliseconds a query, and the share of the true best that it misses."""

    number: int
    ms: float
    missed: float
    proved: bool
    chosen: bool


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, the fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.ms, point.missed)):
        if not best or point.missed < best[-1].missed:
            best.append(point)
    return best


def scatter_chart(
    points: Sequence[Point], full_ms: float, allowed: float, label: str, *, width: int, height: int, css: str = ""
) -> str:
    """Screens by time and agreement, both logarithmic, and their frontier; up and left is better.

    Args:
        points: the screens; a square where every result is proved, else a circle; the chosen one has a ring.
        full_ms: the full layer's time, a dashed line.
        allowed: the share that may be missed, a dotted line.
    """

    def draw(axes: "Axes") -> None:
        times = [*(point.ms for point in points), full_ms]
        worst = max(allowed, *(point.missed for point in points))
        ticks = [tick for tick in FOUND if tick / 10 < worst]
        fast, slow = min(times) / 1.3, 1.3 * max(times)
        axes.set(xlabel="milliseconds a query", xscale="log", xlim=(fast, slow))
        axes.set(yscale="log", ylim=(2 * max(worst, ticks[-1]), ALL / 3))
        axes.set_yticks(ticks, [FOUND[tick] for tick in ticks])
        axes.minorticks_off()
        round_ticks(axes.xaxis, fast, slow)
        axes.axvline(full_ms, color=LIGHT["quiet"], linestyle="--", linewidth=1)
        axes.axhline(max(allowed, ALL), color=LIGHT["quiet"], linestyle=":", linewidth=1.5)
        best = frontier(points)
        ends = [*(point.ms for point in best), slow]
        heights = [max(point.missed, ALL) for point in best]
        axes.step(ends, [*heights, heights[-1]], where="post", color=LIGHT["best"], linewidth=2)
        for above, point in enumerate(sorted(points, key=lambda point: point.ms)):
            where = (point.ms, max(point.missed, ALL))
            style: dict[str, Any] = {"color": colour(0 if point.proved else 1)}
            axes.plot(*where, marker="s" if point.proved else "o", markersize=9, **style)
            if point.chosen:
                axes.plot(*where, marker="o", markersize=20, fillstyle="none", color=LIGHT["best"], mew=2.5)
            offset = (0, 17 if above % 2 else -17)  # neighbours in time do not cover each other's number
            style |= {"weight": "bold", "ha": "center", "va": "center", "textcoords": "offset points"}
            axes.annotate(str(point.number), where, offset, **style)

    return chart(draw, label, width, height, css)

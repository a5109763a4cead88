"""A line chart as SVG that takes its colours from the page: `.line-0`, `.line-1`, ... and `.axis`, `.grid`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from lastlayer.study.report.figures import figure

LEFT, TOP, BOTTOM = 52, 14, 40  # margins
LABEL_GAP = 17  # between the names at the right
LETTER = 7.4  # width of one, about
ENDS_SHARE = 0.5  # of the height, which the differences at the end have at the least
NEAR = 2.0  # ends within this factor are drawn as if they were this far apart


@dataclass(frozen=True)
class Line:
    """One curve: its name, which colour it has, its points, and a last figure that is measured otherwise."""

    name: str
    colour: int
    points: list[tuple[float, float]]
    end: float | None = None

    @property
    def last(self) -> float:
        """Where the line's name is put."""
        return self.points[-1][1] if self.end is None else self.end

    def label(self, with_figure: bool) -> str:
        """The name, with the last figure where there is one and it is wanted."""
        return f"{self.name} {figure(self.end)}" if with_figure and self.end is not None else self.name


@dataclass(frozen=True)
class Frame:
    """Where values are drawn: x linear from 0, y logarithmic."""

    width: int
    height: int
    right: float  # margin, for the names
    most: float  # the largest x
    low: float
    high: float

    @property
    def plot_width(self) -> float:
        """The width between the margins."""
        return self.width - LEFT - self.right

    def x(self, value: float) -> float:
        """The place of a value from the left."""
        return LEFT + self.plot_width * value / self.most

    def y(self, value: float) -> float:
        """The place of a value from the top."""
        share = (math.log(value) - math.log(self.low)) / max(math.log(self.high) - math.log(self.low), 1e-9)
        return TOP + (self.height - TOP - BOTTOM) * (1 - share)


def useful_top(lines: list[Line]) -> float:
    """The largest y worth drawing: the differences at the end take up half of the height, or more.

    The first points of a training run are worse by orders of magnitude: drawn, they would squeeze all others.
    """
    values = [y for line in lines for _, y in line.points] + [line.last for line in lines]
    low, worst_end = min(values), max(max(line.last, line.points[-1][1]) for line in lines)
    span = math.log(max(worst_end / low, NEAR)) / ENDS_SHARE
    return min(max(values), low * math.exp(span))


def line_chart(
    lines: list[Line],
    *,
    width: int,
    height: int,
    x_label: str,
    y_label: str,
    css: str,
    key: str = "chart",  # of this chart on its page
    figures: bool = True,  # beside the names
) -> str:
    """The lines over a linear x from 0 and a logarithmic y, each named at its right end; no legend to look up.

    What lies above `useful_top` is cut off; a line's `end` is drawn as a diamond at its last point.
    """
    top, labels = useful_top(lines), [line.label(figures) for line in lines]
    shown = [y for line in lines for _, y in line.points if y <= top] + [line.last for line in lines]
    ticks = log_ticks(min(shown), top)
    frame = Frame(
        width,
        height,
        right=14 + LETTER * max(map(len, labels)),
        most=max(x for line in lines for x, _ in line.points),
        low=min(*shown, ticks[0]),
        high=max(top, ticks[-1]),
    )
    parts = [
        f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)}">',
        f'<clipPath id="plot-{key}"><rect x="{LEFT}" y="{TOP}" width="{frame.plot_width:.1f}" '
        f'height="{height - TOP - BOTTOM}"/></clipPath>',
        *axes(
            [(frame.y(tick), figure_of(tick)) for tick in ticks],
            [(frame.x(tick), figure_of(tick)) for tick in linear_ticks(frame.most)],
            x_label,
            LEFT + frame.plot_width,
            height,
        ),
    ]
    places = spread([frame.y(line.last) for line in lines], LABEL_GAP, TOP, height - BOTTOM)
    for line, label, place in zip(lines, labels, places, strict=True):
        parts += _drawn(line, frame, key, top)
        at = f'x="{frame.x(line.points[-1][0]) + 11:.1f}" y="{place + 4:.1f}"'
        parts.append(f'<text class="name line-{line.colour}" {at}>{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"])


def axes(
    rows: Iterable[tuple[float, str]], columns: Iterable[tuple[float, str]], label: str, end: float, height: int
) -> list[str]:
    """Grid lines from the left margin to `end`, each a place and its figure; figures below; what these are of."""
    parts = []
    for y, said in rows:
        parts += [straight("grid", LEFT, end, y, y), _axis_text(LEFT - 7, y + 4, said, "end")]
    parts += [_axis_text(x, height - BOTTOM + 18, said, "middle") for x, said in columns]
    return [*parts, _axis_text((LEFT + end) / 2, height - 5, escape(label), "middle")]


def straight(css: str, x1: float, x2: float, y1: float, y2: float) -> str:
    """A straight line."""
    return f'<line class="{css}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _axis_text(x: float, y: float, said: str, anchor: str) -> str:
    """A word or figure in the style of the axes."""
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{said}</text>'


def _drawn(line: Line, frame: Frame, key: str, top: float) -> list[str]:
    """The curve inside the plot, its dots, and the diamond of its end."""
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    parts = [f'<polyline class="line line-{line.colour}" clip-path="url(#plot-{key})" points="{path}"/>']
    for x, y in line.points:
        if y <= top:
            said = f"{escape(line.name)}: {figure(y)} at {figure(x)}"
            parts.append(
                f'<circle class="dot line-{line.colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">'
                f"<title>{said}</title></circle>"
            )
    if line.end is not None:
        x, y = frame.x(line.points[-1][0]), frame.y(line.end)
        parts.append(
            f'<path class="end line-{line.colour}" d="M{x - 6:.1f} {y:.1f}L{x:.1f} {y - 6:.1f}'
            f'L{x + 6:.1f} {y:.1f}L{x:.1f} {y + 6:.1f}Z"><title>{escape(line.label(True))}</title></path>'
        )
    return parts


def figure_of(tick: float) -> str:
    """A tick without needless decimals."""
    return f"{tick:,.6g}" if tick < 1e6 else f"{tick:,.0f}"


def linear_ticks(most: float) -> list[float]:
    """0 and three to six round steps up to `most`."""
    step = round_step(most / 5)
    return [round(step * i, 10) for i in range(int(most / step + 1e-9) + 1)]


def round_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten: the least that is no smaller."""
    unit = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from just below `low` to `high`, at most nine: powers of ten alone where they span many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1,)):
        steps = [round(m * 10.0**d, 12) for d in decades for m in multiples]
        first = max(i for i, tick in enumerate(steps) if tick <= low * 1.0000001)
        ticks = [tick for tick in steps[first:] if tick <= high * 1.0000001]
        if len(ticks) <= 9:
            break
    return ticks


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart where there is space."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap) if placed else max(wanted[i], low))
    ceiling = high
    for at in reversed(range(len(placed))):
        placed[at] = min(placed[at], ceiling)
        ceiling = placed[at] - gap
    return [placed[order.index(i)] for i in range(len(wanted))]

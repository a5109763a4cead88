"""A line chart as SVG that takes its colours from the page: `.line-0`, `.line-1`, ... and `.axis`, `.grid`."""

import math
from dataclasses import dataclass
from html import escape

from lastlayer.study.report.figures import figure

LEFT, TOP, BOTTOM = 52, 14, 40  # margins
LABEL_GAP = 17  # between the names at the right
LETTER = 7.4  # width of one, about


@dataclass(frozen=True)
class Line:
    """One curve: its name, which colour it has, and its points."""

    name: str
    colour: int
    points: list[tuple[float, float]]


def line_chart(
    lines: list[Line], *, cap: float, width: int, height: int, x_label: str, y_label: str, css: str
) -> str:
    """The lines over a linear x from 0 and a logarithmic y, each named at its right end; no legend to look up.

    Points above `cap` are drawn at it.
    """
    lines = [Line(line.name, line.colour, [(x, min(y, cap)) for x, y in line.points]) for line in lines]
    right = 12 + LETTER * max(len(line.name) for line in lines)
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks, y_ticks = linear_ticks(max(xs)), log_ticks(min(ys), max(ys))
    low, high = math.log(min(*ys, y_ticks[0])), math.log(max(*ys, y_ticks[-1]))
    plot_width, plot_height = width - LEFT - right, height - TOP - BOTTOM

    def at_x(x: float) -> float:
        return LEFT + plot_width * x / max(xs)

    def at_y(y: float) -> float:
        return TOP + plot_height * (1 - (math.log(y) - low) / max(high - low, 1e-9))

    parts = [f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)}">']
    for tick in y_ticks:
        y = at_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + plot_width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="axis" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{figure_of(tick)}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text class="axis" x="{at_x(tick):.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">'
            f"{figure_of(tick)}</text>"
        )
    parts.append(
        f'<text class="axis" x="{LEFT + plot_width / 2:.1f}" y="{height - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    labels = spread([at_y(line.points[-1][1]) for line in lines], LABEL_GAP, TOP, height - BOTTOM)
    for line, label_y in zip(lines, labels, strict=True):
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline class="line line-{line.colour}" points="{path}"/>')
        for x, y in line.points:
            parts.append(
                f'<circle class="dot line-{line.colour}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3">'
                f"<title>{escape(line.name)}: {figure(y)} at {figure(x)}</title></circle>"
            )
        at = f'x="{at_x(line.points[-1][0]) + 9:.1f}" y="{label_y + 4:.1f}"'
        parts.append(f'<text class="name line-{line.colour}" {at}>{escape(line.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def figure_of(tick: float) -> str:
    """A tick without needless decimals."""
    return f"{tick:,.6g}" if tick < 1e6 else f"{tick:,.0f}"


def linear_ticks(most: float) -> list[float]:
    """0 and three to six round steps up to `most`."""
    rough = most / 5
    unit = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [round(step * i, 10) for i in range(int(most / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """The 1, 2 and 5 times powers of ten from just below `low` to `high`; powers of ten alone where many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1, 2, 5), (1,)):
        steps = [m * 10.0**d for d in decades for m in multiples]
        first = max(i for i, tick in enumerate(steps) if tick <= low * 1.0000001)
        ticks = [tick for tick in steps[first:] if tick <= high * 1.0000001]
        if len(ticks) <= 9:
            break
    return ticks


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart where there is room."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap) if placed else max(wanted[i], low))
    ceiling = high
    for at in reversed(range(len(placed))):
        placed[at] = min(placed[at], ceiling)
        ceiling = placed[at] - gap
    return [placed[order.index(i)] for i in range(len(wanted))]

"""Screens as points of an SVG, time against agreement; the frontier, the full layer and the target as lines."""

import math
from dataclasses import dataclass
from html import escape

from lastlayer.study.report.chart import BOTTOM, LEFT, TOP, axes, figure_of, log_ticks, spread, straight
from lastlayer.study.report.figures import figure

RIGHT = 16
ALL = 1e-5  # share missed at which "none is missed" is drawn, which a logarithm cannot show
FOUND = ((ALL, "all"), (1e-4, "99.99%"), (1e-3, "99.9%"), (1e-2, "99%"), (0.1, "90%"), (1.0, "none"))
NUMBER_GAP, NEAR = 16, 12  # between the numbers of neighbours; what counts as the same height
RADIUS = 5


@dataclass(frozen=True)
class Point:
    """One screen: its number in the table, milliseconds a query, and the share of the true best that it misses."""

    number: int
    name: str
    ms: float
    missed: float
    proved: bool
    chosen: bool


@dataclass(frozen=True)
class Plane:
    """Where points are drawn: time to the right, agreement upwards, both logarithmic."""

    width: int
    height: int
    fastest: float
    slowest: float
    worst: float  # share missed

    def x(self, ms: float) -> float:
        """The place of a time from the left."""
        share = math.log(ms / self.fastest) / math.log(self.slowest / self.fastest)
        return LEFT + (self.width - LEFT - RIGHT) * share

    def y(self, missed: float) -> float:
        """The place of a share missed from the top; "all found" is a little below it."""
        least = ALL / 3
        share = math.log(max(missed, ALL) / least) / math.log(self.worst / least)
        return TOP + (self.height - TOP - BOTTOM) * share


def frontier(points: list[Point]) -> list[Point]:
    """Those that no other beats in both, the fastest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.ms, point.missed)):
        if not best or point.missed < best[-1].missed:
            best.append(point)
    return best


def scatter(points: list[Point], *, full_ms: float, allowed: float, width: int, height: int, css: str) -> str:
    """The points, their numbers and the lines; up and left is better. `allowed`: the share that may be missed."""
    times = [*(point.ms for point in points), full_ms]
    worst = max(allowed, *(point.missed for point in points))
    shown = [row for i, row in enumerate(FOUND) if i == 0 or FOUND[i - 1][0] < worst]
    plane = Plane(width, height, min(times) / 1.2, max(times) * 1.2, shown[-1][0])
    ticks = [tick for tick in log_ticks(plane.fastest, plane.slowest) if plane.fastest <= tick <= plane.slowest]
    parts = [
        f'<svg class="{css}" viewBox="0 0 {width} {height}" role="img" aria-label="agreement against time">',
        *axes(
            [(plane.y(missed), said) for missed, said in shown],
            [(plane.x(tick), figure_of(tick)) for tick in ticks],
            "milliseconds a query",
            width - RIGHT,
            height,
        ),
        straight("full", plane.x(full_ms), plane.x(full_ms), TOP, height - BOTTOM),
        straight("required", LEFT, width - RIGHT, plane.y(allowed), plane.y(allowed)),
        _frontier(points, plane),
        *(_marker(point, plane) for point in points),
        *_numbers(points, plane),
    ]
    return "\n".join([*parts, "</svg>"])


def _frontier(points: list[Point], plane: Plane) -> str:
    """The agreement that is to be had in a given time: level until the next point."""
    best = frontier(points)
    places = [(plane.x(point.ms), plane.y(point.missed)) for point in best]
    path = "".join(f"H{x:.1f}V{y:.1f}" for x, y in places[1:])
    x, y = places[0]
    return f'<path class="frontier" d="M{x:.1f} {y:.1f}{path}H{plane.width - RIGHT}"/>'


def _marker(point: Point, plane: Plane) -> str:
    """A square where the result is proved, else a circle; the chosen one has a ring."""
    x, y = plane.x(point.ms), plane.y(point.missed)
    said = f"{point.number}: {point.name}, {figure(point.ms)} ms, {1 - point.missed:.4%} found"
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="{2 * RADIUS}"/>' if point.chosen else ""
    if point.proved:
        side = 2 * RADIUS
        shape = (
            f'<rect class="dot line-0" x="{x - RADIUS:.1f}" y="{y - RADIUS:.1f}" width="{side}" height="{side}">'
        )
        return f"{ring}{shape}<title>{escape(said)}</title></rect>"
    shape = f'<circle class="dot line-1" cx="{x:.1f}" cy="{y:.1f}" r="{RADIUS}">'
    return f"{ring}{shape}<title>{escape(said)}</title></circle>"


def _numbers(points: list[Point], plane: Plane) -> list[str]:
    """Below the points, moved sideways where neighbours at the same height would cover each other's."""
    parts, left = [], sorted(points, key=lambda point: plane.y(point.missed))
    while left:
        top = plane.y(left[0].missed)
        row = [point for point in left if plane.y(point.missed) - top < NEAR]
        left = left[len(row) :]
        places = spread([plane.x(point.ms) for point in row], NUMBER_GAP, LEFT + 8, plane.width - RIGHT)
        for point, x in zip(row, places, strict=True):
            y = plane.y(point.missed) + 4.4 * RADIUS
            css = f"name line-{0 if point.proved else 1}"
            parts.append(f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{point.number}</text>')
    return parts

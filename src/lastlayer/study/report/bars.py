"""Groups of bars in HTML: one figure of every layer, the best one marked."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from lastlayer.study.report.chart import round_step

ALIKE = 0.75  # the smallest over the largest, from which bars that start at zero show no difference


@dataclass(frozen=True)
class Bar:
    """One row of a group; `value` None leaves it out, `remark` is said below it."""

    name: str
    value: float | None
    colour: int
    remark: str = ""


def bar_group(
    title: str, note: str, bars: list[Bar], shown: Callable[[float], str], *, lower_is_better: bool
) -> str:
    """A section of bars from zero; of dots on a scale that does not start at zero where the values are alike."""
    values = [bar.value for bar in bars if bar.value is not None]
    alike = len(set(map(shown, values))) > 1 and min(values) > ALIKE * max(values)
    draw = _on_a_scale(values) if alike else _from_zero(values)
    best = best_figures([shown(value) for value in values], values, lower_is_better)
    rows = [
        _row(bar, shown(bar.value), draw(bar.value), shown(bar.value) in best)
        for bar in bars
        if bar.value is not None
    ]
    scale = ""
    if alike:
        low, high = scale_around(values)
        scale = f'<div class="ends"><span>{shown(low)}</span><span>{shown(high)}</span></div>'
        note += "; the scale does not start at zero"
    return f'<section><h3>{escape(title)}</h3><p class="quiet">{escape(note)}</p>{"".join(rows)}{scale}</section>'


def best_figures(shown: list[str], values: list[float], lower_is_better: bool) -> set[str]:
    """How the best value is written; none where most are written so, or there is one only."""
    if len(values) < 2:
        return set()
    best = shown[values.index(min(values) if lower_is_better else max(values))]
    return {best} if shown.count(best) <= len(shown) / 2 else set()


def scale_around(values: list[float]) -> tuple[float, float]:
    """Round numbers below and above all values, not far from them."""
    low, high = min(values), max(values)
    step = round_step((high - low) / 2)
    return math.floor(low / step - 1e-9) * step, math.ceil(high / step + 1e-9) * step


def _row(bar: Bar, shown: str, drawn: str, is_best: bool) -> str:
    mark = ' <b class="best">best</b>' if is_best else ""
    remark = f'<span class="remark">{escape(bar.remark)}</span>' if bar.remark else ""
    return (
        f'<div class="row"><span>{escape(bar.name)}{mark}</span><span class="value">{shown}</span>'
        f"{drawn.format(colour=bar.colour)}{remark}</div>"
    )


def _from_zero(values: list[float]) -> Callable[[float], str]:
    most = max(values, default=0.0) or 1.0
    return lambda value: (
        f'<div class="bar fill-{{colour}}" style="width:{max(0.5, 100 * value / most):.1f}%"></div>'
    )


def _on_a_scale(values: list[float]) -> Callable[[float], str]:
    low, high = scale_around(values)

    def draw(value: float) -> str:
        place = 100 * (value - low) / (high - low)
        return f'<div class="track"><i class="fill-{{colour}}" style="left:{place:.1f}%"></i></div>'

    return draw

"""Charts and figures: readable at any range."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from lastlayer.study.report.chart import Line, line_chart, linear_ticks, log_ticks, spread
from lastlayer.study.report.figures import duration, figure


def draw(lines, **options):
    settings = {"cap": 1e9, "width": 400, "height": 300, "x_label": "s", "y_label": "perplexity", "css": "wide"}
    return ET.fromstring(line_chart(lines, **(settings | options)))


def test_figures():
    shown = [figure(v) for v in (0, 0.01234, 4.5, 67.84, 999.6, 12_345.6, 1e-9, 1e30)]
    assert shown == ["0", "0.0123", "4.50", "67.8", "1,000", "12,346", "0.000000", "1.00e+30"]
    shown = [duration(s) for s in (0.2, 75, 212, 290, 1000, 7200)]
    assert shown == ["1 second", "75 seconds", "3.5 minutes", "5 minutes", "17 minutes", "2.0 hours"]


@pytest.mark.parametrize("most", [0.3, 1, 6.2, 60, 299, 300, 86_400])
def test_linear_ticks_are_few_and_round(most):
    ticks = linear_ticks(most)
    assert ticks[0] == 0
    assert 3 <= len(ticks) <= 6
    assert ticks[-1] <= most


@pytest.mark.parametrize(("low", "high"), [(1.4, 30), (100, 100), (95, 1200), (80, 5e6)])
def test_log_ticks_cover(low, high):
    ticks = log_ticks(low, high)
    assert ticks[0] <= low
    assert 1 <= len(ticks) <= 9
    assert all(a < b for a, b in pairwise(ticks))


def test_names_do_not_overlap():
    placed = spread([50.0, 51.0, 49.0, 200.0], 17, 0, 200)
    assert all(b - a >= 17 for a, b in pairwise(sorted(placed)))
    assert placed[2] < placed[0] < placed[1] < placed[3] <= 200


def test_chart_is_inside_its_frame_and_well_formed():
    lines = [
        Line("a & b", 0, [(1.0, 900.0), (60.0, 120.0)]),
        Line("long name here", 1, [(2.0, 1e30), (60.0, 119.0)]),
    ]
    svg = draw(lines, cap=1000.0)
    circles = [node for node in svg if node.tag == "circle"]
    assert len(circles) == 4
    for node in svg:
        for axis, limit in (("x", 400), ("cx", 400), ("y", 300), ("cy", 300), ("y1", 300), ("x2", 400)):
            assert 0 <= float(node.get(axis, 0)) <= limit
    assert [node.text for node in svg if node.get("class", "").startswith("name")] == ["a & b", "long name here"]


def test_one_point_and_equal_values():
    svg = draw([Line("only", 0, [(3.0, 50.0)])])
    assert math.isfinite(float(next(node for node in svg if node.tag == "circle").get("cy", "nan")))

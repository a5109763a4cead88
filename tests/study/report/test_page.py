"""Charts and figures are readable at any range; the page states what was measured and which layer is best."""

import copy
import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from lastlayer.study.report.charts import (
    Line,
    Point,
    bar_chart,
    frontier,
    line_chart,
    scatter_chart,
    spread,
    useful_top,
)
from lastlayer.study.report.comparison import best_first
from lastlayer.study.report.figures import Measure, duration, figure
from lastlayer.study.report.page import render

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "compare_wikitext2.json"
SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    """Every text of a drawing, and that it is well formed."""
    return [node.text for node in ET.fromstring(svg).iter(f"{SVG}text")]


def test_figures():
    shown = [figure(v) for v in (0, 0.01234, 4.5, 67.84, 999.6, 12_345.6, 1e-9, 1e30)]
    assert shown == ["0", "0.0123", "4.50", "67.8", "1,000", "12,346", "0.000000", "1.00e+30"]
    shown = [duration(s) for s in (0.2, 75, 212, 290, 1000, 7200)]
    assert shown == ["1 second", "75 seconds", "3.5 minutes", "5 minutes", "17 minutes", "2.0 hours"]


def test_names_do_not_overlap():
    placed = spread([50.0, 51.0, 49.0, 200.0], 17)
    assert all(b - a >= 17 for a, b in pairwise(sorted(placed)))
    assert placed[2] < placed[0] < placed[1] < placed[3] == 200


def test_lines_are_named_and_take_their_colours_from_the_page():
    lines = [
        Line("a & b", 0, [(1.0, 900.0), (60.0, 120.0)], 121.0),
        Line("c", 9, [(2.0, 1e30), (60.0, 119.0)], 118.0),
    ]
    svg = line_chart(lines, "seconds", "perplexity", css="wide")
    assert {"a & b 121", "c 118", "seconds", "400"} <= set(texts(svg))
    assert {"var(--c0)", "var(--c1)", "var(--quiet)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert not re.search("#[0-9a-f]{6}", svg)
    assert {"a & b", "c"} <= set(texts(line_chart(lines, "seconds", "perplexity", width=340)))


@pytest.mark.parametrize("worst", [100.0, 1e4, 1e30])
def test_the_beginning_does_not_squeeze_the_end(worst):
    """However bad the first point of one layer, the ends differ by half of the height."""
    lines = [Line(str(end), i, [(1.0, worst), (60.0, end)], end) for i, end in enumerate((30.0, 31.0, 90.0))]
    assert useful_top(lines) <= 30.0 * (90 / 30) ** 2 * 1.001


def test_one_point_and_equal_values():
    assert "only 50.0" in texts(line_chart([Line("only", 0, [(3.0, 50.0)], 50.0)], "s", "perplexity"))


def test_bars_of_values_that_are_alike_show_the_difference():
    """As dots on a scale that does not start at zero."""
    names = ["a", "b", "c"]
    for values, dots in (([0.669, 0.666, 0.65], 3), ([1.0, 4.0, 2.0], 0), ([1.0, 1.0, 1.0], 0)):
        svg = bar_chart(names, values, list(map(str, values)), [0, 1, 2], {"4.0"}, "label")
        assert svg.count("<use ") == dots
        assert {*names, *map(str, values)} <= set(texts(svg))
        assert svg.count("var(--best)") == (4.0 in values)


@pytest.mark.parametrize(
    ("values", "better", "best"),
    [
        ([2.0, 1.0, 3.0], "lower", {"1.0"}),
        ([2.0, None, 3.0], "higher", {"3.0"}),
        ([1.0, 2.0], "", set()),
        ([1.0, 1.0, 1.0], "lower", set()),
        ([1.0, None], "lower", set()),
    ],
)
def test_the_best_is_marked_where_one_is(values, better, best):
    records = [{"x": value} for value in values]
    assert Measure("x", lambda r: r["x"], str, better).best(records) == best


@pytest.fixture(scope="module")
def committed():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


@pytest.fixture
def results(committed):
    return copy.deepcopy(committed)


@pytest.fixture(scope="module")
def page(committed):
    return render(committed)


def test_page_names_both_held_out_sets(committed, page):
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page))
    assert "on the first 4,000 held-out words. Diamonds: at the end, on 217,500: the figures above." in text
    assert all(f"{r['layer']} {figure(r['perplexity'])}" in text for r in committed["records"])


def test_page_marks_the_winner_and_says_that_the_table_scrolls(page):
    assert re.search(
        r'<tr class=winner><td>adaptive</td><td data-value="134.5\d*"><b class="best">135</b></td>', page
    )
    assert "scrolls sideways" in page
    assert "on one machine (Intel(R) Xeon(R) Processor, 2 threads)" in page
    assert page.count("million words read</text>") == page.count("seconds of training</text>") == 2
    ids = re.findall(r'<clipPath id="(\w+)"', page)
    assert len(ids) == len(set(ids))  # no chart refers to another's
    for said in ("Without a perplexity", "zero probability", "no screen is needed here"):
        assert said not in page


def test_page_of_other_results(results):
    """Few characters, kernels in plain PyTorch, a screen slower than its layer, a name with signs."""
    results["text"] |= {"unit": "characters", "name": "<b>&"}
    results["environment"]["isa"] = None
    for curve in results["curves"].values():
        for point in curve:
            point["tokens"] //= 1000
    record = next(r for r in results["records"] if r["screened_query_ms"] is not None)
    record["screened_query_ms"] = 2 * record["query_ms"]
    page = render(results)
    assert "characters to learn from" in page
    assert "words" not in page
    assert "<b>&</h1>" not in page
    assert "kernels in plain PyTorch" in page
    assert page.count("thousand characters read</text>") == 2
    assert f"{record['layer']}, screened: 2.0 times as slow as the layer itself: no screen is needed here" in page


def without_perplexity(results, layer, share):
    """That layer gives a share of what is held out probability 0; None: it has scores."""
    record = next(r for r in results["records"] if r["layer"] == layer)
    record |= {"perplexity": None, "zero_probability_share": share}
    results["curves"][layer] = [point | {"perplexity": None} for point in results["curves"][layer]]


def test_a_layer_without_perplexity_is_named_and_not_drawn(results):
    without_perplexity(results, "full", 0.00001)
    without_perplexity(results, "adaptive", None)
    page = render({**results, "records": best_first(results["records"])})
    assert "full has no perplexity: 0.001% of the held-out words have probability 0" in page
    assert "adaptive has no perplexity: its scores are no probabilities" in page
    curves = page[page.index("<figure") : page.index("</figure>")]
    assert ("hierarchical" in curves, "adaptive" in curves, "full" in curves) == (True, False, False)
    best = max(results["records"], key=lambda r: r["top10_accuracy"])
    assert f"<b>{best['layer']}</b> has the next word among its ten best most often" in page
    assert '<td data-value="1e-05">0.001%</td>' in page
    assert "None" not in page


def test_no_layer_has_a_perplexity(results):
    for layer in results["curves"]:
        without_perplexity(results, layer, None)
    page = render(results)
    assert "<figure" not in page
    assert "<h3>Perplexity" not in page
    assert "None" not in page


def point(number, ms, missed, proved=False, chosen=False):
    return Point(number, ms, missed, proved, chosen)


def test_frontier_has_what_no_other_beats():
    points = [point(1, 2.0, 0.1), point(2, 1.0, 0.2), point(3, 3.0, 0.1), point(4, 4.0, 0.0), point(5, 1.0, 0.3)]
    assert [p.number for p in frontier(points)] == [2, 1, 4]


def test_scatter_names_every_screen():
    """Screens that miss none, and one that misses all."""
    points = [point(1, 1.0, 0.0, proved=True, chosen=True), point(2, 1.01, 0.0), point(3, 90.0, 1.0)]
    said = texts(scatter_chart(points, 0.5, 0.0, "screens", width=340, height=320))
    assert {"1", "2", "3", "all", "90%", "none"} <= set(said)

"""Charts, bars and figures: readable at any range; the page states what was measured and which layer is best."""

import json
import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from lastlayer.study.report.bars import Bar, bar_group, scale_around
from lastlayer.study.report.chart import Line, line_chart, linear_ticks, log_ticks, spread, useful_top
from lastlayer.study.report.figures import duration, figure
from lastlayer.study.report.page import render
from lastlayer.study.report.quality import best_first
from lastlayer.study.report.scatter import Point, frontier, scatter

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "compare_wikitext2.json"


def draw(lines, **options):
    settings = {"width": 400, "height": 300, "x_label": "s", "y_label": "perplexity", "css": "wide"}
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
        Line("long name here", 1, [(2.0, 1e30), (60.0, 119.0)], end=118.0),
    ]
    svg = draw(lines)
    circles = [node for node in svg if node.tag == "circle"]
    assert len(circles) == 2  # the first points are out of the picture
    for node in svg:
        for axis, limit in (("x", 400), ("cx", 400), ("y", 300), ("cy", 300), ("y1", 300), ("x2", 400)):
            assert 0 <= float(node.get(axis, 0)) <= limit
    assert [node.text for node in svg if node.get("class", "").startswith("name")] == [
        "a & b",
        "long name here 118",
    ]


def test_one_point_and_equal_values():
    svg = draw([Line("only", 0, [(3.0, 50.0)])])
    assert math.isfinite(float(next(node for node in svg if node.tag == "circle").get("cy", "nan")))


@pytest.mark.parametrize("worst", [100.0, 1e4, 1e30])
def test_the_beginning_does_not_squeeze_the_end(worst):
    """However bad the first point of one layer, the ends differ by half of the height."""
    ends = (30.0, 31.0, 90.0)
    lines = [Line(str(end), i, [(1.0, worst), (60.0, end)], end=end) for i, end in enumerate(ends)]
    assert useful_top(lines) <= 30.0 * (90 / 30) ** 2 * 1.001
    svg = draw(lines, height=354)  # 300 of them are drawn on
    heights = [float(node.get("d").split("L")[0].split()[1]) for node in svg if node.tag == "path"]
    assert heights[0] - heights[2] > 0.4 * 300


def test_bars_of_values_that_are_alike_show_the_difference():
    accuracy = [Bar("a", 0.669, 0), Bar("b", 0.666, 1), Bar("c", 0.65, 2)]
    section = ET.fromstring(bar_group("t", "n", accuracy, lambda v: f"{v:.1%}", lower_is_better=False))
    places = [float(node.get("style")[5:-1]) for node in section.iter("i")]
    assert places[0] - places[1] > 5
    assert places[1] - places[2] > 30
    assert "does not start at zero" in "".join(section.itertext())
    assert [node.text for node in section.iter("b")] == ["best"]
    section = ET.fromstring(bar_group("t", "n", [Bar("a", 1.0, 0), Bar("b", 4.0, 1)], str, lower_is_better=True))
    assert [node.get("style") for node in section.iter("div")][1::2] == ["width:25.0%", "width:100.0%"]


def test_scales_hold_their_values():
    for values in ([0.5, 0.5001], [3.0, 3.9], [99.0, 101.0, 120.0]):
        low, high = scale_around(values)
        assert low <= min(values) < max(values) <= high
        assert high - low < 4 * (max(values) - min(values))


@pytest.mark.parametrize(("values", "marked"), [([2.0, 1.0, 3.0], "b"), ([1.0, 1.0, 1.0], ""), ([1.0], "")])
def test_the_best_is_marked_where_one_is(values, marked):
    bars = [Bar(name, value, 0) for name, value in zip("abc", values, strict=False)]
    rows = re.findall(r"<span>(\w) <b", bar_group("t", "n", bars, str, lower_is_better=True))
    assert "".join(rows) == marked


@pytest.fixture
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_page_names_both_held_out_sets(results):
    text = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", render(results).replace("</style>", "")))
    assert "on the first 4,000 held-out words. Diamonds: at the end, on 217,500: the figures above." in text
    assert all(f"{r['layer']} {figure(r['perplexity'])}" in text for r in results["records"])


def test_page_marks_the_winner_and_says_that_the_table_scrolls(results):
    page = render(results)
    assert re.search(
        r'<tr class=winner><td>adaptive</td><td data-value="134.5\d*"><b class="best">135</b></td>', page
    )
    assert "scrolls sideways" in page


def test_a_screen_slower_than_its_layer_gets_a_word(results):
    slow = "times as slow as the layer itself: no screen is needed here"
    assert slow not in render(results)
    record = next(r for r in results["records"] if r["screened_query_ms"] is not None)
    record["screened_query_ms"] = 2 * record["query_ms"]
    assert f"2.0 {slow}" in render(results)


def test_page_says_what_its_tokens_are(results):
    results["text"] |= {"unit": "characters", "name": "<b>&"}
    page = render(results)
    assert "characters to learn from" in page
    assert "words" not in page.replace("the ten best next words", "")
    assert "<b>&</h1>" not in page


def test_page_names_the_processor(results):
    assert "on one machine (Intel(R) Xeon(R) Processor, 2 threads)" in render(results)
    results["environment"]["isa"] = "avx2"
    assert "Intel(R) Xeon(R) Processor, 2 threads, kernels for avx2)" in render(results)
    results["environment"]["isa"] = None
    assert "kernels in plain PyTorch" in render(results)


def test_curves_are_drawn_against_time_and_against_words(results):
    page = render(results)
    assert page.count("million words read</text>") == page.count("seconds of training</text>") == 2
    for curve in results["curves"].values():
        for point in curve:
            point["tokens"] //= 1000
    assert render(results).count("thousand words read</text>") == 2
    assert len(set(re.findall(r'<clipPath id="([\w-]+)"', page))) == 4  # each chart has its own


def without_perplexity(results, layer, share):
    """That layer gives a share of what is held out probability 0; None: it has scores."""
    record = next(r for r in results["records"] if r["layer"] == layer)
    record |= {"perplexity": None, "zero_probability_share": share}
    results["curves"][layer] = [point | {"perplexity": None} for point in results["curves"][layer]]


def test_a_layer_without_perplexity_is_named_and_not_drawn(results):
    assert "Without a perplexity" not in render(results)
    assert "zero probability" not in render(results).lower()
    without_perplexity(results, "full", 0.00001)
    without_perplexity(results, "adaptive", None)
    page = render({**results, "records": best_first(results["records"])})
    assert "Without a perplexity: " in page
    assert "full: 0.001% of the held-out words have probability 0" in page
    assert "adaptive: its scores are no probabilities" in page
    assert page.count('<polyline class="line line-') == 4 * (len(results["records"]) - 2)
    best = max(results["records"], key=lambda r: r["top10_accuracy"])
    assert f"<b>{best['layer']}</b> has the next word among its ten best most often" in page
    assert '<td data-value="1e-05">0.001%</td>' in page
    assert "None" not in page


def test_no_layer_has_a_perplexity(results):
    for layer in results["curves"]:
        without_perplexity(results, layer, None)
    page = render(results)
    assert "<svg" not in page
    assert "<h3>Perplexity" not in page
    assert "None" not in page


def point(number, ms, missed, proved=False, chosen=False):
    return Point(number, "a <screen>", ms, missed, proved, chosen)


def test_frontier_has_what_no_other_beats():
    points = [point(1, 2.0, 0.1), point(2, 1.0, 0.2), point(3, 3.0, 0.1), point(4, 4.0, 0.0), point(5, 1.0, 0.3)]
    assert [p.number for p in frontier(points)] == [2, 1, 4]


def test_scatter_is_inside_its_frame():
    """Screens that miss none, one that misses all, and neighbours whose numbers would cover each other's."""
    points = [point(1, 1.0, 0.0, proved=True, chosen=True), point(2, 1.01, 0.0), point(3, 90.0, 1.0)]
    svg = ET.fromstring(scatter(points, full_ms=0.5, allowed=0.0, width=340, height=320, css="narrow"))
    for node in svg:
        for axis, limit in (("x", 340), ("cx", 340), ("y", 320), ("cy", 320), ("y1", 320), ("x2", 340)):
            assert 0 <= float(node.get(axis, 0)) <= limit
    dots = [node for node in svg if node.get("class", "").startswith("dot")]
    assert [node.tag for node in dots] == ["rect", "circle", "circle"]
    assert float(dots[1].get("cy")) < float(dots[2].get("cy"))  # up is better
    assert "a <screen>, 1.00 ms, 100.0000% found" in dots[0][0].text
    numbers = [float(node.get("x")) for node in svg if node.get("class", "").startswith("name")]
    assert numbers[1] - numbers[0] >= 14

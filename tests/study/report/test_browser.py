"""The pages in a real browser: switch and sorting work, and text can be read on a phone and in the dark."""

import json
from pathlib import Path

import pytest

from lastlayer.study.report.frontier_page import render_frontier
from lastlayer.study.report.page import render

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "compare_wikitext2.json"
PHONE = {"width": 375, "height": 812, "phone": True}
FIRST_CELLS = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent)"
DRAWINGS = "[...document.querySelectorAll('figure svg')]"
VISIBLE = DRAWINGS + ".filter(e => e.getClientRects().length).map(e => e.textContent)"

# Every visible piece of text: what it says, its size in pixels as shown, its contrast (WCAG) to what is behind.
TEXTS = """(() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const over = (c, below) => { const a = c[3] ?? 1; return [0, 1, 2].map(i => a * c[i] + (1 - a) * below[i]); };
  const behind = e => e === null ? [255, 255, 255]
    : over(rgb(getComputedStyle(e).backgroundColor), behind(e.parentElement));
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const said = [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
    if (!said || ["SCRIPT", "STYLE", "title"].includes(e.tagName) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e.ownerSVGElement;
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(behind(svg ? svg.parentElement : e))];
    found.push([said, scale * parseFloat(style.fontSize), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
})()"""


def screen(name, ms, found, **others):
    record = {"preview": name, "window": None, "candidates": 32, "agreement_top1": found, "agreement_topk": found}
    record |= {"kl": 0.01, "bytes_read_fraction": 0.2, "ms": ms, "full_ms": 2.0, "ratio": 2.0 / ms}
    return record | {"certified_fraction": 0.0, "dropped": None, "chosen": False} | others


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a comparison, and that of the screens of a layer."""
    folder = tmp_path_factory.mktemp("pages")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    names = list(results["layers"])
    for number in range(5):  # as many layers as there are colours
        name, like = f"other {number}", results["records"][number % 3]
        results["records"].append(like | {"layer": name, "perplexity": like["perplexity"] + 9 * number + 5})
        results["layers"][name] = "one more"
        results["curves"][name] = results["curves"][names[number % 3]]
    records = [
        screen("int4", 0.4, 1.0, certified_fraction=1.0, chosen=True),
        screen("SVD, calibrated", 0.5, 0.995),
        screen("SVD, plain", 3.0, None, agreement_top1=None, certified_fraction=None, dropped="it is slow"),
    ]
    head = {"name": "a <head>", "bytes": 10**8}
    screens = {"environment": results["environment"], "head": head, "source": "text", "agreement": 0.999, "k": 10}
    (folder / "compare.html").write_text(render(results), encoding="utf-8")
    (folder / "speedup.html").write_text(render_frontier(screens | {"records": records}), encoding="utf-8")
    return folder


def test_switch_between_time_and_words(browser, pages):
    browser.open(pages / "compare.html")
    (shown,) = browser.run(VISIBLE)
    assert "seconds of training" in shown
    browser.click("document.querySelector('.switch input[value=read]').parentElement")
    (shown,) = browser.run(VISIBLE)
    assert "million words read" in shown
    browser.click("document.querySelector('.switch input[value=time]').parentElement")
    assert "seconds of training" in browser.run(VISIBLE)[0]


def test_headings_sort_the_best_first(browser, pages):
    browser.open(pages / "compare.html")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["records"]
    heads = browser.run("[...document.querySelectorAll('th')].map(head => head.textContent)")

    def sort(heading):
        browser.click(f"document.querySelectorAll('th')[{heads.index(heading)}].querySelector('button')")
        return [name for name in browser.run(FIRST_CELLS) if not name.startswith("other")]

    def order(key, reverse=False):
        return [record["layer"] for record in sorted(results, key=lambda r: r[key], reverse=reverse)]

    assert sort("perplexity") == order("perplexity")
    assert sort("perplexity") == order("perplexity", reverse=True)
    assert sort("words/s") == order("tokens_per_second", reverse=True)
    assert sort("layer") == order("layer")
    assert sort("screen ms")[0] == "full"  # the others have none, and are last in either order
    assert sort("screen ms")[0] == "full"
    assert browser.run("document.querySelectorAll('th[aria-sort]').length") == 1


@pytest.mark.parametrize("page", ["compare.html", "speedup.html"])
@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_a_phone(browser, pages, page, dark):
    browser.open(pages / page, dark=dark, **PHONE)
    assert browser.run("document.documentElement.scrollWidth") == PHONE["width"]  # nothing is cut off at the side
    texts = browser.run(TEXTS)
    assert len(texts) > 30
    assert [text for text in texts if text[1] < 11] == []
    assert [text for text in texts if text[2] < 4.5] == []
    assert (browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)") == dark


@pytest.mark.parametrize("page", ["compare.html", "speedup.html"])
def test_a_page_asks_for_nothing_else(browser, pages, page):
    browser.open(pages / page)
    assert browser.run("performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert browser.run("document.title").startswith("lastlayer")


def test_frontier_is_drawn(browser, pages):
    browser.open(pages / "speedup.html")
    (shown,) = browser.run(VISIBLE)
    numbers = set(shown.split()) & {"1", "2", "3"}
    assert numbers == {"1", "2"}  # what was dropped has no agreement
    assert "Which screen for a <head>?" in browser.run("document.body.innerText")
    assert browser.run(FIRST_CELLS) == [
        "1 int4, 32 candidates",
        "2 SVD, calibrated, 32 candidates",
        "3 SVD, plain, 32 candidates",
    ]

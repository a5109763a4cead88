"""The README's picture: learning curves of the committed WikiText-2 run, for light and dark pages."""

import json
from pathlib import Path

from lastlayer.study.report.chart import Line, line_chart
from lastlayer.study.report.page_style import STYLE

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compare_wikitext2.json"
PICTURE = HERE.parent / "docs" / "images" / "wikitext-2.svg"
WIDTH, HEIGHT = 760, 360


def picture(results: dict) -> str:
    """The chart as an SVG that stands by itself."""
    curves = results["curves"]
    ends = {record["layer"]: record["perplexity"] for record in results["records"]}
    lines = [
        Line(name, colour, [(point["seconds"], point["perplexity"]) for point in curves[name]], ends[name])
        for colour, name in enumerate(curves)
    ]
    chart = line_chart(
        lines,
        width=WIDTH,
        height=HEIGHT,
        x_label="seconds of training",
        y_label=f"Held-out perplexity on {results['text']['name']}",
        css="picture",
    )
    head, rest = chart.split(">", 1)
    style = f"{STYLE}.picture{{--card:var(--page);background:var(--page)}}"
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}\n'


def main() -> None:
    """Draws the picture anew from the results file."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

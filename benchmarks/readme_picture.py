"""The README's picture: learning curves of the committed WikiText-2 run, for light and dark pages."""

import json
from pathlib import Path

from lastlayer.study.report.charts import Line, line_chart
from lastlayer.study.report.page_style import VARIABLES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "compare_wikitext2.json"
PICTURE = HERE.parent / "docs" / "images" / "wikitext-2.svg"
STYLE = f"{VARIABLES}svg{{background:var(--page)}}svg text{{font-family:system-ui,sans-serif!important}}"


def picture(results: dict) -> str:
    """The chart as an SVG that stands by itself."""
    curves = results["curves"]
    ends = {record["layer"]: record["perplexity"] for record in results["records"]}
    lines = [
        Line(name, colour, [(point["seconds"], point["perplexity"]) for point in curves[name]], ends[name])
        for colour, name in enumerate(curves)
    ]
    label = f"Held-out perplexity on {results['text']['name']}"
    head, rest = line_chart(lines, "seconds of training", label, height=360).split(">", 1)
    return f"{head}><style>{STYLE}</style>{rest}\n"


def main() -> None:
    """Draws the picture anew from the results file."""
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()

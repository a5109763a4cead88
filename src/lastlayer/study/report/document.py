"""The frame of a page, one file with everything in it, and its tables, which a little script sorts."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from lastlayer.study.files import Record
from lastlayer.study.report.figures import Measure, counted
from lastlayer.study.report.page_style import STYLE

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.first, second = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? second : first;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      body.append(...[...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column], column, sign)));
    });
  });
}
function compare(a, b, column, sign) {
  if (column === 0) return sign * a.textContent.localeCompare(b.textContent, undefined, {numeric: true});
  const known = cell => "value" in cell.dataset;
  if (!known(a) || !known(b)) return known(b) - known(a);
  return sign * (a.dataset.value - b.dataset.value);
}
"""


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page; no script, font or picture from elsewhere."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def sorted_table(
    heading: str, names: list[str], records: list[Record], columns: Sequence[Measure], winner: int | None
) -> str:
    """A row for each record, in their order; `winner` is the row that is marked as a whole.

    The script sorts by `data-value`, the best first; what is not known has none and comes last.
    """
    heads = f'<th data-first="ascending">{escape(heading)}</th>'
    for column in columns:
        first = "descending" if column.better == "higher" else "ascending"
        heads += f'<th data-first="{first}">{escape(column.title)}</th>'
    best = [column.best(records) for column in columns]
    rows = ""
    for i, (name, record) in enumerate(zip(names, records, strict=True)):
        rows += f"<tr{' class=winner' if i == winner else ''}><td>{escape(name)}</td>"
        for column, marked in zip(columns, best, strict=True):
            value, text = column.value(record), column.text(record)
            number = "" if value is None else f' data-value="{value!r}"'
            rows += f"<td{number}>" + (f'<b class="best">{text}</b>' if text in marked else text) + "</td>"
        rows += "</tr>\n"
    return (
        '<p class="quiet hint">The table is wider than the screen: it scrolls sideways →</p>\n'
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
        '<p class="quiet"><b class="best">Best</b> of each column; a click on a heading sorts.</p>'
    )


def machine(environment: dict[str, Any], device: str = "cpu") -> str:
    """The processor with its threads and kernels, or the GPU; older results do not say which kernels ran."""
    if device != "cpu":
        return str(environment["gpu"])
    said = f"{environment['machine']}, {counted(environment['threads'], 'thread')}"
    if "isa" not in environment:
        return said
    return f"{said}, kernels {'in plain PyTorch' if environment['isa'] is None else 'for ' + environment['isa']}"


def versions(environment: dict[str, Any]) -> str:
    """What ran there, and when."""
    return (
        f"PyTorch {environment['torch']}, lastlayer {environment['lastlayer']}, commit {environment['commit']}, "
        f"{environment['time']}"
    )

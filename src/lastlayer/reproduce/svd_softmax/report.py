"""How the SVD-softmax study is shown: its tables, and each claim beside what was measured for it."""

from rich.console import Console

from lastlayer.study.files import Record
from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import Column, print_table, say, table_of

REMEMBERED = "† (as remembered; not verified against the paper)"


def claims(records: list[Record]) -> list[Record]:
    """Each claim, what was measured for it, and under which conditions."""
    by = {(r["kind"], r["window"], r["candidates_share"]): r for r in records if r["case"] == "quality"}
    speeds = [r for r in records if r["case"] == "speed"]
    plain, tuned = by["plain", "d/8", 0.05], by["calibrated", "d/8", 0.05]
    said = "operations: perplexity {} against {} of the full softmax, KL {}, {:.1%} of the top 10"
    figures = [
        f"{r['operations']:.0%} of the "
        + said.format(*map(figure, (r["perplexity"], r["full_perplexity"], r["kl"])), r["coverage"])
        for r in (plain, tuned)
    ]
    setting = "window d/8, 5% of the classes"
    found = [
        ("about a fifth of the operations keeps the quality [paper: abstract]", figures[0], f"plain, {setting}"),
        ("none: calibration is no part of the paper", figures[1], f"calibrated, {setting}"),
    ]
    if speeds:
        near = min(speeds, key=lambda r: abs(r["num_classes"] - 2**18))
        for claim, r in (
            ("more than 3 times as fast at V = 800,000 on a GPU [paper: abstract]", speeds[-1]),
            (f"V of about 2^18 on a CPU: from 1541 to 189 ms {REMEMBERED}", near),
        ):
            times = f"{figure(r['ratio'])} times as fast, from {figure(r['full_ms'])} to {figure(r['ms'])} ms"
            threads = f"{r['threads']} CPU threads"
            found.append((claim, times, f"V = {r['num_classes']:,}, d = {r['width']}, one query, {threads}"))
    return [{"case": "claim", "claim": c, "measured": m, "conditions": w} for c, m, w in found]


QUALITY: tuple[Column, ...] = (
    ("", lambda r: f"{r['window']} {r['kind']}"),
    ("candidates", lambda r: f"{r['candidates_share']:.0%}"),
    ("operations", lambda r: f"{r['operations']:.1%}"),
    ("perplexity", lambda r: figure(r["perplexity"])),
    ("KL", lambda r: figure(r["kl"])),
    ("top 10 kept", lambda r: f"{r['coverage']:.1%}"),
)
SPEED: tuple[Column, ...] = (
    ("classes", lambda r: f"{r['num_classes']:,}"),
    ("full ms", lambda r: figure(r["full_ms"])),
    ("SVD ms", lambda r: figure(r["ms"])),
    ("times as fast", lambda r: figure(r["ratio"])),
    ("bytes", lambda r: f"{r['bytes_read_fraction']:.1%}"),
    ("exact int8 ms", lambda r: figure(r["int8_exact_ms"])),
    ("times as fast", lambda r: figure(r["int8_exact_ratio"])),
)


def show(records: list[Record], console: Console) -> None:
    """Both tables, then the claims."""
    of_case = {case: [r for r in records if r["case"] == case] for case in ("quality", "speed", "claim")}
    print_table(console, table_of("Quality by window", QUALITY, of_case["quality"]))
    if of_case["speed"]:
        print_table(console, table_of("Time of one query", SPEED, of_case["speed"]))
    for r in of_case["claim"]:
        say(console, f"claimed:  {r['claim']}\nmeasured: {r['measured']}\n          ({r['conditions']})\n")

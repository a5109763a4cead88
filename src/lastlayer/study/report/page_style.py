"""How a page looks: light and dark, wide and narrow."""

LIGHT = {
    "page": "#fbfbf9", "card": "#ffffff", "text": "#1c2024", "quiet": "#60676e", "rule": "#e3e4e0",
    "best": "#0d7a3e", "winner": "#e7f2ec",
    "c0": "#1f6fc4", "c1": "#c2480f", "c2": "#12856a", "c3": "#8446c0",
    "c4": "#8f6900", "c5": "#c02a6c", "c6": "#4d7a1f", "c7": "#58646f",
}  # fmt: skip
DARK = {
    "page": "#14171a", "card": "#1d2125", "text": "#e8eaec", "quiet": "#a0a8b0", "rule": "#343a40",
    "best": "#62d58f", "winner": "#1d2e28",
    "c0": "#6cb0f5", "c1": "#ff9a66", "c2": "#4cc9a6", "c3": "#c29bf2",
    "c4": "#e6bf55", "c5": "#f582b4", "c6": "#a4cf6f", "c7": "#a9b5c0",
}  # fmt: skip
COLOURS = 8  # of layers, distinct in light and dark


def _root(colours: dict[str, str]) -> str:
    return ":root{" + "".join(f"--{name}:{colour};" for name, colour in colours.items()) + "}"


VARIABLES = f"{_root(LIGHT)}\n@media(prefers-color-scheme:dark){{{_root(DARK)}}}\n"
STYLE = (
    VARIABLES
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.35rem;margin:0 0 .5rem}
h2{font-size:1.1rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:0}
.answer{font-size:1.3rem;line-height:1.35;margin:.25rem 0 .5rem}
.quiet{color:var(--quiet);font-size:.9rem;font-weight:400;margin:0 0 .5rem}
figure,section{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:.9rem 1rem;margin:0}
figure{margin:1rem 0}
figcaption{font-weight:600}
figcaption .quiet{margin-left:.4rem}
figure>.quiet{margin:.5rem 0 0}
svg{display:block;width:100%;height:auto}
svg text{font-family:system-ui,sans-serif!important}
.narrow{display:none}
.switch{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.92rem;color:var(--quiet);margin:.2rem 0 .4rem}
.switch label{color:var(--text);cursor:pointer;padding:.15rem 0}
.switch input{accent-color:var(--c0);margin:0 .35rem 0 0}
.over-read,.curves:has([value=read]:checked) .over-time{display:none}
.curves:has([value=read]:checked) .over-read{display:block}
.measures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))}
.best{font-weight:700;color:var(--best)}
.winner td{background:var(--winner)}
dl{display:grid;grid-template-columns:auto 1fr;gap:.3rem 1rem;margin:0}
dt{font-weight:600}
dd{margin:0}
dt i{display:inline-block;width:.7rem;height:.7rem;border-radius:.2rem;margin-right:.45rem}
.scroll{overflow-x:auto}
.hint{display:none}
table{border-collapse:collapse;min-width:100%;font-size:.84rem;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:.35rem .55rem;text-align:right;border-bottom:1px solid var(--rule)}
th{color:var(--quiet);font-weight:500;white-space:normal;vertical-align:bottom}
th button{all:unset;cursor:pointer;padding:.3rem 0}
th button:hover{color:var(--text)}
th button:focus-visible{outline:2px solid var(--c0)}
th[aria-sort]{color:var(--text);font-weight:600}
th[aria-sort=ascending] button::after{content:" ↑"}
th[aria-sort=descending] button::after{content:" ↓"}
th:first-child,td:first-child{text-align:left;padding-left:.3rem;font-weight:600;position:sticky;left:0;
white-space:normal}
th:first-child,tr:not(.winner) td:first-child{background:var(--page)}
code{font-size:.88rem;overflow-wrap:anywhere}
@media(max-width:52rem){.hint{display:block}}
@media(max-width:34rem){.wide{display:none}.narrow{display:block}figure{padding:.9rem .5rem}
dl{grid-template-columns:1fr}dd{margin:0 0 .4rem}}
"""
)

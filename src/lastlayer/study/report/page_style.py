"""How the page looks: light and dark, wide and narrow. Eight colours, distinct in both."""

LIGHT = ("#1f6fc4", "#c2480f", "#12856a", "#8446c0", "#8f6900", "#c02a6c", "#4d7a1f", "#58646f")
DARK = ("#6cb0f5", "#ff9a66", "#4cc9a6", "#c29bf2", "#e6bf55", "#f582b4", "#a4cf6f", "#a9b5c0")
COLOURS = len(LIGHT)
WIDE, NARROW = 760, 340  # of drawings, for a desk and for a phone: about as wide as they are shown


def _variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))


_CLASSES = "".join(
    f".fill-{i}{{background:var(--c{i})}}.line-{i}{{stroke:var(--c{i})}}"
    f".dot.line-{i},.end.line-{i}{{fill:var(--c{i});stroke:none}}"
    f".name.line-{i}{{fill:var(--c{i});stroke:var(--card);stroke-width:4px}}"
    for i in range(COLOURS)
)

STYLE = (
    f"""
:root{{--page:#fbfbf9;--card:#fff;--text:#1c2024;--quiet:#60676e;--rule:#e3e4e0;--best:#0d7a3e;--winner:#0d7a3e14;--shade:#0004;{_variables(LIGHT)}}}
@media(prefers-color-scheme:dark){{
:root{{--page:#14171a;--card:#1d2125;--text:#e8eaec;--quiet:#a0a8b0;--rule:#343a40;--best:#62d58f;--winner:#62d58f1f;--shade:#fff5;{_variables(DARK)}}}}}
{_CLASSES}
"""
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
svg{display:block;width:100%;height:auto}
.narrow{display:none}
.axis{font:12px system-ui,sans-serif;fill:var(--quiet)}
.name{font:600 13px system-ui,sans-serif;paint-order:stroke}
.frontier{fill:none;stroke:var(--best);stroke-width:2}
.ring{fill:none;stroke:var(--best);stroke-width:2.5}
.full{stroke:var(--quiet);stroke-dasharray:7 5}
.required{stroke:var(--quiet);stroke-width:1.5;stroke-dasharray:2 4}
.legend i{display:inline-block;width:.65rem;height:.65rem;margin:0 .3rem 0 .5rem}
.legend i:first-child{margin-left:0}
.legend .round{border-radius:50%}
.legend .chosen{border:2px solid var(--best)}
.switch{display:flex;flex-wrap:wrap;gap:.2rem 1rem;font-size:.92rem;color:var(--quiet);margin:.2rem 0 .4rem}
.switch label{color:var(--text);cursor:pointer;padding:.15rem 0}
.switch input{accent-color:var(--c0);margin:0 .35rem 0 0}
.over-read,.curves:has([value=read]:checked) .over-time{display:none}
.curves:has([value=read]:checked) .over-read{display:block}
.grid{stroke:var(--rule)}
.line{fill:none;stroke-width:2.5;stroke-linejoin:round}
.measures{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))}
.row{display:grid;grid-template-columns:1fr auto;font-size:.92rem;margin-top:.45rem}
.value{font-variant-numeric:tabular-nums;font-weight:600}
.bar{grid-column:1/-1;height:.55rem;border-radius:.2rem}
.track{grid-column:1/-1;position:relative;height:.55rem;border-bottom:1px solid var(--rule);margin:0 .4rem .3rem}
.track i{position:absolute;bottom:-.35rem;width:.7rem;height:.7rem;margin-left:-.35rem;border-radius:50%}
.ends{display:flex;justify-content:space-between;color:var(--quiet);font-size:.8rem;margin-top:.2rem}
.remark{grid-column:1/-1;color:var(--quiet);font-size:.85rem}
.best{font-weight:700;color:var(--best)}
.row .best{font-size:.78rem;text-transform:uppercase;letter-spacing:.03em}
.winner td{background:var(--winner)}
figure>.quiet{margin:.5rem 0 0}
dl{display:grid;grid-template-columns:auto 1fr;gap:.3rem 1rem;margin:0}
dt{font-weight:600}
dd{margin:0}
dt i{display:inline-block;width:.7rem;height:.7rem;border-radius:.2rem;margin-right:.45rem}
.scroll{overflow-x:auto;
background:linear-gradient(to left,var(--page) 30%,transparent) right/3rem 100% no-repeat local,
linear-gradient(to left,var(--shade),transparent) right/1.4rem 100% no-repeat scroll}
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
background:var(--page);white-space:normal}
.winner td:first-child{background:linear-gradient(var(--winner),var(--winner)),var(--page)}
code{font-size:.88rem;overflow-wrap:anywhere}
@media(max-width:52rem){.hint{display:block}}
@media(max-width:34rem){.wide{display:none}.narrow{display:block}figure{padding:.9rem .5rem}
dl{grid-template-columns:1fr}dd{margin:0 0 .4rem}}
"""
)

"""What trying screens came to: a table in the terminal, which is chosen, and where none gains, why."""

from rich.console import Console
from rich.text import Text

from lastlayer.kernels.config import config
from lastlayer.study.files import Record
from lastlayer.study.report.figures import Measure, figure
from lastlayer.study.report.tables import say, show_measures

WORTH_IT = 1.2  # a smaller gain is not worth a second copy of the weight
SMALL = 1 << 22  # bytes of a weight that stays in the caches, where the full layer is hard to beat


def verdict(records: list[Record], weight_bytes: int, agreement: float) -> str:
    """What came out, in one sentence or two; where no screen gains, why."""
    chosen = next(record for record in records if record["chosen"])
    name = screen_name(chosen)
    if chosen["ratio"] < WORTH_IT:
        little = "is hardly faster than" if chosen["ratio"] > 1 else "is slower than"
        return (
            f"Keep the full layer: the fastest screen that agrees ({name}) {little} it, {figure(chosen['ms'])} ms "
            f"against {figure(chosen['full_ms'])} ms. {why_no_gain(records, weight_bytes)}"
        )
    proved = "; every result is proved" if chosen["certified_fraction"] == 1 else ""
    return (
        f"{name}: {figure(chosen['ratio'])} times as fast as the full layer, "
        f"agreement {chosen['agreement_topk']:.4%} (required: {agreement:.4%}){proved}."
    )


def why_no_gain(records: list[Record], weight_bytes: int) -> str:
    """The likeliest cause that no screen is faster: the head, the kernels, or the hidden states."""
    here = config()
    if weight_bytes <= SMALL:
        return f"The cause: this head is too small to gain: its {weight_bytes / 1e6:.1f} MB stay in the cache."
    if here["engine"] == "plain":
        return f"The cause: the kernels run as plain PyTorch here ({here['why']}); compiled ones may well gain."
    windows = [r for r in records if r["window"] is not None and r["candidates"] is not None]
    if windows and all("as candidates" in (r["dropped"] or "") for r in windows):
        return "The cause: no preview separates these classes on these hidden states."
    processor = f"{here['processor']}, kernels for {here['isa']}"
    return f"The cause: this processor ({processor}) runs the full layer as fast as it reads a preview."


def screen_name(record: Record) -> str:
    """A screen in a few words."""
    window = "" if record["window"] is None else f", window {record['window']}"
    candidates = "" if record["candidates"] is None else f", {record['candidates']:,} candidates"
    return f"{record['preview']}{window}{candidates}"


def measures(k: int) -> list[Measure]:
    """The figures of every screen."""
    found = [
        Measure("top-1", lambda r: r["agreement_top1"], "{:.2%}".format, "higher"),
        Measure(f"top-{k}", lambda r: r["agreement_topk"], "{:.2%}".format, "higher"),
        Measure("KL", lambda r: r["kl"], figure),
        Measure("bytes read", lambda r: r["bytes_read_fraction"], "{:.1%}".format),
        Measure("proved", lambda r: r["certified_fraction"], "{:.1%}".format, "higher"),
        Measure("ms", lambda r: r["ms"], figure),
        Measure("times as fast", lambda r: r["ratio"], figure, "higher"),
    ]
    return found if k > 1 else found[1:]


def show(records: list[Record], k: int, console: Console) -> None:
    """The table of all that were tried, `*` marks the chosen one; below it those whose turn did not come."""
    tried = [record for record in records if record["ms"] is not None]
    names = []
    for record in tried:
        dropped = f": {record['dropped']}" if record["dropped"] else ""
        names.append(Text(("* " if record["chosen"] else "") + screen_name(record) + dropped))
    show_measures(console, "", "screen", names, tried, measures(k))
    untried = [screen_name(record) for record in records if record["ms"] is None]
    if untried:
        say(console, f"Not tried, for --seconds were over: {'; '.join(untried)}")

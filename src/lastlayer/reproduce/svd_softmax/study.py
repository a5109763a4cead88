"""The SVD-softmax paper (Shim et al., NIPS 2017) measured here: quality by window and candidates, time by V."""

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from lastlayer.functional.gram import gram_matrix
from lastlayer.layers.full import FullSoftmax
from lastlayer.reproduce.cells import Cells
from lastlayer.reproduce.models import finish, hidden_states, trainer_of
from lastlayer.screening import Int8Preview, ScreenedSoftmax, SVDPreview, SVDSoftmax
from lastlayer.screening.exact import full_logits
from lastlayer.study.errors import UsageError
from lastlayer.study.files import Record, Records
from lastlayer.study.measuring.measure import interleaved
from lastlayer.study.report.figures import figure
from lastlayer.study.report.tables import say, show
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.trainer import Budget

WINDOW_PARTS = (16, 8, 4, 2)  # d/16 to d/2
CANDIDATE_SHARES = (0.01, 0.03, 0.05, 0.10)
TOP = 10
CLASSES = (8_000, 30_000, 80_000, 262_144, 800_000)
SPEED_WIDTH = 512
QUALITY = ("kind", "window", "candidates_share", "operations", "perplexity", "full_perplexity", "kl", "coverage")
SPEED = ("num_classes", "width", "full_ms", "ms", "ratio", "bytes_read_fraction")
SPEED += ("int8_exact_ms", "int8_exact_ratio", "threads")
REMEMBERED = "† (as remembered; not verified against the paper)"


@dataclass(frozen=True)
class Plan:
    """What is trained and measured."""

    seconds: float  # of training
    width: int
    positions: int  # held-out tokens that every setting is measured on
    largest: int  # classes of the largest speed case
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Trained:
    """A trained model's output layer, states to calibrate on, and the full layer's results for held-out ones."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    calibration: Tensor  # (m, d)
    hidden: Tensor  # (n, d)
    targets: Tensor  # (n,)
    log_prob: Tensor  # (n, V), the full layer's


def reproduce(corpus: Corpus, plan: Plan, out: Path, console: Console, resume: bool = False) -> Records:
    """Trains the model, measures every setting, shows claims beside figures; returns the records.

    Every setting and every size is a cell that is written down when done; `resume` measures only what is missing.
    """
    if corpus.num_classes < 200:
        raise UsageError(f"the text has only {corpus.num_classes} different words; at least 200 are needed")
    cells = Cells(out, resume, console)
    say(
        console,
        f"{corpus.name}, {corpus.num_classes:,} words: {plan.seconds:g} s of training, then "
        f"{2 * len(WINDOW_PARTS) * len(CANDIDATE_SHARES)} settings on {plan.positions:,} held-out words",
    )
    qualities = quality(cells, corpus, plan, out)
    show(console, "Quality by window", qualities, QUALITY)
    sizes = [{"case": "speed", "num_classes": size} for size in CLASSES if size <= plan.largest]
    speeds = cells.measure(sizes, lambda key: speed(key["num_classes"], plan))
    if speeds:
        show(console, "Time of one query", speeds, SPEED)
    found = claims(qualities, speeds)
    for r in found:
        say(console, f"claimed:  {r['claim']}\nmeasured: {r['measured']}\n          ({r['conditions']})\n")
    say(console, f"Written: {cells.path}")
    return qualities + speeds + found


def _trained(corpus: Corpus, plan: Plan, identity: Record, out: Path, say: Callable[[str], object]) -> Trained:
    """The model, trained or taken from its checkpoint, and what its output layer is given."""
    torch.manual_seed(plan.seed)
    layer = FullSoftmax(plan.width, corpus.num_classes)
    identity = identity | {"text": corpus.fingerprint()}
    path, budget = out / "model.safetensors", Budget(seconds=plan.seconds)
    trainer = trainer_of(layer, corpus, plan.device, budget, path=path, identity=identity)
    of_all = f"of {plan.seconds:g} s"
    finish(trainer, plan.positions, lambda t: say(f"training the language model: {t.seconds:.0f} {of_all}"))
    say("collecting hidden states")
    calibration, _ = hidden_states(trainer.model, trainer.train, 8 * plan.positions)
    hidden, targets = hidden_states(trainer.model, trainer.held_out, plan.positions)
    with torch.no_grad():
        log_prob = layer.log_prob(hidden)
    bias = None if layer.bias is None else layer.bias.detach()
    return Trained(layer.weight.detach(), bias, calibration, hidden, targets, log_prob)


def quality(cells: Cells, corpus: Corpus, plan: Plan, out: Path) -> Records:
    """Perplexity, divergence and coverage of the true top 10 for each window and number of candidates."""
    settings = {name: value for name, value in asdict(plan).items() if name not in ("device", "largest")}
    identity = {"text": corpus.name, **settings}
    model_of = functools.cache(lambda: _trained(corpus, plan, identity, out, cells.status.update))
    gram = functools.cache(lambda: gram_matrix(model_of().weight))

    @functools.cache
    def preview(window: str, kind: str) -> SVDPreview:
        data = model_of().calibration if kind == "calibrated" else None
        return SVDPreview(max(1, plan.width // int(window.removeprefix("d/"))), calibration=data)

    def measured(key: Record) -> Record:
        model, chosen = model_of(), preview(key["window"], key["kind"])
        classes = len(model.weight)
        candidates = max(TOP, round(key["candidates_share"] * classes))
        screen = ScreenedSoftmax(
            model.weight, model.bias, preview=chosen, candidates=candidates, gram=gram(), use="screen"
        )
        operations = chosen.window / plan.width + (candidates + plan.width) / classes
        return {**_against(screen, model), "operations": operations}

    keys = [
        {"case": "quality", "kind": kind, "window": f"d/{part}", "candidates_share": share, **identity}
        for part in WINDOW_PARTS
        for kind in ("plain", "calibrated")
        for share in CANDIDATE_SHARES
    ]
    return cells.measure(keys, measured)


@torch.no_grad()
def _against(screen: ScreenedSoftmax, held: Trained) -> Record:
    """One setting beside the full layer, for so few rows at a time that the screen is used, not the full layer."""
    rows = max(1, (screen.out_features - 1) // screen.candidates)
    totals = torch.zeros(4, dtype=torch.float64)
    for hidden, targets, full in zip(
        *(part.split(rows) for part in (held.hidden, held.targets, held.log_prob)), strict=True
    ):
        screened = screen.log_prob(hidden)
        found, best = screen.topk(hidden, TOP).indices, full.topk(TOP).indices
        parts = (
            -full.gather(-1, targets[:, None]),
            -screened.gather(-1, targets[:, None]),
            full.exp() * (full - screened),
            (found[:, :, None] == best[:, None]).any(-1),
        )
        totals += torch.stack([part.sum(dtype=torch.float64).cpu() for part in parts])
    full_loss, loss, divergence, covered = (totals / len(held.hidden)).tolist()
    return {
        "full_perplexity": math.exp(full_loss),
        "perplexity": math.exp(loss),
        "kl": max(0.0, divergence),
        "coverage": covered / TOP,
    }


@torch.no_grad()
def speed(num_classes: int, plan: Plan) -> Record:
    """One query of the full softmax, of SVD-softmax at the paper's d/8, and of the exact 8-bit screen."""
    generator = torch.Generator().manual_seed(plan.seed)
    width = SPEED_WIDTH
    weight = torch.randn(num_classes, width, generator=generator) * torch.logspace(0, -1, width)
    weight, candidates = weight.to(plan.device), max(TOP, num_classes // 50)
    row = torch.randn(1, width, generator=generator).to(plan.device)
    screen = SVDSoftmax(weight, window=width // 8, candidates=candidates, use="screen")
    proved = ScreenedSoftmax(weight, preview=Int8Preview(), candidates=96, exact=True, use="screen")
    timings = interleaved(
        {
            "full": lambda: full_logits(row, weight, None).log_softmax(-1).topk(TOP),
            "SVD": lambda: screen.topk(row, TOP),
            "int8": lambda: proved.topk(row, TOP),
        },
        rounds=9,
    )
    full, ours, exact = timings.values()
    return {
        "width": width,
        "window": width // 8,
        "candidates": candidates,
        "full_ms": full.ms,
        "ms": ours.ms,
        "ratio": full.ms / ours.ms,
        "bytes_read_fraction": screen.bytes_read / weight.nbytes,
        "int8_exact_ms": exact.ms,
        "int8_exact_ratio": full.ms / exact.ms,
        "threads": torch.get_num_threads(),
    }


def claims(qualities: Records, speeds: Records) -> Records:
    """Each claim, what was measured for it, and under which conditions."""
    by = {(r["kind"], r["window"], r["candidates_share"]): r for r in qualities}
    found = []
    for kind, claim in (
        ("plain", "about a fifth of the operations keeps the quality [paper: abstract]"),
        ("calibrated", "none: calibration is no part of the paper"),
    ):
        r = by[kind, "d/8", 0.05]
        perplexity, full, kl = map(figure, (r["perplexity"], r["full_perplexity"], r["kl"]))
        measured = (
            f"{r['operations']:.0%} of the operations: perplexity {perplexity} against {full} of the full softmax"
            f", KL {kl}, {r['coverage']:.1%} of the top 10"
        )
        found.append((claim, measured, f"{kind}, window d/8, 5% of the classes"))
    if speeds:
        near = min(speeds, key=lambda r: abs(r["num_classes"] - 2**18))
        for claim, r in (
            ("more than 3 times as fast at V = 800,000 on a GPU [paper: abstract]", speeds[-1]),
            (f"V of about 2^18 on a CPU: from 1541 to 189 ms {REMEMBERED}", near),
        ):
            measured = f"{figure(r['ratio'])} times as fast, from {figure(r['full_ms'])} to {figure(r['ms'])} ms"
            sizes = f"V = {r['num_classes']:,}, d = {r['width']}, one query, {r['threads']} CPU threads"
            found.append((claim, measured, sizes))
    return [{"case": "claim", "claim": c, "measured": m, "conditions": w} for c, m, w in found]

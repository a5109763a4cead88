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
from lastlayer.reproduce.svd_softmax.report import claims, show
from lastlayer.screening import Int8Preview, ScreenedSoftmax, SVDPreview, SVDSoftmax
from lastlayer.screening.exact import full_logits
from lastlayer.study.errors import UsageError
from lastlayer.study.files import Record, write_json
from lastlayer.study.measuring.measure import environment, interleaved
from lastlayer.study.report.tables import say
from lastlayer.study.text.batches import Streams
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.evaluation import encoded
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import Budget, Trainer

WINDOW_PARTS = (16, 8, 4, 2)  # d/16 to d/2
CANDIDATE_SHARES = (0.01, 0.03, 0.05, 0.10)
TOP = 10
CLASSES = (8_000, 30_000, 80_000, 262_144, 800_000)
SPEED_WIDTH = 512


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
    best: Tensor  # (n, TOP)

    @property
    def perplexity(self) -> float:
        """Of the full softmax."""
        return math.exp(-float(self.log_prob.gather(-1, self.targets[:, None]).double().mean()))


def reproduce(corpus: Corpus, plan: Plan, out: Path, console: Console, resume: bool = False) -> list[Record]:
    """Trains the model, measures every setting, shows claims beside figures; returns the records.

    Every setting and every size is a cell that is written down when done; `resume` measures only what is missing.
    """
    if corpus.num_classes < 200:
        raise UsageError(f"the text has only {corpus.num_classes} different words; at least 200 are needed")
    cells = Cells(out, resume)
    say(
        console,
        f"{corpus.name}, {corpus.num_classes:,} words: {plan.seconds:g} s of training, then "
        f"{2 * len(WINDOW_PARTS) * len(CANDIDATE_SHARES)} settings on {plan.positions:,} held-out words",
    )
    with console.status("training the language model") as status:
        model = functools.cache(lambda: _trained(corpus, plan, out, status.update))
        records = quality(cells, model, corpus, plan, status.update)
        sizes = [size for size in CLASSES if size <= plan.largest]
        for size in sizes:
            status.update(f"measuring time at {size:,} classes")
            cells.once({"case": "speed", "num_classes": size}, lambda size=size: speed(size, plan))
    records += [r for r in cells.records if r["case"] == "speed" and r["num_classes"] in sizes]
    records += claims(records)
    show(records, console)
    results = {"environment": environment(), "text": corpus.name, "records": records}
    write_json(out / "svd-softmax.json", results)
    say(console, f"Written: {out / 'svd-softmax.json'}")
    return records


def _trained(corpus: Corpus, plan: Plan, out: Path, say: Callable[[str], object]) -> Trained:
    """The model, trained or taken from its checkpoint, and what its output layer is given."""
    torch.manual_seed(plan.seed)
    layer = FullSoftmax(plan.width, corpus.num_classes)
    model = LanguageModel(corpus.num_classes, layer).to(plan.device)
    streams = Streams(corpus.train, 20, 35, plan.device), Streams(corpus.held_out, 10, 50, plan.device)
    trainer = Trainer(
        model,
        *streams,
        Budget(seconds=plan.seconds),
        learning_rate=0.2,
        path=out / "model.safetensors",
        identity=_identity(corpus, plan) | {"text": corpus.fingerprint()},
    )
    trainer.resume()
    if trainer.result is None:
        trainer.run(lambda t: say(f"training the language model: {t.seconds:.0f} of {plan.seconds:g} s"))
        trainer.result = {"steps": trainer.steps}
        trainer.save()
    say("collecting hidden states")
    return _collected(model.eval(), corpus, plan)


def _identity(corpus: Corpus, plan: Plan) -> Record:
    """What identifies an experiment."""
    settings = {name: value for name, value in asdict(plan).items() if name not in ("device", "largest")}
    return {"text": corpus.name, **settings}


@torch.no_grad()
def _collected(model: LanguageModel, corpus: Corpus, plan: Plan) -> Trained:
    weight, bias, _ = model.output.linear_head()

    def states(ids: Tensor, tokens: int) -> tuple[Tensor, Tensor]:  # (n, d), (n,)
        parts = zip(*encoded(model, Streams(ids, 10, 50, plan.device), tokens), strict=True)
        hidden, targets = (torch.cat([part.flatten(0, 1) for part in column]) for column in parts)
        return hidden, targets

    calibration, _ = states(corpus.train, 8 * plan.positions)
    hidden, targets = states(corpus.held_out, plan.positions)
    logits = full_logits(hidden, weight, bias)
    best = logits.topk(TOP).indices
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return Trained(weight, bias, calibration, hidden, targets, logits.log_softmax(-1), best)


def quality(
    cells: Cells, trained: Callable[[], Trained], corpus: Corpus, plan: Plan, say: Callable[[str], object]
) -> list[Record]:
    """Perplexity, divergence and coverage of the true top 10 for each window and number of candidates."""

    @functools.cache
    def preview(part: int, kind: str) -> SVDPreview:
        data = trained().calibration if kind == "calibrated" else None
        return SVDPreview(max(1, plan.width // part), calibration=data)

    @functools.cache
    def gram() -> Tensor:
        return gram_matrix(trained().weight)

    def measured(part: int, kind: str, share: float) -> Record:
        model, chosen = trained(), preview(part, kind)
        classes = len(model.weight)
        candidates = max(TOP, round(share * classes))
        say(f"measuring {kind}, window d/{part}, {share:.0%} of the classes")
        tried = ScreenedSoftmax(
            model.weight, model.bias, preview=chosen, candidates=candidates, gram=gram(), use="screen"
        )
        operations = chosen.window / plan.width + (candidates + plan.width) / classes
        return {"full_perplexity": model.perplexity, **_against(tried, model), "operations": operations}

    records = []
    for part in WINDOW_PARTS:
        for kind in ("plain", "calibrated"):
            for share in CANDIDATE_SHARES:
                setting = {"kind": kind, "window": f"d/{part}", "candidates_share": share}
                key = {"case": "quality", **setting, **_identity(corpus, plan)}
                records.append(cells.once(key, lambda a=(part, kind, share): measured(*a)))
    return records


@torch.no_grad()
def _against(screen: ScreenedSoftmax, held: Trained) -> Record:
    """One setting, queried for so few rows at a time that the screen is used, not the full layer."""
    rows = max(1, (screen.out_features - 1) // screen.candidates)
    loss, divergence, covered = 0.0, 0.0, 0
    for start in range(0, len(held.hidden), rows):
        at = slice(start, start + rows)
        screened, full = screen.log_prob(held.hidden[at]), held.log_prob[at]
        loss -= float(screened.gather(-1, held.targets[at][:, None]).double().sum())
        divergence += float((full.exp() * (full - screened)).double().sum())
        found = screen.topk(held.hidden[at], TOP).indices
        covered += int((found.unsqueeze(-1) == held.best[at].unsqueeze(-2)).sum())
    count = len(held.hidden)
    return {
        "perplexity": math.exp(loss / count),
        "kl": max(0.0, divergence / count),
        "coverage": covered / (TOP * count),
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

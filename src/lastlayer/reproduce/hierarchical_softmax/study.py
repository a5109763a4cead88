"""The cluster layers' claims measured here: the Keras thread's benchmark over V and N, then quality on a text."""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from lastlayer.study.choices import build_layer
from lastlayer.study.compare import Comparison
from lastlayer.study.compare import Plan as ComparePlan
from lastlayer.study.errors import UsageError
from lastlayer.study.files import Records, make_folder, write_json
from lastlayer.study.measuring.measure import environment, interleaved
from lastlayer.study.measuring.peers import TRAINING_BASELINE, sgd_step
from lastlayer.study.report.tables import show
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.trainer import Budget

LAYERS = ["full", "hierarchical", "tree", "adaptive"]
WIDTH = 500  # the thread's own
CLASSES = (1_000, 10_000, 100_000)
ROWS = (16, 1000)
THREAD = "sometimes 10x, sometimes slower"  # keras issue 438, at V = 100,000, N = 1,000, d = 500
# text8, perplexity and minutes, read in Grave et al. 2017
PAPER = {"full": "144 / 83 min", "hierarchical": "166 / 34 min", "adaptive": "147 / 30 min"}
SPEED = ("num_classes", "batch", "name", "ms", "times_faster", "claimed")
QUALITY = ("name", "perplexity", "ratio_to_full", "tokens_per_second", "claimed")


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    largest: int  # classes of the largest speed case
    rounds: int
    steps: int  # of training, the same for every layer
    seconds: float  # of training, the same for every layer
    width: int  # of the language model
    seed: int
    device: torch.device


def reproduce(corpus: Corpus, plan: Plan, out: Path, console: Console, *, resume: bool = False) -> Records:
    """Measures speed, then quality at equal steps and at equal time; shows claims beside figures.

    With `resume`, models that an earlier run with the same plan has trained, wholly or in part, are taken over.
    """
    sizes = [num_classes for num_classes in CLASSES if num_classes <= plan.largest]
    if not sizes:
        raise UsageError(f"--largest must be at least {CLASSES[0]}, got {plan.largest}")
    make_folder(out)
    with console.status("measuring training steps"):
        records = [record for V in sizes for rows in ROWS for record in speed(V, rows, plan)]
    show(console, f"A training step at d = {WIDTH}, beside all logits", records, SPEED)
    budgets = {"equal-steps": Budget(steps=plan.steps), "equal-time": Budget(seconds=plan.seconds)}
    for case, budget in budgets.items():
        settings = ComparePlan(LAYERS, budget, width=plan.width, seed=plan.seed, device=plan.device)
        found = Comparison(corpus, settings, out / case, console).run(resume)
        full = next(record["perplexity"] for record in found if record["layer"] == "full")
        for record in found:
            ratio, claimed = record["perplexity"] / full, PAPER.get(record["layer"])
            record |= {"case": case, "name": record["layer"], "ratio_to_full": ratio, "claimed": claimed}
        title = f"Held-out perplexity, {case}; claimed: perplexity / training time in the paper, on text8"
        show(console, title, found, QUALITY)
        records += found
    write_json(out / "reproduce.json", {"environment": environment(), "text": corpus.name, "records": records})
    return records


def speed(num_classes: int, rows: int, plan: Plan) -> Records:
    """A whole training step of every layer, as in the thread: uniform targets, and layers made for such."""
    linear = nn.Linear(WIDTH, num_classes, device=plan.device)
    hidden = torch.randn(rows, WIDTH, device=plan.device)
    targets = torch.randint(num_classes, (rows,), device=plan.device)
    peers = {
        TRAINING_BASELINE: sgd_step(linear, lambda h, t: F.cross_entropy(linear(h), t), hidden, targets),
    }
    for name in LAYERS[1:]:
        layer = build_layer(name, WIDTH, torch.ones(num_classes)).to(plan.device)
        peers[name] = sgd_step(layer, layer, hidden, targets)
    timings = interleaved(peers, rounds=plan.rounds, warmup=2)
    full_ms = timings[TRAINING_BASELINE].ms
    return [
        {
            "case": "speed",
            "name": name,
            "num_classes": num_classes,
            "in_features": WIDTH,
            "batch": rows,
            "ms": timing.ms,
            "times_faster": full_ms / timing.ms,
            "claimed": THREAD if (name, num_classes, rows) == ("hierarchical", 100_000, 1000) else None,
        }
        for name, timing in timings.items()
    ]

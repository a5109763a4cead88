"""A recommender, whole: a GRU over the items of a session predicts the next, under several output layers.

python examples/next_item.py [--items FILE] [--seconds 20] [--seeds 3] [--out next_item.html] [--json FILE]

FILE has one session a line, ids or names separated by spaces; the last item of each session is held out. Without
it sessions are made up: popular items by Zipf's law, each with a few likely followers. Every layer trains for the
same time, and recommends the items of its best scores but for those already seen (`exclude=`). Train for some
thousand steps: after a hundred, whether the sampled logits are corrected hardly shows.
"""

import argparse
import html
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lastlayer import (
    FullSoftmax,
    HierarchicalSoftmax,
    InBatch,
    LogUniform,
    Mixed,
    NegativeSampling,
    OutputLayer,
    SampledSoftmax,
    Uniform,
    clusters,
    metrics,
)
from lastlayer.study.measuring.measure import write_records

WIDTH, BATCH, LONGEST, SAMPLES, K = 64, 64, 20, 256, 10
IGNORED = -100
METRICS = {"recall@10": metrics.recall, "NDCG@10": metrics.ndcg, "MRR@10": metrics.reciprocal_rank}


def layers_for(counts: Tensor) -> dict[str, Callable[[], OutputLayer]]:
    """The output layers that are compared, for items that occur `counts (V,)` times."""
    V = len(counts)
    samples = min(SAMPLES, max(2, V // 4))

    def sampled(sampler: Callable[[], nn.Module], correction: str) -> Callable[[], OutputLayer]:
        return lambda: SampledSoftmax(
            WIDTH, V, sampler(), samples, correction=correction, sparse=True, ignore_index=IGNORED
        )

    def log_uniform() -> LogUniform:
        return LogUniform(V, counts=counts, replacement=False)

    return {
        "full": lambda: FullSoftmax(WIDTH, V, ignore_index=IGNORED),
        "two levels": lambda: HierarchicalSoftmax(
            WIDTH, V, clusters=clusters.by_frequency(counts), sparse=True, ignore_index=IGNORED
        ),
        "log-uniform, corrected": sampled(log_uniform, "all"),
        "log-uniform, uncorrected": sampled(log_uniform, "none"),
        "in-batch, corrected": sampled(lambda: InBatch(V, counts=counts), "all"),
        "in-batch, uncorrected": sampled(lambda: InBatch(V, counts=counts), "none"),
        "in-batch and uniform, corrected": sampled(lambda: Mixed(InBatch(V, counts=counts), Uniform(V)), "all"),
        "calibrated sigmoids": lambda: NegativeSampling(
            WIDTH, V, Uniform(V), samples, calibration=0.75, sparse=True, ignore_index=IGNORED
        ),
    }


class NextItem(nn.Module):
    """Item vectors, a GRU over them, an output layer."""

    def __init__(self, output: OutputLayer) -> None:
        super().__init__()
        self.items = nn.Embedding(output.num_classes, WIDTH, sparse=True)
        nn.init.normal_(self.items.weight, std=0.3)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.output = output

    def encode(self, items: Tensor) -> Tensor:  # (n, length), padded with IGNORED, to (n, length, WIDTH)
        """What is known after each item; places after the last mean nothing."""
        return self.gru(self.items(items.clamp(min=0)))[0]


def train(model: NextItem, sessions: Tensor, seconds: float) -> int:
    """Trains on all but the last item of each session; how many steps fitted."""
    tables = [*model.items.parameters(), *model.output.parameters()]
    with torch.sparse.check_sparse_tensor_invariants(False):
        optimizers = [torch.optim.Adam(model.gru.parameters(), lr=0.003), torch.optim.Adagrad(tables, lr=0.1)]
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            batch = sessions[torch.randint(len(sessions), (BATCH,))]
            loss = model.output(model.encode(batch[:, :-1]), batch[:, 1:])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            steps += 1
    return steps


@torch.no_grad()
def evaluate(model: NextItem, sessions: Tensor, wanted: Tensor) -> dict[str, float]:
    """The metrics of the held-out items, of all those not seen before in their session."""
    best = []
    model.eval()
    for batch in sessions.split(512):
        last = (batch != IGNORED).sum(1) - 1
        hidden = model.encode(batch)[torch.arange(len(batch)), last]
        best.append(model.output.topk(hidden, K, exclude=batch).indices)
    found = torch.cat(best)
    return {name: float(metric(found, wanted)) for name, metric in METRICS.items()}


def make_sessions(num_items: int = 20_000, num_sessions: int = 30_000) -> list[list[int]]:
    """Made-up sessions: a popular item, then mostly one of three followers of the item before."""
    draw = LogUniform(num_items)
    followers = draw.sample(3 * num_items).ids.view(num_items, 3)
    shuffled = torch.randperm(num_items)  # ids say nothing of popularity
    items = [draw.sample(num_sessions).ids]
    for _ in range(11):
        follow = followers[items[-1], torch.randint(3, (num_sessions,))]
        items.append(torch.where(torch.rand(num_sessions) < 0.7, follow, draw.sample(num_sessions).ids))
    return shuffled[torch.stack(items, 1)].tolist()


def read_sessions(path: Path) -> list[list[int]]:
    """Names to ids, a session a line; items seen once only are left out."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    counts: dict[str, int] = {}
    for name in (name for line in lines for name in line):
        counts[name] = counts.get(name, 0) + 1
    ids = {name: place for place, name in enumerate(name for name, count in counts.items() if count > 1)}
    return [kept for line in lines if len(kept := [ids[name] for name in line if name in ids]) > 2]


def pad(sessions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The sessions but for their last items, padded; and those."""
    rows = torch.full((len(sessions), LONGEST), IGNORED)
    for row, session in zip(rows, sessions, strict=True):
        kept = session[-LONGEST - 1 : -1]
        row[: len(kept)] = torch.tensor(kept)
    return rows, torch.tensor([session[-1] for session in sessions])


def write_page(path: Path, rows: list[tuple[str, list[str]]], about: str) -> None:
    """One page with the table."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "steps", *METRICS))
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows
    )
    style = "body{font:16px sans-serif;margin:2em}td,th{padding:.3em 1em;text-align:left}"
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>Next item</title><style>{style}</style>"
        f"<h1>Next item</h1><p>{html.escape(about)}</p><table><tr>{head}</tr>{body}</table>",
        encoding="utf-8",
    )


def main() -> None:
    """Trains every layer once a seed, prints the table, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=Path, help="one session a line; none: made-up ones")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, for every layer and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", default="", help="some of the layers, separated by semicolons")
    parser.add_argument("--out", type=Path, help="where to write the page")
    parser.add_argument("--json", type=Path, help="where to write the figures of every seed")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    sessions = make_sessions() if arguments.items is None else read_sessions(arguments.items)
    inputs, wanted = pad(sessions)
    counts = torch.bincount(inputs[inputs != IGNORED], minlength=int(wanted.max()) + 1).clamp(min=1)
    held_out = torch.randperm(len(inputs))[:5000]
    budget = f"{arguments.seconds:g} s for each of {arguments.seeds} seeds"
    about = f"{len(counts):,} items, {len(inputs):,} sessions, {budget}"
    print(about)
    chosen = [name for name in arguments.layers.split(";") if name] or list(layers_for(counts))
    rows, records = [], []
    for name in chosen:
        found = []
        for seed in range(arguments.seeds):
            torch.manual_seed(seed)
            model = NextItem(layers_for(counts)[name]())
            steps = train(model, inputs, arguments.seconds)
            found.append({"steps": steps, **evaluate(model, inputs[held_out], wanted[held_out])})
            records.append({"layer": name, "seed": seed, "seconds": arguments.seconds, **found[-1]})
        cells = [f"{statistics.mean(result['steps'] for result in found):,.0f}"]
        for metric in METRICS:
            values = [result[metric] for result in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        rows.append((name, cells))
        print(f"{name:34}" + "  ".join(f"{cell:16}" for cell in cells), flush=True)
    print(f"{'':34}steps             " + "  ".join(f"{metric:16}" for metric in METRICS))
    if arguments.out is not None:
        write_page(arguments.out, rows, about)
    if arguments.json is not None:
        write_records(arguments.json, records, notes=about)


if __name__ == "__main__":
    main()

"""Sampled layers against all classes: steps, draws, bias of kernel samples, and one sigmoid a class.

python benchmarks/sampled.py [--parts step,growth,draws,kernel,one-vs-all] [--rounds 3] [--threads 1]

Each part's peers run interleaved. The parts that are measured replace theirs in the results file.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer import (
    FullSoftmax,
    LogUniform,
    OneVsAll,
    QuadraticKernel,
    SampledSoftmax,
    Sampler,
    Uniform,
    Unigram,
)
from lastlayer.study.measuring.measure import Timing, interleaved, peak_bytes, seconds_of, write_records
from lastlayer.study.measuring.peers import zipf_counts

RESULTS = Path(__file__).parent / "results" / "sampled.json"
ROWS, IN_FEATURES, SAMPLES = 1024, 512, 1024
Step = Callable[[], None]
OURS, STEPS_A_ROUND = "SampledSoftmax(sparse=True)", 20  # of the quick peer, beside one of the slow ones


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of PyTorch; one is steadier on a busy machine")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    for name in arguments.parts.split(","):
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))["records"] if RESULTS.exists() else []
        found = PARTS[name](arguments.rounds)
        for line in found:
            print("  ".join(f"{key}={value}" for key, value in line.items()), flush=True)
        records = [line for line in kept if line["case"] != name] + found
        write_records(RESULTS, records, notes="step: forward + backward + torch.optim.SGD; targets by Zipf's law")


def step(rounds: int) -> list[dict[str, Any]]:
    """A whole step at 800,000 classes: all of them, or 1,024 shared samples."""
    num_classes = 800_000
    linear = FullSoftmax(IN_FEATURES, num_classes)
    peers = {
        "FullSoftmax": step_of(linear, linear, num_classes),
        "nn.Linear + F.cross_entropy": step_of(
            linear, lambda h, t: F.cross_entropy(F.linear(h, linear.weight, linear.bias), t), num_classes
        ),
    }
    ours, seconds = sampled_step(num_classes), list[float]()
    ours()
    timings = interleaved(
        peers,
        rounds=rounds,
        warmup=1,
        on_round=lambda: seconds.extend(seconds_of(ours) for _ in range(STEPS_A_ROUND)),  # beside the slow ones
    )
    timings[OURS] = Timing.of(seconds)
    sizes = {"num_classes": num_classes, "in_features": IN_FEATURES, "batch": ROWS, "samples": SAMPLES}
    return [
        record("step", name, t, **sizes, ratio_to_sampled=round(t.ms / timings[OURS].ms, 1))
        for name, t in timings.items()
    ]


def growth(rounds: int) -> list[dict[str, Any]]:
    """The same step as the classes grow."""
    peers = {
        f"{optimizer.__name__}, V={num_classes}": sampled_step(num_classes, optimizer)
        for num_classes in (10_000, 100_000, 1_000_000)
        for optimizer in (torch.optim.SGD, torch.optim.Adagrad)
    }
    timings = interleaved(peers, rounds=10 * rounds)
    records = []
    for name, timing in timings.items():
        optimizer, num_classes = name.split(", V=")
        least = timings[f"{optimizer}, V=10000"].ms
        records.append(
            record(
                "growth",
                f"SampledSoftmax(sparse=True), {optimizer}",
                timing,
                num_classes=int(num_classes),
                in_features=IN_FEATURES,
                batch=ROWS,
                samples=SAMPLES,
                ratio_to_10000=round(timing.ms / least, 3),
            )
        )
    return records


def draws(rounds: int) -> list[dict[str, Any]]:
    """Draws a second on one core, with the log of their expected counts."""
    num_classes, num_samples = 1_000_000, 1 << 18
    counts = zipf_counts(num_classes)
    samplers: dict[str, Sampler] = {
        "Uniform": Uniform(num_classes),
        "LogUniform": LogUniform(num_classes),
        "Unigram": Unigram(counts),
        "Unigram(power=0.75)": Unigram(counts, power=0.75),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peers = {name: (lambda sampler=sampler: sampler.sample(num_samples)) for name, sampler in samplers.items()}
    timings = interleaved(peers, rounds=10 * rounds)
    torch.set_num_threads(threads)
    return [
        record(
            "draws", name, t, num_classes=num_classes, samples=num_samples,
            million_draws_per_second=round(num_samples / t.ms / 1e3, 1),
        )
        for name, t in timings.items()
    ]  # fmt: skip


def kernel(rounds: int) -> list[dict[str, Any]]:
    """How far the mean gradient of hidden states is from the exact one, on trained weights of 10,000 classes."""
    num_classes, in_features, rows = 10_000, 64, 32
    layer, hidden, targets = trained(num_classes, in_features, rows)
    logits = F.linear(hidden, layer.weight, layer.bias)
    exact = (logits.softmax(1) - F.one_hot(targets, num_classes)) @ layer.weight
    quadratic, centred = (QuadraticKernel(num_classes, in_features, centred=which) for which in (False, True))
    for sampler in (quadratic, centred):
        sampler.update(layer.weight, layer.bias)
    samplers: list[tuple[str, Sampler, int]] = [
        ("Uniform", Uniform(num_classes, shared=False), 32),
        ("Uniform", Uniform(num_classes, shared=False), 320),
        ("QuadraticKernel", centred, 32),
        ("QuadraticKernel(centred=False)", quadratic, 32),
    ]
    records = []
    for name, sampler, num_samples in samplers:
        bias, error = bias_of(sampler, num_samples, layer, hidden, targets, exact, repeats=60 * rounds)
        records.append(
            {
                "case": "kernel",
                "name": name,
                "num_classes": num_classes,
                "in_features": in_features,
                "samples": num_samples,
                "relative_bias": bias,
                "standard_error": error,
            }
        )
    return records


def one_vs_all(rounds: int) -> list[dict[str, Any]]:
    """Forward and backward of five labels a row, without and with the dense targets and logits."""
    num_classes, in_features, rows = 300_000, 256, 256
    layer = OneVsAll(in_features, num_classes)
    hidden = torch.randn(rows, in_features, requires_grad=True)
    targets = torch.randint(num_classes, (rows, 5))

    def dense(hidden: Tensor, targets: Tensor) -> Tensor:
        y = torch.zeros(rows, num_classes).scatter_(1, targets, 1.0)
        logits = F.linear(hidden, layer.weight, layer.bias)
        return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / rows

    def backward(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def run() -> None:
            hidden.grad = None
            layer.zero_grad()
            loss(hidden, targets).backward()

        return run

    peers = {"OneVsAll": backward(layer), "F.binary_cross_entropy_with_logits": backward(dense)}
    timings = interleaved(peers, rounds=2 * rounds, warmup=1)
    return [
        record(
            "one-vs-all", name, t, num_classes=num_classes, in_features=in_features, batch=rows,
            peak_bytes=peak_bytes(peers[name]),  # beyond the parameters, and the gradients that are there before
        )
        for name, t in timings.items()
    ]  # fmt: skip


def step_of(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    num_classes: int,
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
) -> Step:
    """One training step on random rows; the gradient of the hidden states is formed too."""
    hidden = torch.randn(ROWS, IN_FEATURES, requires_grad=True)
    targets = LogUniform(num_classes).sample(ROWS).ids
    steps = optimizer(module.parameters(), lr=0.01)  # pyright: ignore[reportCallIssue]

    def run() -> None:
        hidden.grad = None
        steps.zero_grad()
        loss(hidden, targets).backward()
        steps.step()

    return run


def sampled_step(num_classes: int, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> Step:
    """1,024 log-uniform samples without replacement."""
    sampler = LogUniform(num_classes, replacement=False)
    layer = SampledSoftmax(IN_FEATURES, num_classes, sampler, SAMPLES, sparse=True)
    return step_of(layer, layer, num_classes, optimizer)


def trained(num_classes: int, in_features: int, rows: int) -> tuple[FullSoftmax, Tensor, Tensor]:
    """A softmax trained on a task with structure: the next class follows from the class before, with noise."""
    layer = FullSoftmax(in_features, num_classes)
    embedding = nn.Embedding(num_classes, in_features)
    follows = torch.randint(num_classes, (num_classes, 4))
    steps = torch.optim.Adagrad([*layer.parameters(), *embedding.parameters()], lr=0.2)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        before = LogUniform(num_classes).sample(size).ids
        after = follows[before, torch.randint(4, (size,))]
        noise = LogUniform(num_classes).sample(size).ids
        return before, torch.where(torch.rand(size) < 0.2, noise, after)

    for _ in range(150):
        before, after = batch(512)
        steps.zero_grad()
        layer(embedding(before), after).backward()
        steps.step()
    before, after = batch(rows)
    return layer.requires_grad_(False), embedding(before).detach(), after


def bias_of(
    sampler: Sampler,
    num_samples: int,
    layer: FullSoftmax,
    hidden: Tensor,
    targets: Tensor,
    exact: Tensor,
    repeats: int,
) -> tuple[float, float]:
    """The bias of the gradient relative to the exact one, noise taken off, and its standard error."""
    sampled = SampledSoftmax(
        layer.in_features, layer.num_classes, sampler, num_samples, weight=layer.weight, reduction="sum"
    )
    assert sampled.bias is not None
    assert layer.bias is not None
    sampled.bias.data.copy_(layer.bias)
    sampled.requires_grad_(False)
    drawn = []
    for _ in range(repeats):
        leaf = hidden.clone().requires_grad_()
        sampled(leaf, targets).backward()
        drawn.append(leaf.grad)
    gradients = torch.stack([g for g in drawn if g is not None])
    variance = float((gradients.var(0) / repeats).sum())  # of the mean
    distance = float((gradients.mean(0) - exact).square().sum())
    scale = float(exact.square().sum())
    return round(max(distance - variance, 0.0) ** 0.5 / scale**0.5, 4), round((variance / scale) ** 0.5, 4)


def record(case: str, name: str, timing: Timing, **fields: Any) -> dict[str, Any]:
    """One flat record."""
    return {
        "case": case,
        "name": name,
        **fields,
        "ms": timing.ms,
        "low_ms": timing.low_ms,
        "high_ms": timing.high_ms,
    }


PARTS = {"step": step, "growth": growth, "draws": draws, "kernel": kernel, "one-vs-all": one_vs_all}

if __name__ == "__main__":
    main()

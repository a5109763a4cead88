"""Large sparse targets, the speed: a step of the factored layer against plain ones, and against V and d."""

import statistics
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional import spherical_loss
from lastlayer.functional.spherical import SphericalLoss, SphericalSoftmax, SquaredError, TaylorSoftmax, ZLoss
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput
from lastlayer.layers.hierarchical import HierarchicalSoftmax
from lastlayer.study.files import Record, Records
from lastlayer.study.measuring.measure import Timing, seconds_of
from lastlayer.study.measuring.memory import require_memory

Call = Callable[[], object]

LOSSES: dict[str, SphericalLoss] = {
    "squared error": SquaredError(),
    "spherical softmax": SphericalSoftmax(),
    "Taylor softmax": TaylorSoftmax(),
    "Z-loss": ZLoss(),
}
RATE = 1e-3
BATCHES = 64  # different targets in turn, so that their rows are not all in the cache
STEPS_A_RUN = 20  # of what takes about a millisecond
RUNS_A_ROUND = 12  # of those: many short runs, so that neither a disturbance nor a repair reaches the median
PLAIN, FUSED = "nn.Linear, {}, SGD", "three in-place products, squared error"


def measure_speed(
    num_classes: int,
    in_features: int,
    batch: int,
    rounds: int,
    seed: int = 0,
    losses: tuple[str, ...] = tuple(LOSSES),
    *,
    deep: bool = False,
) -> Records:
    """A whole step (forward, backward, update) of the output layer, all peers in turn: alone, or with `deep` below
    two hidden layers as wide as its input, where all are compared with the plain step of the first loss.

    The baseline of each loss is what a PyTorch user writes today: an `nn.Linear`, the same loss, backward, `SGD`.
    """
    torch.manual_seed(seed)
    _check_memory(num_classes, in_features, batch)
    targets = torch.randint(num_classes, (BATCHES, batch))
    inputs = torch.randn(batch, in_features)

    def encoder() -> nn.Module:
        layers = [module for _ in range(2) for module in (nn.Linear(in_features, in_features), nn.ReLU())]
        return nn.Sequential(*layers) if deep else nn.Identity()

    linear = nn.Linear(in_features, num_classes, bias=False)
    slow = {PLAIN.format(name): dense_step(linear, inputs, targets, LOSSES[name], encoder()) for name in losses}
    if not deep:
        slow[FUSED] = fused_step(linear, inputs, targets)
    hierarchical = HierarchicalSoftmax(in_features, num_classes, bias=False, sparse=True)
    quick = {"HierarchicalSoftmax, SGD": layer_step(hierarchical, inputs, targets, encoder())}
    for name in losses:
        layer = FactoredOutput(in_features, num_classes, loss=LOSSES[name])
        quick[f"FactoredOutput, {name}"] = step = layer_step(layer, inputs, targets, encoder())
        quick[f"FactoredOutput, {name}, one thread"] = on_one_thread(step)
    times = _times(slow, quick, rounds)
    records = []
    for name, found in times.items():
        plain = PLAIN.format(losses[0] if deep else name.split(", ")[1])  # of the same loss
        ratios = {
            f"times_faster_than_{base}": times[peer]["ms"] / found["ms"] if peer in times else None
            for base, peer in (("plain", plain), ("fused", FUSED))
        }
        sizes = {"num_classes": num_classes, "in_features": in_features, "batch": batch}
        case = "whole model" if deep else "output layer"
        records.append({"case": case, "name": name, **sizes, **ratios, **found})
    return records


def _check_memory(num_classes: int, in_features: int, batch: int) -> None:
    """Refuses sizes that do not fit: the peers, each with a weight of its own, are held at once."""
    weights = 3 + len(LOSSES)  # plain, its gradient, two levels, factored
    needed = 4 * num_classes * (weights * in_features + 4 * batch)
    require_memory(needed, torch.device("cpu"), f"V={num_classes:,} d={in_features:,}", "fewer --num-classes")


def measure_scaling(classes: list[int], widths: list[int], batch: int, rounds: int, seed: int = 0) -> Records:
    """A step of the factored layer against V at the last width, and against d at the first V, interleaved."""
    torch.manual_seed(seed)
    calls: dict[tuple[int, int], Call] = {}
    for num_classes, in_features in [(v, widths[-1]) for v in classes] + [(classes[0], d) for d in widths[:-1]]:
        layer = FactoredOutput(in_features, num_classes, loss=SquaredError())
        targets = torch.randint(num_classes, (BATCHES, batch))
        calls[num_classes, in_features] = layer_step(
            layer, torch.randn(batch, in_features), targets, nn.Identity()
        )
    return [
        {"case": "scaling", "num_classes": v, "in_features": d, "batch": batch, **found}
        for (v, d), found in _times({}, calls, rounds).items()
    ]


def multiply_adds(num_classes: int, in_features: int, batch: int) -> dict[str, float]:
    """The arithmetic of one step: of the plain one, and of the factored one."""
    return {
        "plain": 3.0 * batch * num_classes * in_features,
        "factored": batch * (9.0 * in_features**2 + 5.0 * batch * in_features + 4.0 * batch**2),
    }


def dense_step(
    linear: nn.Linear, inputs: Tensor, targets: Tensor, loss: SphericalLoss, encoder: nn.Module
) -> Call:
    """Forward, the loss, backward and `torch.optim.SGD`."""

    def of_hidden(hidden: Tensor, targets: Tensor) -> Tensor:
        return spherical_loss(hidden, linear.weight, targets, loss=loss)

    return _steps(of_hidden, [torch.optim.SGD(linear.parameters(), lr=RATE)], inputs, targets, encoder)


def layer_step(layer: OutputLayer, inputs: Tensor, targets: Tensor, encoder: nn.Module) -> Call:
    """`STEPS_A_RUN` steps of a layer of this library with SGD."""
    optimizer = layer.own_optimizer(RATE) or torch.optim.SGD(layer.parameters(), lr=RATE)
    return _steps(layer, [optimizer], inputs, targets, encoder, STEPS_A_RUN)


def _steps(
    loss: Callable[[Tensor, Tensor], Tensor],  # of hidden states and targets
    optimizers: list[torch.optim.Optimizer],
    inputs: Tensor,  # (N, d)
    targets: Tensor,  # (BATCHES, N)
    encoder: nn.Module,
    count: int = 1,
) -> Call:
    """`count` training steps, each with the next targets."""
    if own := list(encoder.parameters()):
        optimizers.append(torch.optim.SGD(own, lr=RATE))
    leaf = inputs.clone().requires_grad_()  # the rest of a network wants its gradient
    in_turn = cycle(targets)

    def steps() -> None:
        for _ in range(count):
            hidden = encoder(leaf)
            leaf.grad = None
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss(hidden, next(in_turn)).backward()
            for optimizer in optimizers:
                optimizer.step()

    return steps


def fused_step(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> Call:
    """A step of the squared error by hand: the least that a plain one takes: three products into buffers."""
    weight, in_turn, rows = linear.weight.detach(), cycle(targets), torch.arange(len(hidden))
    outputs, gradient = hidden.new_empty(len(hidden), linear.out_features), torch.empty_like(hidden)

    def step() -> None:
        torch.mm(hidden, weight.T, out=outputs)
        outputs[rows, next(in_turn)] -= 1
        torch.mm(outputs, weight, out=gradient)
        gradient.mul_(2 / len(hidden))
        weight.addmm_(outputs.T, hidden, alpha=-2 * RATE / len(hidden))

    return step


def on_one_thread(call: Call) -> Call:
    """The same without OpenMP's second thread, which small products hardly gain from and a busy machine delays."""

    def alone() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            call()
        finally:
            torch.set_num_threads(threads)

    return alone


def _times(slow: dict[Any, Call], quick: dict[Any, Call], rounds: int) -> dict[Any, Record]:
    """What a step takes, peers in turn: after every slow one all the quick ones, in short runs of many steps."""
    seconds: dict[Any, list[float]] = {name: [] for name in slow | quick}
    quick_runs = list(quick.items()) * (RUNS_A_ROUND // max(1, len(slow)))
    for turn in range(-1, rounds):  # the first does not count
        for some in [[one] for one in slow.items()] or [[]]:
            for name, call in [*some, *quick_runs]:
                took = seconds_of(call) / (STEPS_A_RUN if name in quick else 1)
                if turn >= 0:
                    seconds[name].append(took)
    return {name: times_of(runs) for name, runs in seconds.items()}


def times_of(seconds: list[float]) -> Record:
    """The median of the runs, which has no repair in it, their quartiles, and the mean, which has them all."""
    runs = Timing.of(seconds)
    mean_ms = 1e3 * statistics.fmean(seconds)
    return {"ms": runs.ms, "low_ms": runs.low_ms, "high_ms": runs.high_ms, "mean_ms": mean_ms, "rounds": runs.runs}

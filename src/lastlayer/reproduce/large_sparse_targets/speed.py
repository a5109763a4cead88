"""Large sparse targets, the speed: a step of the factored layer against plain ones, and against V and d."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional import spherical_loss
from lastlayer.functional.spherical import SphericalLoss, SphericalSoftmax, SquaredError, TaylorSoftmax, ZLoss
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput, FactoredSGD
from lastlayer.layers.hierarchical import HierarchicalSoftmax
from lastlayer.reproduce.large_sparse_targets.exactness import TimedStabilizer
from lastlayer.study.errors import UsageError
from lastlayer.study.files import Records
from lastlayer.study.measuring.measure import Timing
from lastlayer.study.measuring.memory import check_memory

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


@dataclass(frozen=True)
class StepTiming:
    """The median of the runs, which has no repair in it, and their mean, which has them all."""

    runs: Timing
    mean_ms: float

    @property
    def ms(self) -> float:
        """The median."""
        return self.runs.ms


def measure_speed(
    num_classes: int,
    in_features: int,
    batch: int,
    rounds: int,
    seed: int = 0,
    losses: tuple[str, ...] = tuple(LOSSES),
) -> Records:
    """A whole step (forward, backward, update) of the output layer alone, all peers in turn.

    The baseline of each loss is what a PyTorch user writes today: an `nn.Linear`, the same loss, backward, `SGD`.
    """
    torch.manual_seed(seed)
    _check_memory(num_classes, in_features, batch)
    targets = torch.randint(num_classes, (BATCHES, batch))
    hidden = torch.randn(batch, in_features)
    linear = nn.Linear(in_features, num_classes, bias=False)
    slow = {f"nn.Linear, {name}, SGD": dense_step(linear, hidden, targets, LOSSES[name]) for name in losses}
    slow["three in-place products, squared error"] = fused_step(linear, hidden, targets)
    hierarchical = HierarchicalSoftmax(in_features, num_classes, bias=False, sparse=True)
    quick = {"HierarchicalSoftmax, SGD": layer_step(hierarchical, hidden, targets)}
    for name in losses:
        layer = FactoredOutput(in_features, num_classes, loss=LOSSES[name])
        quick[f"FactoredOutput, {name}"] = layer_step(layer, hidden, targets)
        quick[f"FactoredOutput, {name}, one thread"] = on_one_thread(quick[f"FactoredOutput, {name}"])
    timings = _timings(slow, quick, rounds)
    sizes = {"num_classes": num_classes, "in_features": in_features, "batch": batch}
    return [
        _record("output layer", timing, name=name, **sizes, **_ratios(name, timing, timings))
        for name, timing in timings.items()
    ]


def _check_memory(num_classes: int, in_features: int, batch: int) -> None:
    """Refuses sizes that do not fit: the peers, each with a weight of its own, are held at once."""
    weights = 3 + len(LOSSES)  # plain, its gradient, two levels, factored
    needed = 4 * num_classes * (weights * in_features + 3 * batch)
    shortage = check_memory(needed, torch.device("cpu"))
    if shortage is not None:
        most = float(f"{num_classes * shortage.share:.1e}")
        sides = f"V={num_classes:,} d={in_features:,}"
        raise UsageError(f"{sides} needs {shortage}; --num-classes {most:,.0f} would fit")


def _record(case: str, timing: StepTiming, **fields: Any) -> dict[str, Any]:
    runs = timing.runs
    times = {"ms": runs.ms, "low_ms": runs.low_ms, "high_ms": runs.high_ms, "mean_ms": timing.mean_ms}
    return {"case": case, **fields, **times, "rounds": runs.runs}


def _ratios(name: str, timing: StepTiming, timings: dict[str, StepTiming]) -> dict[str, float | None]:
    """How many times faster than the plain step of the same loss, and than the hand-fused one."""
    loss = name.split(", ")[1] if ", " in name else ""
    plain = timings.get(f"nn.Linear, {loss}, SGD")
    fused = timings["three in-place products, squared error"]
    return {
        "times_faster_than_plain": None if plain is None else plain.ms / timing.ms,
        "times_faster_than_fused": fused.ms / timing.ms,
    }


def measure_whole_model(num_classes: int, in_features: int, batch: int, rounds: int, seed: int = 0) -> Records:
    """The same below two hidden layers as wide as the output layer's input, all trained by SGD."""
    torch.manual_seed(seed)
    targets = torch.randint(num_classes, (BATCHES, batch))
    inputs = torch.randn(batch, in_features)
    linear = nn.Linear(in_features, num_classes, bias=False)
    slow = {"nn.Linear": dense_step(linear, inputs, targets, SquaredError(), _encoder(in_features))}
    layers = {
        "HierarchicalSoftmax": HierarchicalSoftmax(in_features, num_classes, bias=False, sparse=True),
        "FactoredOutput": FactoredOutput(in_features, num_classes, loss=SquaredError()),
    }
    quick = {name: layer_step(layer, inputs, targets, _encoder(in_features)) for name, layer in layers.items()}
    timings = _timings(slow, quick, rounds)
    sizes = {"num_classes": num_classes, "in_features": in_features, "batch": batch}
    plain = timings["nn.Linear"].ms
    return [
        _record("whole model", timing, name=name, **sizes, times_faster_than_plain=plain / timing.ms)
        for name, timing in timings.items()
    ]


def measure_scaling(classes: list[int], widths: list[int], batch: int, rounds: int, seed: int = 0) -> Records:
    """A step of the factored layer against V at the last width, and against d at the first V, interleaved."""
    torch.manual_seed(seed)
    sizes = [(v, widths[-1]) for v in classes] + [(classes[0], d) for d in widths[:-1]]
    calls = {}
    for num_classes, in_features in sizes:
        layer = FactoredOutput(in_features, num_classes, loss=SquaredError())
        targets = torch.randint(num_classes, (BATCHES, batch))
        calls[num_classes, in_features] = layer_step(layer, torch.randn(batch, in_features), targets)
    timings = _timings({}, {f"{v} {d}": call for (v, d), call in calls.items()}, rounds)
    return [_record("scaling", timings[f"{v} {d}"], num_classes=v, in_features=d, batch=batch) for v, d in calls]


def measure_repairs(num_classes: int, in_features: int, batch: int, steps: int, seed: int = 0) -> Records:
    """What the repairs take, under the squared error, of a state that was just begun.

    Hidden states: one batch over and over, 16 in turn, and fresh ones whose directions have variances that fall as
    1 / k, with the same norm.
    """
    records = []
    for name in ("one batch", "16 batches in turn", "a spectrum that decays"):
        torch.manual_seed(seed)
        layer = FactoredOutput(in_features, num_classes, loss=SquaredError())
        stabilizer = layer._stabilizer = TimedStabilizer(automatic=True)
        optimizer = FactoredSGD(layer, RATE)
        hidden, seconds = _hidden_states(name, batch, in_features), []
        for step in range(-STEPS_A_RUN, steps):
            rows, targets = next(hidden).detach().requires_grad_(), torch.randint(num_classes, (batch,))
            if step == 0:  # from here on it counts
                stabilizer.seconds, stabilizer.repairs = 0.0, 0
            start = time.perf_counter()
            optimizer.zero_grad()
            layer(rows, targets).backward()
            optimizer.step()
            if step >= 0:
                seconds.append(time.perf_counter() - start)
        sizes = {"num_classes": num_classes, "in_features": in_features, "batch": batch, "steps": steps}
        found = {"repairs": stabilizer.repairs, "stabilizing_share": stabilizer.seconds / sum(seconds)}
        timing = StepTiming(Timing.of(seconds), 1e3 * statistics.fmean(seconds))
        records.append(_record("repairs", timing, name=name, **sizes, **found))
    return records


def _hidden_states(name: str, batch: int, in_features: int) -> Iterator[Tensor]:
    if name == "a spectrum that decays":
        scale = torch.arange(1, in_features + 1) ** -0.5
        basis, _ = torch.linalg.qr(torch.randn(in_features, in_features))
        directions = (in_features**0.5 * scale / scale.norm())[:, None] * basis
        while True:
            yield torch.randn(batch, in_features) @ directions
    yield from cycle([torch.randn(batch, in_features) for _ in range(1 if name == "one batch" else 16)])


def multiply_adds(num_classes: int, in_features: int, batch: int) -> dict[str, float]:
    """The arithmetic of one step: of the plain one, and of the factored one."""
    return {
        "plain": 3.0 * batch * num_classes * in_features,
        "factored": batch * (9.0 * in_features**2 + 5.0 * batch * in_features + 4.0 * batch**2),
    }


def dense_step(
    linear: nn.Linear, inputs: Tensor, targets: Tensor, loss: SphericalLoss, encoder: nn.Module | None = None
) -> Call:
    """Forward, the loss, backward and `torch.optim.SGD`."""

    def of_hidden(hidden: Tensor, targets: Tensor) -> Tensor:
        return spherical_loss(hidden, linear.weight, targets, loss=loss)

    return _steps(of_hidden, torch.optim.SGD(linear.parameters(), lr=RATE), inputs, targets, encoder)


def layer_step(layer: OutputLayer, inputs: Tensor, targets: Tensor, encoder: nn.Module | None = None) -> Call:
    """`STEPS_A_RUN` steps of a layer of this library with SGD."""
    optimizer = layer.own_optimizer(RATE) or torch.optim.SGD(layer.parameters(), lr=RATE)
    return _steps(layer, optimizer, inputs, targets, encoder, STEPS_A_RUN)


def _steps(
    loss: Callable[[Tensor, Tensor], Tensor],  # of hidden states and targets
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,  # (N, d)
    targets: Tensor,  # (BATCHES, N)
    encoder: nn.Module | None,
    count: int = 1,
) -> Call:
    """`count` training steps, each with the next targets."""
    optimizers = [optimizer, *([] if encoder is None else [torch.optim.SGD(encoder.parameters(), lr=RATE)])]
    leaf = inputs.clone().requires_grad_()  # the rest of a network wants its gradient
    in_turn = cycle(targets)

    def steps() -> None:
        for _ in range(count):
            hidden = leaf if encoder is None else encoder(leaf)
            leaf.grad = None
            for each in optimizers:
                each.zero_grad()
            loss(hidden, next(in_turn)).backward()
            for each in optimizers:
                each.step()

    return steps


@torch.no_grad()
def _fused(
    weight: Tensor,  # (V, d)
    hidden: Tensor,  # (N, d)
    ids: Tensor,  # (N,)
    outputs: Tensor,  # (N, V), a buffer
    gradient: Tensor,  # (N, d), a buffer
) -> None:
    """A step of the squared error by hand: three products into preallocated buffers."""
    torch.mm(hidden, weight.T, out=outputs)
    outputs[torch.arange(len(ids)), ids] -= 1
    torch.mm(outputs, weight, out=gradient)
    gradient *= 2 / len(ids)
    weight.addmm_(outputs.T, hidden, alpha=-2 * RATE / len(ids))


def fused_step(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> Call:
    """The hand-fused plain update."""
    outputs, gradient = hidden.new_empty(len(hidden), linear.out_features), torch.empty_like(hidden)
    in_turn, weight = cycle(targets), linear.weight.detach()
    return lambda: _fused(weight, hidden, next(in_turn), outputs, gradient)


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


def _timings(slow: dict[str, Call], quick: dict[str, Call], rounds: int) -> dict[str, StepTiming]:
    """Turn by turn: after every slow peer all the quick ones, in short runs of which a step counts."""
    seconds: dict[str, list[float]] = {name: [] for name in slow | quick}
    names = list(slow) or [None]
    for turn in range(-1, rounds):  # the first does not count
        for name in names:
            some = {} if name is None else {name: slow[name]}
            for call_name, call in [*some.items(), *list(quick.items()) * (RUNS_A_ROUND // len(names))]:
                start = time.perf_counter()
                call()
                if turn >= 0:
                    seconds[call_name].append(
                        (time.perf_counter() - start) / (STEPS_A_RUN if call_name in quick else 1)
                    )
    return {name: StepTiming(Timing.of(times), 1e3 * statistics.fmean(times)) for name, times in seconds.items()}


def _encoder(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

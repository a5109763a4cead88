"""What trained output layers cost, all of them side by side: a training step, its memory, a query."""

import copy
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput
from lastlayer.screening import Int8Preview, ScreenedSoftmax
from lastlayer.screening.base import Screen
from lastlayer.study.files import Record
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.training.language_model import adagrad, kept_examples

ROUNDS, QUERY_ROUNDS, QUERY_REPEATS = 7, 15, 8
CANDIDATES = 64  # rescored at first; an exact screen widens them where it must
SCREEN_FROM = 4096  # classes; below, a query of all of them is as quick


Sample = tuple[Tensor, Tensor]  # hidden states (N, d) of one model, and the words (N,) that came next


def measure_costs(layers: dict[str, OutputLayer], samples: dict[str, Sample], k: int) -> dict[str, Record]:
    """Measures every layer on its own sample, interleaved; the layers stay as they are.

    A record has medians in milliseconds, and bytes: `output_layer_ms` of forward, backward and update of the
    output layer alone; the `peak_bytes` that it holds beyond parameters and optimizer state; `query_ms` of the
    top-k of one hidden state; where the layer ends in one matrix `screened_query_ms` of the same through a screen,
    and `screened_agreement`, the share of hidden states whose top-k is the layer's own; `parameters`, how many.
    """
    steps = {name: _harmless_step(layer, samples[name]) for name, layer in layers.items()}
    step_times = interleaved(steps, rounds=ROUNDS, warmup=1)
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    steps.clear()  # frees the optimizers' states
    for layer in layers.values():
        layer.eval()

    screens = {name: screen for name, layer in layers.items() if (screen := screen_of(layer)) is not None}
    queries = {name: one_by_one(layer.topk, samples[name][0], k) for name, layer in layers.items()}
    for name, screen in screens.items():
        queries[f"{name}, screened"] = one_by_one(screen.topk, samples[name][0], k)
    query_times = interleaved(queries, rounds=QUERY_ROUNDS, repeats=QUERY_REPEATS)
    return {
        name: {
            "output_layer_ms": step_times[name].ms,
            "peak_bytes": peaks[name],
            "parameters": sum(part.numel() for part in trained_parts(layer)),
            "query_ms": query_times[name].ms,
            "screened_query_ms": query_times[f"{name}, screened"].ms if name in screens else None,
            "screened_agreement": _agreement(layer, screens[name], samples[name][0], k)
            if name in screens
            else None,
        }
        for name, layer in layers.items()
    }


def _harmless_step(layer: OutputLayer, sample: Sample) -> Callable[[], None]:
    """A training step too small to change anything, which costs what any other does."""
    if kept_examples(layer):  # a step changes what is kept for its examples
        layer = copy.deepcopy(layer)
    optimizer = layer.own_optimizer(1e-20) or adagrad(layer.parameters(), 0.0)
    layer.train()
    return training_step(loss_of(layer, len(sample[0])), optimizer, *sample)


def loss_of(layer: OutputLayer, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss of a batch: its rows are the first examples, where the layer keeps a number for each."""
    kept = kept_examples(layer)
    if not kept:
        return layer
    examples = torch.arange(rows, device=next(layer.parameters()).device) % kept
    return lambda hidden, targets: layer(hidden, targets, examples)


def training_step(
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    hidden: Tensor,  # (N, d)
    targets: Tensor,  # (N,)
) -> Callable[[], None]:
    """Forward, backward and update of an output layer, the gradient of the hidden states included."""
    optimizer.zero_grad()  # training leaves its last gradients
    inputs = hidden.detach().clone().requires_grad_()  # the rest of the network wants its gradient

    def step() -> None:
        loss(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        inputs.grad = None

    return step


def trained_parts(layer: OutputLayer) -> list[Tensor]:
    """The trained tensors of a layer; the weight of a `FactoredOutput` is state, not a parameter."""
    return list(layer.state_dict().values() if isinstance(layer, FactoredOutput) else layer.parameters())


def screen_of(layer: OutputLayer) -> Screen | None:
    """A screen whose every result is proved to equal the layer's; None for a layer without one matrix."""
    if layer.num_classes < SCREEN_FROM:
        return None
    try:
        return ScreenedSoftmax.from_layer(layer, preview=Int8Preview(), candidates=CANDIDATES, exact=True)
    except TypeError:
        return None


def one_by_one(topk: Callable[[Tensor, int], object], hidden: Tensor, k: int) -> Callable[[], None]:
    """The query of one hidden state, the next one at each call."""
    rows = cycle(hidden.split(1))

    @torch.no_grad()
    def query() -> None:
        topk(next(rows), k)

    return query


@torch.no_grad()
def _agreement(layer: OutputLayer, screen: Screen, hidden: Tensor, k: int) -> float:
    """Row by row, as the queries are timed: for a large batch the screen would use the full layer."""
    same = [
        set(screen.topk(row, k).indices[0].tolist()) == set(layer.topk(row, k).indices[0].tolist())
        for row in hidden.split(1)
    ]
    return sum(same) / len(same)

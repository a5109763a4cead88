"""How well a language model predicts held-out text: from the layer's own exact, normalised probabilities."""

import math
from dataclasses import dataclass

import torch

from lastlayer.study.text.batches import Streams
from lastlayer.study.training.language_model import LanguageModel, State


@dataclass(frozen=True)
class Quality:
    """What held-out tokens say of a model."""

    perplexity: float  # exp of the mean negative log-probability
    tokens: int


@torch.no_grad()
def evaluate(model: LanguageModel, streams: Streams, tokens: int) -> Quality:
    """Perplexity on about the first `tokens` of the streams; a state is carried from window to window."""
    total, seen = 0.0, 0
    state: State | None = None
    with _in_eval_mode(model):
        for number in range(windows_for(streams, tokens)):
            inputs, targets = streams[number]
            hidden, state = model.encode(inputs, state)
            total -= float(model.output.target_log_prob(hidden, targets).sum(dtype=torch.float64))
            seen += targets.numel()
    return Quality(math.exp(min(total / seen, 700.0)) if math.isfinite(total) else math.inf, seen)


@torch.no_grad()
def topk_accuracy(model: LanguageModel, streams: Streams, k: int, tokens: int) -> tuple[float, int]:
    """How often the next word is among the `k` most probable, and of how many tokens."""
    hits, seen = 0, 0
    state: State | None = None
    k = min(k, model.output.num_classes)
    with _in_eval_mode(model):
        for number in range(windows_for(streams, tokens)):
            inputs, targets = streams[number]
            hidden, state = model.encode(inputs, state)
            best = model.output.topk(hidden, k).indices
            hits += int((best == targets[..., None]).sum())
            seen += targets.numel()
    return hits / seen, seen


def windows_for(streams: Streams, tokens: int) -> int:
    """The windows that hold about `tokens`; at least one, at most all."""
    return max(1, min(streams.windows, round(tokens / (streams.batch * streams.window))))


class _in_eval_mode:
    """No dropout inside; the mode that was before afterwards."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)

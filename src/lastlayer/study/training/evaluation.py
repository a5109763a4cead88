"""How well a language model predicts held-out text: from the layer's own exact, normalised probabilities."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lastlayer.metrics import ndcg, recall, reciprocal_rank
from lastlayer.study.text.batches import NO_TARGET, Batches, num_targets
from lastlayer.study.training.language_model import LanguageModel, State


@dataclass(frozen=True)
class Quality:
    """What held-out tokens say of a model."""

    perplexity: float  # exp of the mean negative log-probability
    tokens: int


class Ranking(NamedTuple):
    """Where the k most probable classes of held-out tokens have the true one."""

    recall: float  # how often they have it
    ndcg: float
    reciprocal_rank: float
    tokens: int  # how many were ranked


@torch.no_grad()
def evaluate(model: LanguageModel, batches: Batches, tokens: int) -> Quality:
    """Perplexity on about the first `tokens`; a state is carried from window to window where the text goes on."""
    total, seen = 0.0, 0
    state: State | None = None
    with _in_eval_mode(model):
        for number in range(windows_for(batches, tokens)):
            inputs, targets = batches[number]
            hidden, state = model.encode(inputs, None if batches.starts_anew(number) else state)
            total -= float(model.output.target_log_prob(hidden, targets).sum(dtype=torch.float64))
            seen += num_targets(targets)
    return Quality(math.exp(min(total / seen, 700.0)) if math.isfinite(total) else math.inf, seen)


@torch.no_grad()
def rank_held_out(model: LanguageModel, batches: Batches, k: int, tokens: int) -> Ranking:
    """How the `k` most probable classes rank the next token, of about the first `tokens`."""
    best, wanted = [], []
    state: State | None = None
    k = min(k, model.output.num_classes)
    with _in_eval_mode(model):
        for number in range(windows_for(batches, tokens)):
            inputs, targets = batches[number]
            hidden, state = model.encode(inputs, None if batches.starts_anew(number) else state)
            kept = targets != NO_TARGET
            best.append(model.output.topk(hidden[kept], k).indices)
            wanted.append(targets[kept])
    indices, targets = torch.cat(best), torch.cat(wanted)
    return Ranking(
        float(recall(indices, targets)),
        float(ndcg(indices, targets)),
        float(reciprocal_rank(indices, targets)),
        len(targets),
    )


def windows_for(batches: Batches, tokens: int) -> int:
    """The windows that hold about `tokens`; at least one, at most all."""
    return max(1, min(batches.windows, round(tokens / batches.tokens_a_window)))


class _in_eval_mode:
    """No dropout inside; the mode that was before afterwards."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)

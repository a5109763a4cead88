"""How well a language model predicts held-out text: from the layer's own exact, normalised probabilities.

Two kinds of layers have no perplexity: one whose scores are no probabilities (`OneVsAll`), and one that gives a
held-out token probability 0 (a `normalizer` of `FullSoftmax`), whose perplexity would be infinite.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.layers.one_vs_all import OneVsAll
from lastlayer.metrics import ndcg, recall, reciprocal_rank
from lastlayer.study.text.batches import NO_TARGET, Batches, num_targets
from lastlayer.study.training.language_model import LanguageModel


@dataclass(frozen=True)
class Quality:
    """What held-out tokens say of a model."""

    perplexity: float | None  # exp of the mean negative log-probability, where that is a number; nan if one is
    zero_share: float | None  # of the tokens, those of probability 0; None for a layer without probabilities
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
    seen = sum(num_targets(batches[number][1]) for number in range(windows_for(batches, tokens)))
    if isinstance(model.output, OneVsAll):  # its scores are no distribution over the classes
        return Quality(None, None, seen)
    total, zeros = 0.0, 0
    for hidden, targets in encoded(model, batches, tokens):
        log_prob = model.output.target_log_prob(hidden, targets)
        is_zero = log_prob == -torch.inf
        total -= float(log_prob.masked_fill(is_zero, 0).sum(dtype=torch.float64))
        zeros += int(is_zero.sum())
    if not math.isfinite(total):
        return Quality(math.nan, zeros / seen, seen)
    return Quality(None if zeros else math.exp(min(total / seen, 700.0)), zeros / seen, seen)


@torch.no_grad()
def rank_held_out(model: LanguageModel, batches: Batches, k: int, tokens: int) -> Ranking:
    """How the `k` most probable classes rank the next token, of about the first `tokens`."""
    best, wanted = [], []
    k = min(k, model.output.num_classes)
    for hidden, targets in encoded(model, batches, tokens):
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


def encoded(model: LanguageModel, batches: Batches, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and targets of each window, without dropout; the model is in its own mode again afterwards."""
    training, state = model.training, None
    model.eval()
    try:
        for number in range(windows_for(batches, tokens)):
            inputs, targets = batches[number]
            hidden, state = model.encode(inputs, None if batches.starts_anew(number) else state)
            yield hidden, targets
    finally:
        model.train(training)

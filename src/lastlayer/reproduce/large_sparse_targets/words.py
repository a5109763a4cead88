"""Large sparse targets, on text: words from their context, under each loss for the same time."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lastlayer.functional.spherical import (
    NormalizedLoss,
    SphericalSoftmax,
    SquaredError,
    TaylorSoftmax,
    ZLoss,
)
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.factored import FactoredOutput, FactoredSGD
from lastlayer.layers.sampled.negative_sampling import NegativeSampling
from lastlayer.layers.samplers.unigram import Unigram
from lastlayer.metrics import recall
from lastlayer.study.choices import CHOICES
from lastlayer.study.files import Records
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.language_model import adagrad
from lastlayer.study.training.trainer import Budget

CONTEXT = 4  # words: two on each side, or the last four
BATCH, WIDTH = 128, 128
RATE = 0.1  # of Adagrad
NEGATIVES, NOISE_POWER = 8, 0.75
EVALUATED = 2000  # held-out positions
QUERIES = (50, 100, 200, 400)  # ids of frequent words whose neighbours are shown


def _negative_sampling(in_features: int, counts: Tensor) -> OutputLayer:
    """As word2vec has it: the words' own vectors start at zero, and each row has negatives of its own."""
    noise = Unigram(counts.clamp(min=1), NOISE_POWER, shared=False)
    weight = nn.Parameter(torch.zeros(len(counts), in_features))
    return NegativeSampling(in_features, len(counts), noise, NEGATIVES, bias=False, sparse=True, weight=weight)


METHODS: dict[str, Callable[[int, Tensor], OutputLayer]] = {  # of the width and the words' counts
    "squared error, factored": lambda d, counts: FactoredOutput(d, len(counts), loss=SquaredError()),
    "Z-loss, factored": lambda d, counts: FactoredOutput(d, len(counts), loss=ZLoss()),
    "spherical softmax, factored": lambda d, counts: FactoredOutput(d, len(counts), loss=SphericalSoftmax()),
    "Taylor softmax, factored": lambda d, counts: FactoredOutput(d, len(counts), loss=TaylorSoftmax()),
    "negative sampling": _negative_sampling,
    "hierarchical softmax": CHOICES["hierarchical"].build,
    "softmax": CHOICES["full"].build,
}
EMBEDDING_METHODS = ("squared error, factored", "Z-loss, factored", "negative sampling", "hierarchical softmax")
MODEL_METHODS = ("spherical softmax, factored", "Taylor softmax, factored", "Z-loss, factored", "softmax")


class ContextModel(nn.Module):
    """Hidden states from a few words: their mean (embeddings), or a layer over all of them (language model)."""

    def __init__(self, num_classes: int, width: int, deep: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width, sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.mix = nn.Sequential(nn.Linear(CONTEXT * width, width), nn.ReLU()) if deep else None

    def forward(
        self,
        contexts: Tensor,  # (N, CONTEXT)
    ) -> Tensor:  # (N, d)
        """The hidden states."""
        words = self.embedding(contexts)
        return words.mean(1) if self.mix is None else self.mix(words.flatten(1))


def train_words(corpus: Corpus, names: tuple[str, ...], budget: Budget, *, deep: bool, seed: int) -> Records:
    """Trains each method for the same budget, and judges it on held-out text."""
    train, held_out = examples(corpus.train, deep), examples(corpus.held_out, deep)
    records = []
    for name in names:
        torch.manual_seed(seed)
        model = ContextModel(corpus.num_classes, WIDTH, deep)
        layer = METHODS[name](WIDTH, corpus.counts)
        seconds, steps = _train(model, layer, train, budget)
        records.append(
            {
                "case": "language model" if deep else "embeddings",
                "name": name,
                "num_classes": corpus.num_classes,
                "seconds": seconds,
                "steps": steps,
                "examples": steps * BATCH,
                **_judge(model, layer, held_out),
                "neighbours": None if deep else neighbours(model, corpus.words),
            }
        )
    return records


def examples(ids: Tensor, deep: bool) -> tuple[Tensor, Tensor]:  # (n, CONTEXT), (n,)
    """Every position with its context: the words before it, or on both sides of it."""
    windows = ids.unfold(0, CONTEXT + 1, 1)
    target = CONTEXT if deep else CONTEXT // 2
    around = [place for place in range(CONTEXT + 1) if place != target]
    return windows[:, around], windows[:, target]


def _train(
    model: ContextModel, layer: OutputLayer, data: tuple[Tensor, Tensor], budget: Budget
) -> tuple[float, int]:
    """`(seconds, steps)` of training."""
    own = FactoredSGD(layer, 0.0) if isinstance(layer, FactoredOutput) else None
    optimizers = [adagrad(model.parameters(), RATE), own or adagrad(layer.parameters(), RATE)]
    contexts, targets = data
    seconds, steps = 0.0, 0
    while budget.share_used(seconds, steps) < 1:
        start = time.perf_counter()
        rows = torch.randint(len(targets), (BATCH,))
        hidden = model(contexts[rows])
        for optimizer in optimizers:
            optimizer.zero_grad()
        if isinstance(layer, FactoredOutput):
            # half of the largest rate that does not overshoot the squared error; else one for unit hidden states
            share = 1 / 8 if isinstance(layer.loss, SquaredError) else 20.0
            optimizers[1].param_groups[0]["lr"] = share / max(float(hidden.detach().square().sum(1).mean()), 1e-6)
        layer(hidden, targets[rows]).backward()
        for optimizer in optimizers:
            optimizer.step()
        steps += 1
        seconds += time.perf_counter() - start
    return seconds, steps


@torch.no_grad()
def _judge(model: ContextModel, layer: OutputLayer, data: tuple[Tensor, Tensor]) -> dict[str, float | None]:
    """Top-10 accuracy, and perplexity where the layer has probabilities, on evenly spread held-out positions."""
    layer.eval()
    contexts, targets = data
    rows = torch.linspace(0, len(targets) - 1, min(EVALUATED, len(targets))).long()
    hidden, wanted = model(contexts[rows]), targets[rows]
    best = torch.cat([layer.topk(part, 10).indices for part in hidden.split(BATCH)])
    has_probabilities = not isinstance(layer, NegativeSampling)  # it is trained for something else
    if isinstance(layer, FactoredOutput):
        has_probabilities = isinstance(layer.loss, NormalizedLoss)
    perplexity = None
    if has_probabilities:
        perplexity = math.exp(-float(layer.target_log_prob(hidden, wanted).double().mean()))
    return {"top10_accuracy": float(recall(best, wanted)), "perplexity": perplexity}


def neighbours(model: ContextModel, words: list[str], k: int = 4) -> str:
    """The nearest words, by cosine, of a few frequent ones."""
    table = F.normalize(model.embedding.weight.detach(), dim=1)
    lines = []
    for query in QUERIES:
        if query < len(words):
            near = (table @ table[query]).topk(min(k + 1, len(words))).indices[1:]
            lines.append(f"{words[query]}: {' '.join(words[i] for i in near.tolist())}")
    return "; ".join(lines)

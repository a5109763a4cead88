"""Language modelling with one LSTM under softmaxes and their remedies: equal steps, several seeds."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lastlayer.layers.base import OutputLayer
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sigsoftmax import Sigsoftmax
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.measuring.rank import rank
from lastlayer.study.text.batches import Streams
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.evaluation import evaluate
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import Budget, Trainer

BATCH, WINDOW = 20, 35
RANK_CONTEXTS = 700

# Test perplexity on WikiText-2 of an AWD-LSTM, 11 seeds (Parthiban, Mao and Inkpen, AAAI 2021).
PUBLISHED = {
    "softmax": 64.63,
    "sigsoftmax": 64.35,
    "PLIF": 64.16,
    "frozen PLIF": 64.30,
    "mixture": 61.96,
    "wide softmax": None,
}


def build(name: str, width: int, num_classes: int, components: int) -> OutputLayer:
    """One of the layers of `PUBLISHED`."""
    if name == "mixture":
        return MixtureOfSoftmaxes(width, num_classes, components)
    if name == "wide softmax":
        return FullSoftmax(wide(width, num_classes, components), num_classes)
    maps = {
        "softmax": lambda: None,
        "sigsoftmax": Sigsoftmax,
        "PLIF": PLIF,
        "frozen PLIF": lambda: PLIF(init_std=1.0, frozen=True),
    }
    return FullSoftmax(width, num_classes, logit_map=maps[name]())


def wide(width: int, num_classes: int, components: int) -> int:
    """The width at which a model with a plain softmax has the parameters of the one with the mixture."""

    def plain(w: int) -> int:  # embedding, output layer, LSTM
        return num_classes * (2 * w + 1) + 8 * w * w + 8 * w

    wanted = plain(width) + (width + 1) * components * width + width * components
    while plain(width) < wanted:
        width += 1
    return width


def train(
    name: str,
    corpus: Corpus,
    seed: int,
    *,
    width: int,
    components: int,
    steps: int,
    held_out_tokens: int,
    folder: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Trains one model, from its checkpoint where there is one, and measures all but its speed."""
    torch.manual_seed(seed)
    layer = build(name, width, corpus.num_classes, components)
    model = LanguageModel(corpus.num_classes, layer).to(device)
    held_out = Streams(corpus.held_out, 10, 50, device)
    identity = {"layer": name, "text": corpus.fingerprint(), "seed": seed, "steps": steps, "width": width}
    streams = Streams(corpus.train, BATCH, WINDOW, device)
    path = folder / f"{name.replace(' ', '-')}-{seed}.safetensors"
    trainer = Trainer(
        model, streams, held_out, Budget(steps=steps), learning_rate=0.2, path=path, identity=identity
    )
    trainer.resume()
    if trainer.result is None:
        trainer.run()
        trainer.result = asdict(evaluate(model, held_out, held_out_tokens))
        trainer.save()
    inputs, targets = streams[0]
    with torch.no_grad():
        model.eval()
        context = torch.cat(
            [model.encode(held_out[i][0], None)[0].flatten(0, 1) for i in range(min(2, held_out.windows))]
        )
        hidden = model.encode(inputs, None)[0]
    ranks = rank(layer, context[:RANK_CONTEXTS])
    memory = peak_bytes(lambda: layer(hidden, targets).backward())
    return {
        "perplexity": trainer.result["perplexity"],
        "held_out_tokens": trainer.result["tokens"],
        "peak_bytes": memory,
        "parameters": sum(p.numel() for p in model.parameters()),
        "rank": ranks.numerical,
        "effective_rank": ranks.effective,
        "rank_contexts": min(RANK_CONTEXTS, len(context)),
        "published_perplexity": PUBLISHED[name],
    }


def time_steps(
    corpus: Corpus, *, width: int, components: int, device: torch.device, rounds: int = 7
) -> dict[str, dict[str, Any]]:
    """What a training step, optimizer included, takes under each layer, and so an epoch.

    The layers are interleaved, as a machine that is busy for a while is then busy for all of them.
    """
    streams = Streams(corpus.train, BATCH, WINDOW, device)
    held_out = Streams(corpus.held_out, 10, 50, device)

    def stepper(name: str) -> Callable[[], None]:
        layer = build(name, width, corpus.num_classes, components)
        model = LanguageModel(corpus.num_classes, layer).to(device)
        return Trainer(model, streams, held_out, Budget(steps=1 << 30), learning_rate=0.2)._step

    timings = interleaved({name: stepper(name) for name in PUBLISHED}, rounds=rounds)
    base = timings["softmax"].ms
    return {
        name: {
            "step_ms": timing.ms,
            "step_low_ms": timing.low_ms,
            "step_high_ms": timing.high_ms,
            "seconds_an_epoch": 1e-3 * timing.ms * streams.windows,
            "ratio_to_softmax": timing.ms / base,
        }
        for name, timing in timings.items()
    }

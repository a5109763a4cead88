"""Language modelling with one LSTM under softmaxes and their remedies: equal steps, several seeds."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lastlayer.reproduce.softmax_bottleneck.layers import build
from lastlayer.study.files import Record
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.measuring.rank import rank
from lastlayer.study.text.batches import Streams
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.evaluation import encoded, evaluate
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


def train(
    key: Record, corpus: Corpus, *, components: int, held_out_tokens: int, folder: Path, device: torch.device
) -> Record:
    """Trains the model of a cell, from its checkpoint where there is one, and measures all but its speed."""
    name, seed = key["layer"], key["seed"]
    torch.manual_seed(seed)
    layer = build(name, key["width"], corpus.num_classes, components)
    trainer = Trainer(
        LanguageModel(corpus.num_classes, layer).to(device),
        Streams(corpus.train, BATCH, WINDOW, device),
        Streams(corpus.held_out, 10, 50, device),
        Budget(steps=key["steps"]),
        learning_rate=0.2,
        path=folder / f"{name.replace(' ', '-')}-{seed}.safetensors",
        identity={**key, "text": corpus.fingerprint()},
    )
    trainer.resume()
    model, held_out = trainer.model, trainer.held_out
    if trainer.result is None:
        trainer.run()
        trainer.result = asdict(evaluate(model, held_out, held_out_tokens))
        trainer.save()
    inputs, targets = trainer.train[0]
    with torch.no_grad():
        model.eval()
        contexts = torch.cat([hidden.flatten(0, 1) for hidden, _ in encoded(model, held_out, 2 * RANK_CONTEXTS)])
        hidden = model.encode(inputs, None)[0]
    ranks = rank(layer, contexts[:RANK_CONTEXTS])
    return {
        "perplexity": trainer.result["perplexity"],
        "held_out_tokens": trainer.result["tokens"],
        "peak_bytes": peak_bytes(lambda: layer(hidden, targets).backward()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "rank": ranks.numerical,
        "effective_rank": ranks.effective,
        "rank_contexts": min(RANK_CONTEXTS, len(contexts)),
        "published_perplexity": PUBLISHED[name],
    }


def time_steps(
    corpus: Corpus, *, width: int, components: int, device: torch.device, rounds: int = 7
) -> dict[str, Record]:
    """What a training step, optimizer included, takes under each layer, and so an epoch.

    The layers are interleaved, as a machine that is busy for a while is then busy for all of them.
    """
    streams = Streams(corpus.train, BATCH, WINDOW, device)
    held_out = Streams(corpus.held_out, 10, 50, device)

    def stepper(name: str) -> Callable[[], None]:
        layer = build(name, width, corpus.num_classes, components)
        model = LanguageModel(corpus.num_classes, layer).to(device)
        return Trainer(model, streams, held_out, Budget(steps=1 << 30), learning_rate=0.2).step

    timings = interleaved({name: stepper(name) for name in PUBLISHED}, rounds=rounds)
    return {
        name: {
            "step_ms": timing.ms,
            "step_low_ms": timing.low_ms,
            "step_high_ms": timing.high_ms,
            "seconds_an_epoch": 1e-3 * timing.ms * streams.windows,
            "ratio_to_softmax": timing.ms / timings["softmax"].ms,
        }
        for name, timing in timings.items()
    }

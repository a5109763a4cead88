"""Language modelling with one LSTM under softmaxes and their remedies: equal steps, several seeds."""

from collections.abc import Callable
from pathlib import Path

import torch

from lastlayer.functional.logit_map import LogitMap
from lastlayer.layers.full import FullSoftmax
from lastlayer.layers.mixture import MixtureOfSoftmaxes
from lastlayer.layers.monotone_network import MonotoneNetwork
from lastlayer.layers.plif import PLIF
from lastlayer.layers.sigsoftmax import Sigsoftmax
from lastlayer.reproduce.models import finish, hidden_states, trainer_of
from lastlayer.study.files import Record
from lastlayer.study.measuring.measure import interleaved, peak_bytes
from lastlayer.study.measuring.rank import rank
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.trainer import Budget

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
MAPS: dict[str, Callable[[int], LogitMap | None]] = {  # of the number of knots
    "softmax": lambda knots: None,
    "sigsoftmax": lambda knots: Sigsoftmax(),
    "PLIF": PLIF,
    "frozen PLIF": lambda knots: PLIF(knots, init_std=1.0, frozen=True),
    "monotone network": lambda knots: MonotoneNetwork(10),
}


def build(
    name: str, width: int, num_classes: int, components: int, knots: int = 100_000
) -> FullSoftmax | MixtureOfSoftmaxes:
    """A mixture of so many components; or a softmax, of the logits through one of `MAPS` or of more features."""
    if name.startswith("mixture"):
        return MixtureOfSoftmaxes(width, num_classes, components)
    if name == "wide softmax":
        return FullSoftmax(wide(width, num_classes, components), num_classes)
    return FullSoftmax(width, num_classes, logit_map=MAPS[name](knots))


def wide(width: int, num_classes: int, components: int) -> int:
    """The width at which a language model with a plain softmax has the parameters of the one with the mixture."""

    def plain(w: int) -> int:  # embedding, output layer, LSTM
        return num_classes * (2 * w + 1) + 8 * w * w + 8 * w

    wanted = plain(width) + (width + 1) * components * width + width * components
    while plain(width) < wanted:
        width += 1
    return width


def train(
    key: Record, corpus: Corpus, *, components: int, held_out_tokens: int, folder: Path, device: torch.device
) -> Record:
    """Trains the model of a cell, from its checkpoint where there is one, and measures all but its speed."""
    name, seed = key["layer"], key["seed"]
    torch.manual_seed(seed)
    layer = build(name, key["width"], corpus.num_classes, components)
    path = folder / f"{name.replace(' ', '-')}-{seed}.safetensors"
    identity = {**key, "text": corpus.fingerprint()}
    trainer = trainer_of(layer, corpus, device, Budget(steps=key["steps"]), path=path, identity=identity)
    quality = finish(trainer, held_out_tokens)
    contexts, _ = hidden_states(trainer.model, trainer.held_out, 2 * RANK_CONTEXTS)
    hidden, targets = hidden_states(trainer.model, trainer.train, 1)  # a window
    ranks = rank(layer, contexts[:RANK_CONTEXTS])
    return {
        "perplexity": quality["perplexity"],
        "held_out_tokens": quality["tokens"],
        "peak_bytes": peak_bytes(lambda: layer(hidden, targets).backward()),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "rank": ranks.numerical,
        "effective_rank": ranks.effective,
        "rank_contexts": min(RANK_CONTEXTS, len(contexts)),
        "published_perplexity": PUBLISHED[name],
    }


def time_steps(corpus: Corpus, *, width: int, components: int, device: torch.device) -> dict[str, Record]:
    """What a training step, optimizer included, takes under each layer, and so an epoch.

    The layers are interleaved, as a machine that is busy for a while is then busy for all of them.
    """
    trainers = {
        name: trainer_of(build(name, width, corpus.num_classes, components), corpus, device, Budget(steps=1 << 30))
        for name in PUBLISHED
    }
    timings = interleaved({name: trainer.step for name, trainer in trainers.items()}, rounds=7)
    return {
        name: {
            "step_ms": timing.ms,
            "step_low_ms": timing.low_ms,
            "step_high_ms": timing.high_ms,
            "seconds_an_epoch": 1e-3 * timing.ms * trainers[name].train.windows,
            "ratio_to_softmax": timing.ms / timings["softmax"].ms,
        }
        for name, timing in timings.items()
    }

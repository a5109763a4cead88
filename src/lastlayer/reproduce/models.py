"""The language models of the studies: trained once, taken from their checkpoints afterwards."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lastlayer.layers.base import OutputLayer
from lastlayer.study.files import Record
from lastlayer.study.text.batches import Batches
from lastlayer.study.text.corpus import Corpus
from lastlayer.study.training.evaluation import encoded, evaluate
from lastlayer.study.training.language_model import LanguageModel
from lastlayer.study.training.trainer import Budget, Trainer


def trainer_of(
    layer: OutputLayer, corpus: Corpus, device: torch.device, budget: Budget, **options: Any
) -> Trainer:
    """The run of a model under that layer, from its start."""
    model = LanguageModel(corpus.num_classes, layer).to(device)
    train, held_out = corpus.training_batches(20, 35, device), corpus.held_out_batches(10, 50, device)
    return Trainer(model, train, held_out, budget, learning_rate=0.2, **options)


def finish(trainer: Trainer, tokens: int, on_step: Callable[[Trainer], object] = lambda trainer: None) -> Record:
    """Trains to the end, from the checkpoint if there is one; the quality on about so many held-out tokens."""
    trainer.resume()
    if trainer.result is None:
        trainer.run(on_step)
        trainer.result = asdict(evaluate(trainer.model, trainer.held_out, tokens))
        trainer.save()
    return trainer.result


@torch.no_grad()
def hidden_states(model: LanguageModel, batches: Batches, tokens: int) -> tuple[Tensor, Tensor]:  # (n, d), (n,)
    """The states from which about so many tokens are predicted, and these tokens."""
    parts = zip(*encoded(model, batches, tokens), strict=True)
    hidden, targets = (torch.cat([part.flatten(0, 1) for part in column]) for column in parts)
    return hidden, targets

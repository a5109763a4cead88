"""A small language model under any output layer: embedding, LSTM, output layer."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lastlayer.layers.base import OutputLayer
from lastlayer.layers.sampled.unbiased import UnbiasedLayer

State = tuple[Tensor, Tensor]  # of the LSTM: (1, batch, width) each


class LanguageModel(nn.Module):
    """Predicts each next word from the words before it.

    Args:
        num_classes: V, the vocabulary.
        output: the output layer; its `in_features` is the width of everything.
        dropout: of the embeddings and of the hidden states, in training.
    """

    def __init__(self, num_classes: int, output: OutputLayer, dropout: float = 0.1) -> None:
        super().__init__()
        width = output.in_features
        self.embedding = nn.Embedding(num_classes, width, sparse=True)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.output = output

    def encode(
        self,
        inputs: Tensor,  # (batch, window), word ids
        state: State | None,
    ) -> tuple[Tensor, State]:  # (batch, window, width)
        """Hidden states from which the output layer predicts, and the state to carry on."""
        hidden, carried = self.lstm(self.dropout(self.embedding(inputs)), state)
        return self.dropout(hidden), carried

    def forward(
        self,
        inputs: Tensor,  # (batch, window)
        targets: Tensor,  # (batch, window)
        state: State | None = None,
        examples: Tensor | None = None,  # (batch, window), for a layer of `kept_examples`
    ) -> tuple[Tensor, State]:
        """The training loss, and the state to carry into the next window, detached."""
        hidden, (cell, memory) = self.encode(inputs, state)
        more = () if examples is None else (examples,)
        return self.output(hidden, targets, *more), (cell.detach(), memory.detach())


def kept_examples(layer: OutputLayer) -> int:
    """How many training examples the layer keeps a number for; 0 for most layers."""
    normalizers = layer.normalizers if isinstance(layer, UnbiasedLayer) else None
    return 0 if normalizers is None else len(normalizers)


def make_optimizers(model: LanguageModel, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Adam for the LSTM; Adagrad for what has a row for every word: it takes row-sparse and dense gradients by the
    same rule, so that no output layer has a better optimizer than another. A `FactoredOutput` has its own SGD."""
    tables = [*model.embedding.parameters()]
    # gradients of normalised losses are of the order of 1 / V; the factor was swept (docs/layers/factored.md)
    own = model.output.own_optimizer(max(5.0, model.output.num_classes / 6) * learning_rate)
    if own is None:
        tables += model.output.parameters()
    return [
        torch.optim.Adam(model.lstm.parameters(), lr=learning_rate / 50),
        adagrad(tables, learning_rate),
        *([] if own is None else [own]),
    ]


def adagrad(parameters: Iterable[nn.Parameter], learning_rate: float) -> torch.optim.Adagrad:
    """Adagrad that does not warn at its first row-sparse gradient."""
    checks = torch.sparse.check_sparse_tensor_invariants
    if not checks.is_enabled():
        checks.disable()  # as they are anyway; said aloud, PyTorch does not mention it
    return torch.optim.Adagrad(parameters, lr=learning_rate)

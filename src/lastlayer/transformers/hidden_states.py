"""The hidden states that a model's head really meets, caught on their way."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.transformers.replaced_head import put_head


class _Catcher(nn.Module):
    """Stands where the head stood, keeps what comes in, and computes nothing."""

    bias = None  # some models ask their head for it

    def __init__(self) -> None:
        super().__init__()
        self.caught: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.caught = hidden
        return hidden[..., :1]


@torch.no_grad()
def hidden_states(
    model: Any,
    batches: Iterable[Tensor],  # of token ids (N, T)
) -> Iterator[Tensor]:  # of (N * T, d)
    """Runs a model over text and yields what its head would have been given; the head itself is not computed.

    Encoder-decoder models get each batch as both input and labels' input. The model must be in `eval()`.
    """
    catcher = _Catcher()
    for ids in batches:
        more = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
        with put_head(model, catcher):
            model(input_ids=ids, **more)
        caught, catcher.caught = catcher.caught, None
        if caught is None:
            raise TypeError(f"{type(model).__name__} did not call its output head")
        yield caught.reshape(-1, caught.shape[-1])

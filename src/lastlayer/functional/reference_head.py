"""The layer whose distribution another one is compared with, chunk by chunk."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_linear
from lastlayer.functional.linear_chunks import LinearChunks, linear_logits
from lastlayer.functional.logit_map import LogitMap, check_logit_map


class ReferenceHead(NamedTuple):
    """A linear layer with its own hidden states: `logit_map(hidden @ weight.T + bias)`."""

    hidden: Tensor  # (..., D)
    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    logit_map: LogitMap | None = None


def check_reference(reference: object, shape: torch.Size, num_classes: int) -> ReferenceHead:
    """The reference, its hidden states as rows; or an error unless it fits `hidden (*shape, d)` and V classes."""
    if not isinstance(reference, tuple) or not 2 <= len(reference) <= 4:
        got = f"{len(reference)} values" if isinstance(reference, tuple) else type(reference).__name__
        raise TypeError(
            f"reference must be a tuple (hidden, weight), (hidden, weight, bias) or (hidden, weight, bias, "
            f"logit_map), got {got}"
        )
    head = ReferenceHead(*reference)
    try:
        check_linear(head.hidden, head.weight, head.bias)
        check_logit_map(head.logit_map)
    except (TypeError, ValueError) as wrong:
        raise type(wrong)(f"reference: {wrong}") from None
    if head.hidden.shape[:-1] != shape or len(head.weight) != num_classes:
        raise ValueError(
            f"reference must have the rows {tuple(shape)} and the {num_classes} classes of hidden and weight, "
            f"got hidden {tuple(head.hidden.shape)} and weight {tuple(head.weight.shape)}"
        )
    return head._replace(hidden=head.hidden.reshape(-1, head.hidden.shape[-1]))


class ReferenceChunks:
    """The log-probabilities of a reference, in the chunks and parts of a `LinearChunks(..., buffers=2)` of as many
    rows and classes."""

    def __init__(self, head: ReferenceHead, temperature: float, dtype: torch.dtype) -> None:
        self.chunks = LinearChunks(*head, dtype, buffers=2)
        self.temperature = temperature

    def multiply(self, rows: slice) -> None:
        """Computes the products of a chunk, before `log_prob` of its parts."""
        self.chunks.multiply(rows)

    def log_prob(self, part: slice) -> Tensor:  # (n, V)
        return (self.chunks.map(self.chunks.logits(part)) / self.temperature).log_softmax(1)


@torch.no_grad()
def reference_log_prob(head: ReferenceHead, temperature: float, dtype: torch.dtype) -> Tensor:  # (N, V)
    """All of them at once, by PyTorch's own operations."""
    parameters = () if head.logit_map is None else tuple(head.logit_map.parameters())
    return (linear_logits(*head, parameters, dtype)[1] / temperature).log_softmax(1)

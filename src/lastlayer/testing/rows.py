"""What every law starts from: some hidden states and targets, and what counts as equal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.layers.base import OutputLayer

ROWS = 7


def assert_equal(actual: Any, expected: Any, tolerance: float = 1e-10, name: str = "") -> None:
    """Equal up to rounding in float64, in shape and dtype; nan equals nan. `name` begins the message."""
    prefix = (lambda message: f"{name}: {message}") if name else None
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=prefix)


def rows_for(layer: OutputLayer, rows: int = ROWS, scale: float = 1.0, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Hidden states `(rows, d)` in the layer's dtype, and targets that include the first and last class."""
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(rows, layer.in_features, generator=generator, dtype=torch.float64)
    targets = torch.randint(layer.num_classes, (rows,), generator=generator)
    targets[:2] = torch.tensor([0, layer.num_classes - 1])[: len(targets[:2])]
    return hidden.to(next(layer.parameters()).dtype), targets


class Call(nn.Module):
    """A call of a layer as a module."""

    def __init__(self, layer: OutputLayer, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *arguments: Tensor) -> Any:
        return self.call(*arguments)

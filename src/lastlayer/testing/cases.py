"""The description of a layer for the law suite."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lastlayer.layers.base import OutputLayer


def spread_parameters(layer: OutputLayer) -> None:
    """Moves every parameter away from special values (zero biases), the same way each time."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_((0.4 * noise).to(parameter))


def fill_parameters(layer: OutputLayer, value: float) -> None:
    """Sets every parameter but those of a logit map to one number."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.startswith("logit_map."):
                parameter.fill_(value)


@dataclass(frozen=True)
class LayerCase:
    """One row of the table: a layer, how to make it, and the plain formula it must equal.

    Args:
        name: what a failing test is called.
        make: `make(**kwargs)` returns a small layer (d and V below about 30); `kwargs` are any of `reduction`,
            `ignore_index`, `device`, `dtype`.
        oracle: `oracle(layer, hidden)` gives the `(N, V)` log-probabilities of `hidden (N, d)` by plain PyTorch
            operations in the layer's own dtype, short enough to check by eye and written without the layer's code.
        loss_oracle: `loss_oracle(layer, hidden, targets)` gives the loss reduced as `layer.reduction` says, where
            it is not the plain reduced negative log-probability; `None` where it is.
        likelihood: False for a sampled loss, whose own tests compare it with the likelihood statistically.
        spread: sets the parameters of a fresh layer to values with nothing special about them.
        fill: `fill(layer, value)` sets all that `spread` sets to one number.
    """

    name: str
    make: Callable[..., OutputLayer]
    oracle: Callable[[Any, Tensor], Tensor]
    loss_oracle: Callable[[Any, Tensor, Tensor], Tensor] | None = None
    likelihood: bool = True
    spread: Callable[[Any], None] = spread_parameters
    fill: Callable[[Any, float], None] = fill_parameters

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float64, **kwargs: Any) -> OutputLayer:
        """A layer in `dtype` with spread parameters."""
        layer = self.make(dtype=dtype, **kwargs)
        self.spread(layer)
        return layer

    def loss(self, layer: OutputLayer, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss by the oracle."""
        if self.loss_oracle is not None:
            return self.loss_oracle(layer, hidden, targets)
        kept = targets != layer.ignore_index
        picked = self.oracle(layer, hidden).gather(-1, targets.masked_fill(~kept, 0)[:, None])[:, 0]
        row_loss = -picked.masked_fill(~kept, 0)
        if layer.reduction == "none":
            return row_loss
        return row_loss.sum() if layer.reduction == "sum" else row_loss.sum() / kept.sum()

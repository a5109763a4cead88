"""The description of a layer for the law suite, and what every law starts from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lastlayer.layers.base import OutputLayer

ROWS = 7
REDUCTIONS = ("mean", "sum", "none")
Function = Callable[[Tensor], Tensor]  # of hidden states


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
        row_loss = -gathered(self.oracle(layer, hidden), targets[:, None], layer.ignore_index)[:, 0]
        if layer.reduction == "none":
            return row_loss
        return (
            row_loss.sum() if layer.reduction == "sum" else row_loss.sum() / (targets != layer.ignore_index).sum()
        )

    def calls(self, layer: OutputLayer, targets: Tensor) -> dict[str, tuple[Function, Function]]:
        """Every differentiable call as a function of hidden states `(N, d)`, and the same by the oracle.

        `targets (N,)` may have ignored ones. The loss is first; that of a sampled layer is left out.
        """
        ignored, k = layer.ignore_index, min(2, layer.num_classes)
        ids = torch.stack([targets, targets.flip(0), targets], 1)

        def log_prob(hidden: Tensor) -> Tensor:
            return self.oracle(layer, hidden)

        calls: dict[str, tuple[Function, Function]] = {}
        if self.likelihood:
            calls["loss"] = (lambda h: layer(h, targets), lambda h: self.loss(layer, h, targets))
        calls["target_log_prob"] = (
            lambda h: layer.target_log_prob(h, targets),
            lambda h: gathered(log_prob(h), targets[:, None], ignored)[:, 0],
        )
        calls["score"] = (lambda h: layer.score(h, ids), lambda h: gathered(log_prob(h), ids, ignored))
        calls["log_prob"] = (layer.log_prob, log_prob)
        calls["topk"] = (lambda h: layer.topk(h, k).log_prob, lambda h: log_prob(h).topk(k).values)
        if layer.num_classes > 1:
            exclude = targets[:, None]
            calls["topk with exclude"] = (
                lambda h: layer.topk(h, 1, exclude=exclude).log_prob,
                lambda h: without(log_prob(h), exclude).topk(1).values,
            )
        return calls


def gathered(log_prob: Tensor, ids: Tensor, ignore_index: int) -> Tensor:  # (N, C)
    """Those entries of `log_prob (N, V)`; 0 where an id is ignored."""
    ignored = ids == ignore_index
    return log_prob.gather(-1, ids.masked_fill(ignored, 0)).masked_fill(ignored, 0)


def without(log_prob: Tensor, exclude: Tensor) -> Tensor:  # (N, V)
    """`log_prob (N, V)` with -inf at the ids `exclude (N, E)` of each row."""
    classes = torch.arange(log_prob.shape[-1], device=log_prob.device)
    return log_prob.masked_fill((exclude[:, :, None] == classes).any(1), -torch.inf)


def rows_for(
    layer: OutputLayer, rows: int = ROWS, scale: float = 1.0, *, ignored: int | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states `(rows, d)` in the layer's dtype; targets with the first and last class, one ignored."""
    generator = torch.Generator().manual_seed(3)
    hidden = scale * torch.randn(rows, layer.in_features, generator=generator, dtype=torch.float64)
    targets = torch.randint(layer.num_classes, (rows,), generator=generator)
    targets[:2] = torch.tensor([0, layer.num_classes - 1])[: len(targets[:2])]
    if ignored is not None:
        targets[ignored] = layer.ignore_index
    return hidden.to(next(layer.parameters()).dtype), targets


def assert_equal(actual: Any, expected: Any, tolerance: float = 1e-10, name: str = "") -> None:
    """Equal up to rounding in float64, in shape and dtype; nan equals nan. `name` begins the message."""
    prefix = (lambda message: f"{name}: {message}") if name else None
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=prefix)

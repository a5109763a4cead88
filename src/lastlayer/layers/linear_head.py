"""What layers share whose logits are those of one matrix."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lastlayer.functional.checks import check_vector
from lastlayer.functional.precision import as_exact
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.parts import draw, tied_or_new


class LinearHead(OutputLayer):
    """A layer whose logits are `weight @ h + bias`.

    Args:
        in_features: d, the width of `hidden`.
        num_classes: V.
        bias: whether there is a bias for each class.
        weight: an `nn.Parameter (V, d)` to use instead of a new one: tied.
        reduction, ignore_index: see `OutputLayer`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        weight: nn.Parameter | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        self.weight = tied_or_new(weight, (self.num_classes, self.in_features), device, dtype)
        self.bias = nn.Parameter(self.weight.new_empty(self.num_classes)) if bias else None
        self._start_bias(None)

    def reset_parameters(self) -> None:
        """Draws the weight (a tied one too) anew, as `nn.Linear`; the bias is as in a new layer."""
        draw(self.weight, self.in_features)
        self._start_bias(self._first_bias)

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight, bias, None)`: the parameters themselves."""
        return self.weight, self.bias, None

    def _start_bias(self, value: float | None) -> None:
        """Makes the bias `value`, here and in `reset_parameters`; None: it is drawn, as that of `nn.Linear`."""
        self._first_bias = value
        if self.bias is not None and value is None:
            draw(self.bias, self.in_features)
        elif self.bias is not None and value is not None:
            nn.init.constant_(self.bias, value)

    def _class_values(self, name: str, values: Tensor) -> Tensor:
        """A buffer's `(V,)` of a constructor's argument, float32 at least, on the weight's device.

        Where that is "meta" they stay where they are, and the layer has them when it gets memory.
        """
        check_vector(name, values, self.num_classes)
        values = as_exact(values.detach())
        return values if self.weight.is_meta else values.to(self.weight.device)

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        yield "weight", self.weight, (self.num_classes, self.in_features)
        yield "bias", self.bias, (self.num_classes,)

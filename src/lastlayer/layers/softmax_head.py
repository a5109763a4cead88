"""What layers share that are, once trained, a softmax over the logits of one matrix."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.checks import check_vector
from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.linear_statistics import linear_score, linear_statistics
from lastlayer.functional.linear_twin import mapped_logits
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.precision import as_exact
from lastlayer.functional.selection import Selection
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.parts import beside, draw, matrix_shapes, tied_or_new


class SoftmaxHead(OutputLayer):
    """`P(c | h) = softmax(f(weight @ h + bias))_c`, evaluated exactly.

    A subclass says how it is trained, and sets the `logit_map` f.

    Args:
        in_features: d, the width of `hidden`.
        num_classes: V.
        bias: whether there is a bias for each class.
        class_weights: `(V,)`, of the training loss; kept in float32 at least whatever the layer's dtype.
        weight: an `nn.Parameter (V, d)` to use instead of a new one: tied.
        reduction, ignore_index: see `OutputLayer`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    logit_map: LogitMap | None
    class_weights: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        class_weights: Tensor | None = None,
        weight: nn.Parameter | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        self.weight = tied_or_new(weight, (self.num_classes, self.in_features), device, dtype)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(self.weight.new_empty(self.num_classes))
            draw(self.bias, self.in_features)
        self.logit_map = None
        if class_weights is not None:
            check_vector("class_weights", class_weights, self.num_classes)
            class_weights = as_exact(class_weights.detach())
        self.register_buffer("class_weights", beside(class_weights, self.weight))

    def reset_parameters(self) -> None:
        """Draws weight (a tied one too) anew, as `nn.Linear`; the bias and the logit map are as in a new layer."""
        draw(self.weight, self.in_features)
        self._reset_bias()
        if self.logit_map is not None:
            self.logit_map.reset_parameters()

    def _reset_bias(self) -> None:
        if self.bias is not None:
            draw(self.bias, self.in_features)

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight, bias, logit_map)`: the parameters themselves."""
        return self.weight, self.bias, self.logit_map

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SoftmaxHead":
        """A cast of the layer is none of the class weights, and a move through "meta" does not lose them."""
        kept = self.class_weights
        super()._apply(fn, recurse)
        self.class_weights = beside(kept, self.weight)
        return self

    def _to_load(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """`nn.Linear` has no class weights: this layer keeps its own."""
        own = {} if self.class_weights is None else {f"{prefix}class_weights": self.class_weights}
        return {**own, **state_dict}

    def _parameter_shapes(self) -> Iterable[tuple[str, Tensor | None, tuple[int, ...]]]:
        return matrix_shapes(self)

    def _log_prob(self, hidden: Tensor) -> Tensor:
        return mapped_logits(hidden, self.weight, self.bias, self.logit_map).log_softmax(-1)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(
            hidden, self.weight, targets, bias=self.bias, logit_map=self.logit_map, reduction="none"
        )

    def _score(self, hidden: Tensor, ids: Tensor) -> Tensor:
        return linear_score(hidden, self.weight, ids, bias=self.bias, logit_map=self.logit_map)

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        result = linear_statistics(
            hidden, self.weight, bias=self.bias, logit_map=self.logit_map, k=k, selection=selection
        )
        assert result.topk is not None  # k is an int
        return result.topk

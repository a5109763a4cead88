"""What layers share that are, once trained, a softmax over the logits of one matrix."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lastlayer.functional.linear_chunks import mapped_logits
from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.linear_statistics import linear_score, linear_statistics
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.selection import Selection
from lastlayer.layers.linear_head import LinearHead


class SoftmaxHead(LinearHead):
    """`P(c | h) = softmax(f(weight @ h + bias))_c`, evaluated exactly.

    A subclass says how it is trained, and sets the `logit_map` f.

    Args:
        in_features: d, the width of `hidden`.
        num_classes: V.
        class_weights: `(V,)`, of the training loss; kept in float32 at least whatever the layer's dtype.
        bias, weight, reduction, ignore_index, device, dtype: see `LinearHead`.
    """

    logit_map: LogitMap | None
    class_weights: Tensor | None

    def __init__(
        self, in_features: int, num_classes: int, *, class_weights: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        self.logit_map = None
        own = None if class_weights is None else self._class_values("class_weights", class_weights)
        self.register_buffer("class_weights", own)

    def reset_parameters(self) -> None:
        """Draws weight (a tied one too) anew, as `nn.Linear`; the bias and the logit map are as in a new layer."""
        super().reset_parameters()
        if self.logit_map is not None:
            self.logit_map.reset_parameters()

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight, bias, logit_map)`: the parameters themselves."""
        return self.weight, self.bias, self.logit_map

    def _to_load(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """`nn.Linear` has no class weights: this layer keeps its own."""
        own = {} if self.class_weights is None else {f"{prefix}class_weights": self.class_weights}
        return {**own, **state_dict}

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

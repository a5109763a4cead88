"""The exact softmax over all classes, in chunks that never hold all the logits."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.checks import check_fraction, check_not_negative, check_vector
from lastlayer.functional.linear_chunks import as_exact
from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.linear_log_prob import linear_log_prob
from lastlayer.functional.linear_statistics import linear_statistics
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.selection import Selection
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.parts import map_beside, tied_or_new


class FullSoftmax(OutputLayer):
    """`F.cross_entropy(nn.Linear(in_features, num_classes)(hidden), targets)` without the `(N, V)` logits.

    The model is `P(c | h) = softmax(f(weight @ h + bias))_c` with f the `logit_map`, or nothing. The loss equals
    `functional.linear_cross_entropy`, whose options the constructor takes.

    Cost of a training step: `6 N V d` operations (three matrix products); memory beyond the parameters and their
    gradients: one chunk of logits, about 130 MB at most (twice that with a logit map). A query reads all of
    `weight`.

    Not for hundreds of thousands of classes where an approximation or a hierarchy would serve: this layer is what
    those are measured against.

    Args:
        in_features: d, the width of `hidden`.
        num_classes: V.
        bias: whether there is a bias for each class.
        logit_map: an increasing function of one logit; `topk` is taken on the raw logits, where a map that
            saturates cannot tie them.
        label_smoothing: as in `F.cross_entropy`; of the loss only.
        z_loss: adds `z_loss * lse ** 2`, which keeps the normaliser near 1; of the loss only.
        class_weights: `(V,)`, as `weight` in `F.cross_entropy`; of the loss only. A buffer in the state dict,
            which keeps its own precision (float32 at least) when the layer is cast.
        weight: an `nn.Parameter (V, d)` to use instead of a new one, such as that of an `nn.Embedding`: tied.
        reduction: "mean", "sum" or "none".
        ignore_index: the target that marks a row as absent.

    A state dict of `nn.Linear` loads as it is, and leaves `class_weights` as they are. Weights are initialised as
    `nn.Linear` does.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind.

    >>> import torch, lastlayer
    >>> embedding = torch.nn.Embedding(1000, 16)
    >>> layer = lastlayer.FullSoftmax(16, 1000, bias=False, weight=embedding.weight)
    >>> hidden, targets = torch.randn(2, 5, 16), torch.randint(1000, (2, 5))
    >>> layer(hidden, targets).backward()
    >>> embedding.weight.grad.shape
    torch.Size([1000, 16])
    >>> layer.topk(hidden, 3).indices.shape
    torch.Size([2, 5, 3])
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
        logit_map: LogitMap | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        class_weights: Tensor | None = None,
        weight: nn.Parameter | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, reduction=reduction, ignore_index=ignore_index)
        self.label_smoothing = check_fraction("label_smoothing", label_smoothing)
        self.z_loss = check_not_negative("z_loss", z_loss)
        self.weight = tied_or_new(weight, (self.num_classes, self.in_features), device, dtype)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(self.weight.new_empty(self.num_classes))
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)
        self.logit_map = map_beside(logit_map, self.weight)
        if class_weights is not None:
            check_vector("class_weights", class_weights, self.num_classes)
            class_weights = as_exact(class_weights.detach())
        self.register_buffer("class_weights", class_weights)
        self._keep_class_weights(class_weights)

    def linear_head(self) -> tuple[Tensor, Tensor | None, nn.Module | None]:
        """`(weight, bias, logit_map)`: the parameters themselves."""
        return self.weight, self.bias, self.logit_map

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FullSoftmax":
        """A cast of the layer is none of the class weights, and a move through "meta" does not lose them."""
        kept = self.class_weights
        super()._apply(fn, recurse)
        self._keep_class_weights(kept)
        return self

    def _keep_class_weights(self, kept: Tensor | None) -> None:
        """Has `kept` beside the weight; where that is on "meta", the values stay where they are."""
        self.class_weights = kept if kept is None or self.weight.is_meta else kept.to(self.weight.device)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`nn.Linear` has no class weights: this layer keeps its own."""
        if self.class_weights is not None:
            state_dict = {f"{prefix}class_weights": self.class_weights, **state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden,
            self.weight,
            targets,
            bias=self.bias,
            logit_map=self.logit_map,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            class_weights=self.class_weights,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def _log_prob(self, hidden: Tensor) -> Tensor:
        return linear_log_prob(hidden, self.weight, self.bias, self.logit_map)

    def _target_log_prob(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(
            hidden, self.weight, targets, bias=self.bias, logit_map=self.logit_map, reduction="none"
        )

    def _topk(self, hidden: Tensor, k: int, selection: Selection | None) -> tuple[Tensor, Tensor]:
        answer = linear_statistics(
            hidden, self.weight, bias=self.bias, logit_map=self.logit_map, k=k, selection=selection
        )
        assert answer.topk is not None  # k was given
        return answer.topk

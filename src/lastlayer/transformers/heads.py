"""The heads that logits come from, a matrix or an output layer, and what a model does to their logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.reduce import reduce_loss
from lastlayer.layers.base import OutputLayer
from lastlayer.layers.soft_cap import SoftCap
from lastlayer.transformers.after_head import after_head


class LogitTransform(NamedTuple):
    """`scale * (x + shift)` of a head's logits x, or `cap * tanh(scale * (x + shift))`."""

    scale: float = 1.0
    cap: float | None = None
    shift: Tensor | None = None  # (V,)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.shift is not None:
            logits = logits + self.shift
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * logits.tanh()

    def is_identity(self) -> bool:
        """Whether it leaves every logit as it is; reads the values of `shift`."""
        return self.scale == 1 and self.cap is None and (self.shift is None or not bool(self.shift.any()))


class LinearHead(NamedTuple):
    """The head of `nn.Linear`."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)

    own_loss = None  # whose loss trains it, where that is not the cross-entropy of the logits

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:  # (..., d) to (..., V)
        return F.linear(hidden, self.weight, self.bias)

    def loss(self, hidden: Tensor, targets: Tensor, transform: LogitTransform, **options: Any) -> Tensor:
        """`F.cross_entropy(transform(logits(hidden)), targets, **options)`, for hidden states (N, d) or (d,).

        The factor goes to the hidden states, which are few, and a number for each class to the bias.
        """
        scale, cap, shift = transform
        factor = scale if cap is None else scale * cap  # cap * tanh(factor * x / cap)
        bias = self.bias if shift is None else shift if self.bias is None else self.bias + shift
        if abs(factor - 1) > 1e-12:  # not the rounding of (1 / cap) * cap
            hidden, bias = hidden * factor, None if bias is None else bias * factor
        logit_map = None if cap is None else SoftCap(cap)
        class_weights = options.pop("weight")
        return linear_cross_entropy(
            hidden, self.weight, targets, bias=bias, logit_map=logit_map, class_weights=class_weights, **options
        )


class LayerHead(NamedTuple):
    """The head that an output layer is: its logits are those of its matrix, or its log-probabilities."""

    layer: OutputLayer

    @property
    def num_classes(self) -> int:
        return self.layer.num_classes

    @property
    def own_loss(self) -> str | None:
        return type(self.layer).__name__ if self.layer.training else None

    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.layer.parameters())

    def logits(self, hidden: Tensor) -> Tensor:
        try:
            weight, bias, logit_map = self.layer.linear_head()
        except TypeError:  # a layer that is more than one matrix
            return self.layer.log_prob(hidden).to(hidden.dtype)
        logits = F.linear(hidden, weight, bias)
        return logits if logit_map is None else logit_map(logits)

    def loss(self, hidden: Tensor, targets: Tensor, transform: LogitTransform, **options: Any) -> Tensor:
        """The layer's loss; in `eval()` the exact cross-entropy of its model."""
        layer, name = self.layer, type(self.layer).__name__
        if options["weight"] is not None or options["label_smoothing"]:
            raise ValueError(f"the loss must have no class weights and no label smoothing but those of the {name}")
        if not transform.is_identity():
            raise ValueError(
                f"the model must use the logits of its head as they are, for a {name} to be its head; this one "
                f"applies {transform}"
            )
        reduction, ignore_index = options["reduction"], options["ignore_index"]
        with _settings_of(layer, reduction, ignore_index):
            if layer.training:
                return layer(hidden, targets)
            losses = -layer.target_log_prob(hidden, targets)
        return reduce_loss(losses, targets != ignore_index, reduction)


@contextmanager
def _settings_of(layer: OutputLayer, reduction: str, ignore_index: int) -> Iterator[None]:
    """The layer with the reduction and the ignored target of the model's own loss."""
    before = layer.reduction, layer.ignore_index
    layer.reduction, layer.ignore_index = reduction, ignore_index
    try:
        yield
    finally:
        layer.reduction, layer.ignore_index = before


def check_layer(model: Any, own: nn.Linear, layer: Any) -> None:
    """An error unless `layer` can be the head of the model."""
    if not isinstance(layer, OutputLayer):
        raise TypeError(f"layer must be an OutputLayer, such as SampledSoftmax; got {type(layer).__name__}")
    for name, wanted in (("in_features", own.in_features), ("num_classes", own.out_features)):
        if getattr(layer, name) != wanted:
            raise ValueError(f"layer must have the model's {name}={wanted}, got {getattr(layer, name)}")
    device = next(layer.parameters()).device
    if device != own.weight.device:
        raise ValueError(f"layer must be on the model's device {own.weight.device}, got {device}")
    try:
        found = after_head(model)
    except TypeError:  # not a model of token ids alone: checked at every loss
        return
    if found is not None:
        does = found if isinstance(found, str) else f"applies {found} to its head's logits"
        raise ValueError(
            f"layer must be None here: {type(model).__name__} {does}, which the loss of a {type(layer).__name__} "
            "does not contain"
        )

"""The module that replaces a model's head under `chunked_loss`: logits are deferred where a loss may follow."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.layers.base import OutputLayer
from lastlayer.transformers.deferred_logits import defer
from lastlayer.transformers.layer_head import LayerHead
from lastlayer.transformers.recorded_logits import LinearHead
from lastlayer.transformers.traced_loss import ModelLoss, warn_of_logits


class DeferringHead(nn.Module):
    """A model's head on its own parameters, or an output layer, with `DeferredLogits` in training or with labels.

    Its state dict has the names of an `nn.Linear` head, for a layer too that has no other parameters than that.
    """

    def __init__(self, model: Any, own: nn.Linear, layer: OutputLayer | None) -> None:
        super().__init__()
        self.in_features, self.out_features = own.in_features, own.out_features
        self.weight, self.bias = own.weight, own.bias
        self.layer = layer
        if layer is not None:
            own_parameters = [p for p in (own.weight, own.bias) if p is not None]
            if {id(p) for p in layer.parameters()} == {id(p) for p in own_parameters}:
                self.register_state_dict_post_hook(_without_layer)
                self.register_load_state_dict_pre_hook(_with_layer)
            else:
                del self.weight, self.bias
                self.register_parameter("bias", None)  # some models read it
        self.place = _labels_place(model)
        self.name, self.loss = type(model).__name__, ModelLoss.of(model)
        self.labelled = False  # whether the model was called with labels
        torch.compiler.assume_constant_result(warn_of_logits)  # which would break a graph

    def forward(self, hidden: Tensor) -> Tensor:
        head = LinearHead(self.weight, self.bias) if self.layer is None else LayerHead(self.layer)
        if not (self.labelled or (self.training and torch.is_grad_enabled())):
            return head.logits(hidden)
        if not torch.compiler.is_compiling() or self.loss.is_traced():
            return defer(head, hidden)
        if self.layer is not None:
            raise RuntimeError(
                f"torch.compile of {self.name} would train its head as a full softmax, not as the "
                f"{type(self.layer).__name__} that it is: do not compile it, or use layer=None"
            )
        warn_of_logits(self.name)
        return head.logits(hidden)

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes whether the model is called with labels."""
        labels = kwargs.get("labels")
        if labels is None and self.place is not None and len(args) > self.place:
            labels = args[self.place]
        self.labelled = labels is not None

    def after_model(self, *_: Any) -> None:
        """The model's own call has ended."""
        self.labelled = False

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _without_layer(head: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}layer.")]:
        del state[name]


def _with_layer(head: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The layer's own values, where the weight is not: it is loaded by the head."""
    assert isinstance(head.layer, nn.Module)
    for name, tensor in head.layer.state_dict(keep_vars=True).items():
        state.setdefault(f"{prefix}layer.{name}", tensor)


def _labels_place(model: Any) -> int | None:
    """Where `labels` stands among the arguments of the model's `forward`."""
    names = list(inspect.signature(model.forward).parameters)
    return names.index("labels") if "labels" in names else None

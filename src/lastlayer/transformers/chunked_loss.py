"""chunked_loss: a Transformers model trains without its logits, by its own code."""

import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.functional.checks import check_count
from lastlayer.layers.base import OutputLayer
from lastlayer.transformers.deferred_logits import defer
from lastlayer.transformers.heads import LayerHead, LinearHead, check_layer
from lastlayer.transformers.replaced_head import ReplacedHead, own_head, put_head, refuse_what_needs_own_head

OLDEST = (4, 57)  # of Transformers
SUCH_AS = "such as model.model.compile() or model.encoder.compile()"


def chunked_loss(model: Any, layer: OutputLayer | None = None) -> ReplacedHead:
    """Trains a Transformers model by its own code, but without the `(N, V)` logits of its head.

    In training, and wherever the model is called with labels, its head returns `DeferredLogits`: the model scales,
    caps and shifts them as before, and the `F.cross_entropy` that it ends in is `functional.linear_cross_entropy`.
    Loss and gradients equal the model's own, to rounding, whatever it does on the way: what cannot be recorded
    computes the real logits. In `eval()` without labels, as in `generate`, they are ordinary logits.

    For any causal or encoder-decoder model whose head is an `nn.Linear`, tied or not, with or without a bias,
    under gradient checkpointing, autocast and gradient accumulation (`num_items_in_batch`). The head's parameters
    stay the very same, also in the state dict; the gradient of a frozen head is not formed.

    `torch.compile` keeps one graph without the logits where the model has labels and comes to its loss by its
    `loss_function`. Others (T5, Marian, BART, Whisper, BERT) compute their logits when they are compiled, with one
    warning: compile the modules before their head instead, `model.encoder.compile()`. RecurrentGemma raises then.

    Args:
        model: called with `labels` as ever.
        layer: an output layer that is trained as the head instead: `SampledSoftmax`, `HierarchicalSoftmax`. The
            hidden states meet the labels as the model shifts them; in `eval()` the loss is the layer's exact
            cross-entropy, and its logits are those of its matrix or its log-probabilities. It goes on from the
            model's own head where it has its parameters: `weight=model.get_output_embeddings().weight,
            bias=False`; only then is it saved by `save_pretrained`. Otherwise keep `layer.state_dict()`.

    Returns:
        a handle with `undo()`, also a context manager.

    Raises:
        TypeError: a model without a head, with several, or with one that is more than `nn.Linear`, as PEFT and
            quantisation put one there; a layer that is no `OutputLayer`. The model is unchanged.
        ValueError: a layer of other sizes, or under a model that caps, scales or shifts its logits.
        ImportError: a Transformers older than 4.57.

    Labels that are no classes raise IndexError when the model is called.

    Cost of a step: three matrix products of `2 N V d` operations, as before; memory beyond the parameters and
    their gradients: one chunk of logits. When NOT to use it: where a loss needs all logits anyway
    (`label_smoothing_factor` of `TrainingArguments`, distillation by logits), it saves nothing.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from lastlayer.transformers import chunked_loss
    >>> sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model, ids = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)), torch.randint(99, (2, 5))
    >>> expected = model(ids, labels=ids).loss
    >>> with chunked_loss(model):
    ...     loss = model(ids, labels=ids).loss
    ...     loss.backward()
    >>> torch.allclose(loss, expected)
    True
    """
    _check_version()
    own = linear_head(model)
    if layer is not None:
        check_layer(model, own, layer)
    head = DeferringHead(model, own, layer)
    handle = put_head(model, head)
    refuse_what_needs_own_head(handle)
    handle.with_undo(_settle_loss_type(model))
    handle.with_undo(model.register_forward_pre_hook(head.before_model, with_kwargs=True).remove)
    handle.with_undo(model.register_forward_hook(head.after_model, always_call=True).remove)
    return handle


def linear_head(model: Any) -> nn.Linear:
    """The model's head, or a TypeError unless it is a plain `nn.Linear`."""
    head = own_head(model)
    name, kind = type(model).__name__, f"{type(head).__module__}.{type(head).__qualname__}"
    if isinstance(head, (nn.ModuleList, nn.ModuleDict)):
        raise TypeError(f"model must have one output head, and {name} has {len(head)}")
    plain = type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    floating = type(head.weight) is nn.Parameter and head.weight.is_floating_point() if plain else False
    if not isinstance(head, nn.Linear) or not floating:
        raise TypeError(
            f"the head of {name} must be an nn.Linear with a floating-point weight and nothing around it, got "
            f"{kind}: undo what was put there (another replacement, PEFT, quantisation, a hook), or do that to "
            "other modules only"
        )
    return head


def _check_version() -> None:
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:  # a model of another library with the same methods
        return
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"chunked_loss needs transformers>={oldest}, got {installed}: upgrade it")


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
        names = list(inspect.signature(model.forward).parameters)
        self.labels_place = names.index("labels") if "labels" in names else None
        self.name, self.loss_is_traced = type(model).__name__, _uses_loss_function(model)
        self.labelled = False  # whether the model was called with labels
        self.used: list[str] | None = None  # in a compiled graph: what was computed of the deferred logits
        torch.compiler.assume_constant_result(_warn_of_logits)  # which would break a graph

    def forward(self, hidden: Tensor) -> Tensor:
        head = LinearHead(self.weight, self.bias) if self.layer is None else LayerHead(self.layer)
        if not (self.labelled or (self.training and torch.is_grad_enabled())):
            return head.logits(hidden)
        if not torch.compiler.is_compiling():
            return defer(head, hidden)
        if self.labelled and self.loss_is_traced:
            self.used = []
            return defer(head, hidden, self.used)
        if self.layer is not None:
            raise RuntimeError(
                f"torch.compile of {self.name} would train its head as a full softmax, not as the "
                f"{type(self.layer).__name__} that it is: compile the modules before the head, or use layer=None"
            )
        _warn_of_logits(self.name)
        return head.logits(hidden)

    def before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes whether the model is called with labels."""
        labels, place = kwargs.get("labels"), self.labels_place
        if labels is None and place is not None and len(args) > place:
            labels = args[place]
        self.labelled = labels is not None

    def after_model(self, *_: Any) -> None:
        """The model's own call has ended."""
        self.labelled = False
        used, self.used = self.used, None
        if used is not None and not used:  # some operation was compiled on the placeholder of the logits
            raise RuntimeError(
                f"torch.compile does not see what {self.name} does to its logits under chunked_loss, nor that "
                f"they are deferred: compile the modules before the head instead, {SUCH_AS}"
            )

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


def _without_peft(model: Any) -> Any:
    """The model that PEFT has wrapped: its code makes the loss."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _uses_loss_function(model: Any) -> bool:
    """Whether the code of the model's `forward` names its `loss_function`, and no `CrossEntropyLoss`.

    `torch.compile` traces the one down to `F.cross_entropy`, which deferred logits replace. An
    `nn.CrossEntropyLoss()` that is made inside a graph it computes without that, on the placeholder of the logits.
    """
    code = getattr(inspect.unwrap(type(_without_peft(model)).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names and "CrossEntropyLoss" not in code.co_names


def _settle_loss_type(model: Any) -> Callable[[], None]:
    """Gives a model of no `loss_type` the one that its `loss_function` takes then; returns the undoing.

    Transformers warns of that in every call (for GPT-2, and all whose class has no `For...` in its name), and a
    warning breaks a compiled graph, so that the logits would be computed.
    """
    model = _without_peft(model)
    if getattr(model, "loss_type", "") is not None:
        return lambda: None
    model.loss_type = "ForCausalLM"
    return lambda: setattr(model, "loss_type", None)


def _warn_of_logits(name: str) -> None:
    """A warning while the compiler traces; no part of the graph, where `DeferringHead` has marked it so."""
    warnings.warn(
        f"torch.compile computes the logits of {name} under chunked_loss, and saves no memory: it cannot see that "
        "they are deferred without labels, or where the model's loss is not its loss_function; compile the "
        f"modules before the head instead, {SUCH_AS}",
        stacklevel=2,
    )


def top_predictions(k: int = 1) -> Callable[[Any, Any], Tensor]:
    """A `preprocess_logits_for_metrics` for `Trainer`: of the logits `(N, T, V)` it keeps the `k` best class ids.

    Under `chunked_loss` they are computed over chunks of rows, and never all logits at once. `compute_metrics`
    gets `predictions (N, T, k)`, best first, whose `[..., 0]` is `argmax(-1)`. Without a
    `preprocess_logits_for_metrics` `Trainer` gathers all logits of the data set.

    Args:
        k: from 1 to the number of classes.

    Cost: one product of `2 N T V d` operations; memory one chunk of logits.

    >>> import torch
    >>> keep = top_predictions(2)
    >>> keep(torch.tensor([[[0.1, 0.9, 0.5]]]), None)
    tensor([[[1, 2]]])
    """
    check_count("k", k, 1)

    def preprocess_logits_for_metrics(logits: Any, labels: Any) -> Tensor:
        if isinstance(logits, (tuple, list)):  # other outputs follow, as of encoder-decoder models
            logits = logits[0]
        return logits.topk(k).indices

    return preprocess_logits_for_metrics

"""chunked_loss: a Transformers model trains without its logits, by its own code."""

import importlib.metadata
import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer.transformers.deferred_logits import defer
from lastlayer.transformers.recorded_logits import LinearHead
from lastlayer.transformers.replaced_head import ReplacedHead, own_head, put_head, refuse_what_needs_own_head

OLDEST = (4, 57)  # of Transformers


def chunked_loss(model: Any) -> ReplacedHead:
    """Trains a Transformers model by its own code, but without the `(N, V)` logits of its head.

    In training, and wherever the model is called with labels, its head returns `DeferredLogits`: the model scales,
    caps and shifts them as before, and the `F.cross_entropy` that it ends in is `functional.linear_cross_entropy`.
    Loss and gradients equal the model's own, to rounding, whatever it does on the way: what cannot be recorded
    computes the real logits. In `eval()` without labels, as in `generate`, they are ordinary logits.

    For any causal or encoder-decoder model whose head is an `nn.Linear`, tied or not, with or without a bias,
    under gradient checkpointing, autocast and gradient accumulation (`num_items_in_batch`). The head's parameters
    stay the very same, also in the state dict; the gradient of a frozen head is not formed. `torch.compile` keeps
    one graph; in models that do not call their `loss_function` (T5, Marian, BART, Whisper) it computes the logits.

    Returns:
        a handle with `undo()`, also a context manager.

    Raises:
        TypeError: a model without a head, with several, or with one that is more than `nn.Linear`, as PEFT and
            quantisation put one there; the model is unchanged.
        ImportError: a Transformers older than 4.57.

    Labels that are no classes raise IndexError when the model is called.

    Cost of a step: three matrix products of `2 N V d` operations, as before; memory beyond the parameters and
    their gradients: one chunk of logits. When NOT to use it: where a loss needs all logits anyway
    (`label_smoothing_factor` of `TrainingArguments`, distillation by logits), it saves nothing.

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
    head = DeferringHead(model, linear_head(model))
    handle = put_head(model, head)
    refuse_what_needs_own_head(handle)
    handle.with_undo(model.register_forward_pre_hook(head.before_model, with_kwargs=True).remove)
    handle.with_undo(model.register_forward_hook(head.after_model, always_call=True).remove)
    return handle


class DeferringHead(nn.Module):
    """A model's `nn.Linear` head, on the same parameters, whose logits are deferred where a loss may follow."""

    def __init__(self, model: Any, own: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = own.in_features, own.out_features
        self.weight, self.bias = own.weight, own.bias
        self.place = _labels_place(model)
        self.compilable = _calls_loss_function(model)
        self.labelled = False  # whether the model was called with labels

    def forward(self, hidden: Tensor) -> Tensor:
        expected = self.labelled or (self.training and torch.is_grad_enabled())
        if expected and (self.compilable or not torch.compiler.is_compiling()):
            return defer(LinearHead(self.weight, self.bias), hidden)
        return F.linear(hidden, self.weight, self.bias)

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
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def linear_head(model: Any) -> nn.Linear:
    """The model's head, or a TypeError unless it is a plain `nn.Linear`."""
    head = own_head(model)
    name, kind = type(model).__name__, type(head).__name__
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


def _labels_place(model: Any) -> int | None:
    """Where `labels` stands among the arguments of the model's `forward`."""
    names = list(inspect.signature(model.forward).parameters)
    return names.index("labels") if "labels" in names else None


def _calls_loss_function(model: Any) -> bool:
    """Whether the model's loss comes from its `loss_function`, which calls `F.cross_entropy`.

    `torch.compile` has a rule of its own for the module `nn.CrossEntropyLoss`, which does not see that the logits
    are deferred (it would compute on their placeholder, which is NaN): models that use it get real ones.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def _check_version() -> None:
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:  # a model of another library with the same methods
        return
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"chunked_loss needs transformers>={oldest}, got {installed}: upgrade it")

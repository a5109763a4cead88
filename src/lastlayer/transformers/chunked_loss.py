"""chunked_loss: a Transformers model trains without its logits, by its own code."""

import importlib.metadata
import re
from typing import Any

from torch import nn

from lastlayer.layers.base import OutputLayer
from lastlayer.transformers.deferring_head import DeferringHead
from lastlayer.transformers.layer_head import check_layer
from lastlayer.transformers.replaced_head import ReplacedHead, own_head, put_head, refuse_what_needs_own_head
from lastlayer.transformers.traced_loss import settle_loss_type

OLDEST = (4, 57)  # of Transformers


def chunked_loss(model: Any, layer: OutputLayer | None = None) -> ReplacedHead:
    """Trains a Transformers model by its own code, but without the `(N, V)` logits of its head.

    In training, and wherever the model is called with labels, its head returns `DeferredLogits`: the model scales,
    caps and shifts them as before, and the `F.cross_entropy` that it ends in is `functional.linear_cross_entropy`.
    Loss and gradients equal the model's own, to rounding, whatever it does on the way: what cannot be recorded
    computes the real logits. In `eval()` without labels, as in `generate`, they are ordinary logits.

    For any causal or encoder-decoder model whose head is an `nn.Linear`, tied or not, with or without a bias,
    under gradient checkpointing, autocast and gradient accumulation (`num_items_in_batch`). The head's parameters
    stay the very same, also in the state dict; the gradient of a frozen head is not formed. `torch.compile` keeps
    one graph; for that the name `CrossEntropyLoss` in the file of a model that uses it (T5, Marian, BART, Whisper)
    is a subclass until `undo()`. Where it cannot see the loss, it computes the logits, and warns once.

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
    handle.with_undo(head.loss.trace())
    handle.with_undo(settle_loss_type(model))
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

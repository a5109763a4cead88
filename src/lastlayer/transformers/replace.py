"""replace_lm_head: a model's own `generate` on another output layer, and back."""

from typing import Any

from torch import nn

from lastlayer.layers.base import OutputLayer
from lastlayer.screening.mixture_screen import ScreenedMixture
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.transformers.after_head import after_head
from lastlayer.transformers.replaced_head import ReplacedHead, own_head, put_head, refuse_what_needs_own_head


def replace_lm_head(model: Any, head: nn.Module) -> ReplacedHead:
    """Makes a Transformers model compute its logits by `head`; all of its own code runs as before.

    Only the module is swapped, so `generate` (greedy, sampling, beam search), caches and devices are the model's
    own, for decoder-only and encoder-decoder models alike. Embeddings tied to the head stay as they were.

    Args:
        model: any model with `get_output_embeddings` and `set_output_embeddings`.
        head: called with hidden states `(..., d)`, gives logits `(..., V)`: a `ScreenedSoftmax`, an `nn.Linear`.

    Returns:
        a handle with `undo()`, also a context manager.

    Raises:
        TypeError: a model without an output head to replace, a head that is no module, or an `OutputLayer`, which
            takes targets.
        ValueError: a head whose `in_features` or `out_features` are not the model's; one with a `logit_map`, under
            a model that caps or scales logits itself (Gemma 2, Cohere: it would be done twice); a screen under a
            model that adds to each class's logit (Marian), whose best classes then are not the screen's.

    A model that caps or scales its head's logits goes on doing so: `ScreenedSoftmax.from_linear` of its own head,
    which has no map, gives the model's logits. For its loss without logits see `output_layer`.

    Cost: none; for a screen or a head with a map two forward passes of one token, as `logit_map_of`. When NOT to
    use it: in training; a screen is for a weight that stays.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from lastlayer import Int8Preview, ScreenedSoftmax
    >>> from lastlayer.transformers import replace_lm_head
    >>> config = GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2, eos_token_id=None)
    >>> model = GPT2LMHeadModel(config).eval()
    >>> head = ScreenedSoftmax.from_linear(model.lm_head, preview=Int8Preview(), candidates=32, exact=True)
    >>> with replace_lm_head(model, head):
    ...     ids = model.generate(max_new_tokens=4, do_sample=False, bos_token_id=0, pad_token_id=0)
    """
    original = own_head(model)
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be a torch.nn.Module, got {type(head).__name__}")
    if isinstance(head, OutputLayer):
        raise TypeError(
            f"head must give logits of hidden states alone, and {type(head).__name__} takes targets: give "
            "ScreenedSoftmax.from_layer(layer, ...) of it"
        )
    for name in ("in_features", "out_features"):
        wanted, given = getattr(original, name, None), getattr(head, name, None)
        if wanted is not None and given is not None and wanted != given:
            raise ValueError(f"head must have the model's {name}={wanted}, got {given}")
    _check_agreement(model, head)
    handle = put_head(model, head)
    refuse_what_needs_own_head(handle)
    return handle


def _check_agreement(model: Any, head: nn.Module) -> None:
    """An error where what the model does to its head's logits does not go with what the head gives."""
    mapped = getattr(head, "logit_map", None) is not None or isinstance(head, ScreenedMixture)
    if not mapped and not isinstance(head, ScreenedSoftmax):
        return
    name, kind = type(model).__name__, type(head).__name__
    try:
        found = after_head(model)
    except TypeError:
        if mapped:
            raise
        return  # what the model does to plain logits, it goes on doing
    if isinstance(found, str):
        raise ValueError(
            f"head must not be a {kind} here: {name} {found}, so that its best classes are not the head's"
        )
    if mapped and found is not None:
        what = "log-probabilities" if isinstance(head, ScreenedMixture) else f"logits after {head.logit_map}"
        raise ValueError(
            f"head must give plain logits, as {name} applies {found} to them itself; this {kind} gives {what}: "
            "make it with logit_map=None"
        )

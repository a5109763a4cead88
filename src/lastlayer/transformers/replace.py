"""replace_lm_head: a model's own `generate` on another output layer, and back."""

from types import TracebackType
from typing import Any, Self

from torch import nn

from lastlayer.layers.base import OutputLayer


class ReplacedHead:
    """What `replace_lm_head` did to a model; `undo()`, or leaving its `with` block, restores it."""

    def __init__(self, model: Any, original: nn.Module, head: nn.Module) -> None:
        self.model = model
        self.original = original
        self.head = head
        self._undone = False

    def undo(self) -> None:
        """Puts the model's own head back, the very module; a second call does nothing.

        Raises RuntimeError where another head was put in the place of this one and is still there.
        """
        if self._undone:
            return
        if self.model.get_output_embeddings() is not self.head:
            raise RuntimeError(
                "another head stands where this one was put: undo the later replacement first, then this one"
            )
        self.model.set_output_embeddings(self.original)
        self._undone = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


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
        ValueError: a head whose `in_features` or `out_features` are not the model's.

    Cost: none. When NOT to use it: in training; a screen is for a weight that stays.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from lastlayer import Int8Preview, ScreenedSoftmax
    >>> from lastlayer.transformers import replace_lm_head
    >>> config = GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2, eos_token_id=None)
    >>> model = GPT2LMHeadModel(config).eval()
    >>> head = ScreenedSoftmax.from_linear(model.lm_head, preview=Int8Preview(), candidates=32, exact=True)
    >>> with replace_lm_head(model, head):
    ...     ids = model.generate(max_new_tokens=4, do_sample=False, bos_token_id=0, pad_token_id=0)
    """
    original = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(original, nn.Module) or not hasattr(model, "set_output_embeddings"):
        raise TypeError(f"model must have an output head to replace, which {type(model).__name__} does not")
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
    try:
        model.set_output_embeddings(head)
    except BaseException:  # some models take what else they need of a head, and it may lack that
        model.set_output_embeddings(original)
        raise
    return ReplacedHead(model, original, head)

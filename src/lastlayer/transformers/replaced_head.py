"""A head that replaces a model's own, and how to restore the original."""

from types import TracebackType
from typing import Any, Self

from torch import nn


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


def put_head(model: Any, head: nn.Module) -> ReplacedHead:
    """Puts `head` where the model's own stands; where the model does not take it, all is as it was."""
    original = own_head(model)
    try:
        model.set_output_embeddings(head)
    except BaseException:  # some models take what else they need of a head, and it may lack that
        model.set_output_embeddings(original)
        raise
    return ReplacedHead(model, original, head)


def own_head(model: Any) -> nn.Module:
    """The model's output head, or a TypeError where it has none that can be replaced."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module) or not hasattr(model, "set_output_embeddings"):
        raise TypeError(f"model must have an output head to replace, which {type(model).__name__} does not")
    return head

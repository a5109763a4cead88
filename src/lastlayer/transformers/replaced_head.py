"""A head that replaces a model's own, and how to restore the original."""

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Self

from torch import nn

REFUSED = {
    "resize_token_embeddings": "it would resize the model's embeddings, and not the head that replaces its own",
    "post_init": "it would initialise the weights of the head anew",
}


class ReplacedHead:
    """What `replace_lm_head` or `chunked_loss` did to a model; `undo()`, or leaving its `with` block, restores it.

    Until then `resize_token_embeddings` and `post_init` of the model raise RuntimeError, and so does
    `save_pretrained` where the files would not hold the head: one whose state is not that of the model's own.
    """

    def __init__(self, model: Any, original: nn.Module, head: nn.Module) -> None:
        self.model = model
        self.original = original
        self.head = head
        self._undone = False
        self._with_undo: list[Callable[[], object]] = []

    def with_undo(self, call: Callable[[], object]) -> None:
        """Has `call` done when the head is restored."""
        self._with_undo.append(call)

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
        for call in reversed(self._with_undo):
            call()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


@dataclass(frozen=True)
class _Refused:
    """Stands where a method of a model stood. It holds no model, so that copies of one have no other's."""

    name: str
    why: str

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"{self.name}() cannot be called while the model's head is replaced: {self.why}; undo() first"
        )


def put_head(model: Any, head: nn.Module) -> ReplacedHead:
    """Puts `head` where the model's own stands; where the model does not take it, all is as it was."""
    original = own_head(model)
    try:
        model.set_output_embeddings(head)
    except BaseException:  # some models take what else they need of a head, and it may lack that
        model.set_output_embeddings(original)
        raise
    return ReplacedHead(model, original, head)


def refuse_what_needs_own_head(handle: ReplacedHead) -> None:
    """Until `undo()`, an error from the methods of the model that would do something else than before."""
    model, refused = handle.model, dict(REFUSED)
    if not _saved_as_own(model, handle.original, handle.head):
        kind = type(handle.head).__name__
        refused["save_pretrained"] = f"from_pretrained() would not find the parameters of a {kind} as head"
    for name, why in refused.items():
        before = vars(model).get(name)
        setattr(model, name, _Refused(name, why))
        handle.with_undo(lambda name=name, before=before: _restore(model, name, before))


def _restore(model: Any, name: str, before: Any) -> None:
    delattr(model, name)
    if before is not None:
        setattr(model, name, before)


def _saved_as_own(model: Any, original: nn.Module, head: nn.Module) -> bool:
    """Whether the files of `save_pretrained` load as the model with this head."""
    own, other = original.state_dict(keep_vars=True), head.state_dict(keep_vars=True)
    if own.keys() != other.keys() or any(own[name].shape != other[name].shape for name in own):
        return False
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    tied = any(tensor is embedding for tensor in own.values())  # such a weight is saved once, as the embedding
    return not tied or all(own[name] is other[name] for name in own)


def own_head(model: Any) -> nn.Module:
    """The model's output head, or a TypeError where it has none that can be replaced."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module) or not hasattr(model, "set_output_embeddings"):
        raise TypeError(f"model must have an output head to replace, which {type(model).__name__} does not")
    return head

"""What lets `torch.compile` see that the loss of a model is one of deferred logits."""

import dis
import inspect
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

NAME = "CrossEntropyLoss"
_users: dict[str, int] = {}  # handles that need the subclass below in a module, by the module's name


class TracedCrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss`, without the rule that the compiler has for that very class.

    By the rule it computes on the placeholder of deferred logits, which is NaN. A subclass is traced as it is
    written, down to the `F.cross_entropy` that deferred logits replace.
    """


class ModelLoss(NamedTuple):
    """How a model's `forward` comes to its loss."""

    by_function: bool  # by its `loss_function`
    module: str | None  # by the name `CrossEntropyLoss` of this module

    @classmethod
    def of(cls, model: Any) -> "ModelLoss":
        """Found by reading the code of `forward`: other ways, as `nn.CrossEntropyLoss()`, are neither."""
        forward = inspect.unwrap(type(_without_peft(model)).forward)
        code = getattr(forward, "__code__", None)
        if code is None:
            return cls(False, None)
        uses = {part.opname for part in dis.get_instructions(code) if part.argval == NAME}
        if not uses:
            return cls("loss_function" in code.co_names, None)
        found = getattr(sys.modules.get(forward.__module__), NAME, None)
        named = uses == {"LOAD_GLOBAL"} and found in (nn.CrossEntropyLoss, TracedCrossEntropyLoss)
        return cls(False, forward.__module__ if named else None)

    def is_traced(self) -> bool:
        """Whether a compiled model keeps its logits deferred up to this loss."""
        return self.by_function or (self.module is not None and _users.get(self.module, 0) > 0)

    def trace(self) -> Callable[[], None]:
        """Puts the subclass in place of `CrossEntropyLoss` in the model's module; returns what restores it."""
        if self.module is None:
            return lambda: None
        module = sys.modules[self.module]
        _users[self.module] = _users.get(self.module, 0) + 1
        setattr(module, NAME, TracedCrossEntropyLoss)
        return self._restore

    def _restore(self) -> None:
        assert self.module is not None
        _users[self.module] -= 1
        if not _users[self.module]:
            setattr(sys.modules[self.module], NAME, nn.CrossEntropyLoss)


def settle_loss_type(model: Any) -> Callable[[], None]:
    """Gives a model without a known `loss_type` the one that its `loss_function` takes then; returns the undoing.

    Transformers warns of that in every call (for GPT-2, and all whose class has no `For...` in its name), and a
    warning breaks a compiled graph, so that the logits would be computed.
    """
    model = _without_peft(model)
    if not hasattr(model, "loss_type"):  # a model of another library
        return lambda: None
    from transformers.loss.loss_utils import LOSS_MAPPING

    before = model.loss_type
    if before in LOSS_MAPPING:
        return lambda: None
    model.loss_type = "ForCausalLM"
    return lambda: setattr(model, "loss_type", before)


def _without_peft(model: Any) -> Any:
    """The model that PEFT has wrapped: its code makes the loss."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def warn_of_logits(name: str) -> None:
    """A warning while the compiler traces; no part of the graph, where `DeferringHead` has marked it so."""
    warnings.warn(
        f"torch.compile computes the logits of {name} under chunked_loss, and saves no memory: how its forward "
        "comes to its loss hides from the compiler that they are deferred; do not compile it, or compile its "
        "inner modules only",
        stacklevel=2,
    )

"""What logits are computed from: a head, its hidden states, and what a model does to the head's logits since."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.functional.changes import count_of_changes
from lastlayer.functional.linear_cross_entropy import linear_cross_entropy
from lastlayer.functional.precision import autocast_is_on, product_dtype
from lastlayer.layers.soft_cap import SoftCap


class Step(NamedTuple):
    """One elementwise operation on logits."""

    name: str  # "scale", "divide", "tanh", "shift" or "cast"
    operand: Any = None  # a number, a vector (V,), or a dtype

    def __call__(self, logits: Tensor) -> Tensor:
        match self.name:
            case "scale":
                return logits * self.operand
            case "divide":
                return logits / self.operand
            case "shift":
                return logits + self.operand
            case "cast":
                return logits.to(self.operand)
        return torch.tanh(logits)


class LogitTransform(NamedTuple):
    """`scale * (x + shift)` of a head's logits x, or `cap * tanh(scale * (x + shift))`."""

    scale: float = 1.0
    cap: float | None = None
    shift: Tensor | None = None  # (V,)

    def then(self, step: Step, dtype: torch.dtype) -> "LogitTransform | None":
        """With one more step, on logits of `dtype`; None where it is no longer of this form."""
        match step.name:
            case "scale" | "divide":
                factor = step.operand if step.name == "scale" else 1 / step.operand if step.operand else 0.0
                if not 0 < factor < float("inf"):
                    return None
                if self.cap is None:
                    return self._replace(scale=self.scale * factor)
                return self._replace(cap=self.cap * factor)
            case "tanh":
                return self._replace(cap=1.0) if self.cap is None else None
            case "shift" if self.cap is None:
                shift = step.operand / self.scale
                return self._replace(shift=shift if self.shift is None else self.shift + shift)
            case "cast" if torch.promote_types(dtype, step.operand) == step.operand:
                return self
        return None

    def is_identity(self) -> bool:
        """Whether it leaves every logit as it is; reads the values of `shift`."""
        return self.scale == 1 and self.cap is None and (self.shift is None or not bool(self.shift.any()))


class Head(Protocol):
    """What gives logits of hidden states, and a loss without them."""

    @property
    def num_classes(self) -> int:
        """V."""
        ...

    @property
    def own_loss(self) -> str | None:
        """Whose loss trains it, where that is not the cross-entropy of the logits."""
        ...

    def parameters(self) -> tuple[Tensor, ...]:
        """What the logits depend on besides the hidden states."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:  # (..., d) to (..., V)
        """All logits."""
        ...

    def loss(self, hidden: Tensor, targets: Tensor, transform: LogitTransform, **options: Any) -> Tensor:
        """`F.cross_entropy(transform of logits(hidden), targets, **options)`, for hidden states (N, d) or (d,)."""
        ...


class LinearHead(NamedTuple):
    """The head of `nn.Linear`."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)

    @property
    def num_classes(self) -> int:
        return len(self.weight)

    @property
    def own_loss(self) -> str | None:
        return None

    def parameters(self) -> tuple[Tensor, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)

    def loss(self, hidden: Tensor, targets: Tensor, transform: LogitTransform, **options: Any) -> Tensor:
        """The factor goes to the hidden states, which are few, and a number for each class to the bias."""
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


class RecordedLogits(NamedTuple):
    """`steps(head.logits(hidden))`, to be computed as at the time when the head was called."""

    head: Head
    hidden: Tensor  # (..., d)
    steps: tuple[Step, ...]
    dtype: torch.dtype  # of the logits after the steps
    product: torch.dtype  # of the head's product: that of autocast, where it was on
    with_gradient: bool  # whether gradients were recorded
    versions: tuple[int, ...]  # of the head's parameters

    @classmethod
    def of(cls, head: Head, hidden: Tensor) -> "RecordedLogits":
        """Without any steps yet."""
        dtype = product_dtype(hidden)
        return cls(head, hidden, (), dtype, dtype, torch.is_grad_enabled(), _versions(head))

    @property
    def requires_grad(self) -> bool:
        """Whether the logits would."""
        return self.with_gradient and any(t.requires_grad for t in (self.hidden, *self.head.parameters()))

    def then(self, step: Step) -> "RecordedLogits":
        """With one more step."""
        operand, dtype = step.operand, self.dtype
        if step.name == "cast":
            dtype = operand
        elif step.name == "shift":
            dtype = torch.promote_types(dtype, operand.dtype)
        return self._replace(steps=(*self.steps, step), dtype=dtype)

    def detach(self) -> "RecordedLogits":
        """Without gradients."""
        return self._replace(hidden=self.hidden.detach(), with_gradient=False)

    def compute(self) -> Tensor:
        """The logits, with the gradients and under the autocast of the time when the head was called."""
        self._check_versions()
        if self.head.own_loss is not None and self.with_gradient and torch.is_grad_enabled():
            raise RuntimeError(
                f"a loss of these logits would train a full softmax, not the {self.head.own_loss} that is the "
                "model's head: the model, or torch.compile, does not use them by F.cross_entropy alone; read them "
                "under torch.no_grad(), or use layer=None"
            )
        with torch.set_grad_enabled(self.with_gradient), self._precision():
            logits = self.head.logits(self.hidden)
        with torch.set_grad_enabled(self.with_gradient):
            for step in self.steps:
                logits = step(logits)
        return logits

    def cross_entropy(self, targets: Tensor, **options: Any) -> Tensor | None:
        """`F.cross_entropy(logits, targets, **options)` without them; None where the steps are not of its form."""
        transform, dtype = LogitTransform(), self.product
        for step in self.steps:
            transform = None if transform is None else transform.then(step, dtype)
            dtype = RecordedLogits.then(self._replace(dtype=dtype), step).dtype
        if transform is None:
            return None
        self._check_versions()
        half = autocast_is_on(self.hidden.device.type)  # where F.cross_entropy gives float32
        with torch.set_grad_enabled(self.with_gradient and torch.is_grad_enabled()), self._precision():
            loss = self.head.loss(self.hidden, targets, transform, **options)
        return loss.float() if half else loss.to(self.dtype)

    def _precision(self) -> AbstractContextManager[object]:
        if self.product == self.hidden.dtype:
            return nullcontext()
        return torch.autocast(self.hidden.device.type, dtype=self.product)

    def _check_versions(self) -> None:
        if self.versions != _versions(self.head):
            raise RuntimeError(
                "these logits were not computed before the head's parameters were changed in place, as by an "
                "optimizer's step, and can no longer be: read them, or call logits.materialize(), before"
            )


def _versions(head: Head) -> tuple[int, ...]:
    if torch.compiler.is_compiling():
        return ()
    return tuple(-1 if tensor.is_inference() else count_of_changes(tensor) for tensor in head.parameters())

"""What logits are computed from: a head, its hidden states, and what a model does to the head's logits since."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.changes import count_of_changes
from lastlayer.functional.precision import autocast_is_on, product_dtype
from lastlayer.transformers.heads import LayerHead, LinearHead, LogitTransform


class RecordedLogits(NamedTuple):
    """`transform(head.logits(hidden))`, to be computed as at the time when the head was called."""

    head: LinearHead | LayerHead
    hidden: Tensor  # (..., d)
    transform: LogitTransform
    dtype: torch.dtype  # of the logits
    product: torch.dtype  # of the head's product: that of autocast, where it was on
    with_gradient: bool  # whether gradients were recorded
    versions: tuple[int, ...]  # of the head's parameters
    used: list[str]  # what was computed from them, by name

    @classmethod
    def of(cls, head: LinearHead | LayerHead, hidden: Tensor, used: list[str]) -> "RecordedLogits":
        """The head's own logits."""
        dtype = product_dtype(hidden)
        return cls(head, hidden, LogitTransform(), dtype, dtype, torch.is_grad_enabled(), _versions(head), used)

    @property
    def requires_grad(self) -> bool:
        """Whether the logits would."""
        return self.with_gradient and any(t.requires_grad for t in (self.hidden, *self.head.parameters()))

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
        with torch.set_grad_enabled(self.with_gradient):
            with self._precision():
                logits = self.head.logits(self.hidden)
            self.used.append("logits")
            return self.transform(logits.to(self.dtype))

    def cross_entropy(self, targets: Tensor, **options: Any) -> Tensor:
        """`F.cross_entropy(logits, targets, **options)` without them."""
        self._check_versions()
        self.used.append("loss")
        half = autocast_is_on(self.hidden.device.type)  # where F.cross_entropy gives float32
        with torch.set_grad_enabled(self.with_gradient and torch.is_grad_enabled()), self._precision():
            loss = self.head.loss(self.hidden, targets, self.transform, **options)
        return loss.float() if half else loss.to(self.dtype)

    def _precision(self) -> AbstractContextManager[object]:
        if self.product == self.hidden.dtype:
            return nullcontext()
        return torch.autocast(self.hidden.device.type, dtype=self.product)

    def _check_versions(self) -> None:
        if self.versions and self.versions != _versions(self.head):
            raise RuntimeError(
                "these logits were not computed before the head's parameters were changed in place, as by an "
                "optimizer's step, and can no longer be: read them, or call logits.materialize(), before"
            )


def _versions(head: LinearHead | LayerHead) -> tuple[int, ...]:
    """How often the head's parameters were changed; nothing in a compiled graph, which does not know."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(-1 if tensor.is_inference() else count_of_changes(tensor) for tensor in head.parameters())


# The operations on logits that are recorded: functions of (recorded, *args, **kwargs) that give what is recorded
# then, or NotImplemented for arguments that they do not know: the real logits are computed then. A view of logits
# `(..., V)` that keeps each row whole is the same view of the hidden states `(..., d)`.
OPERATIONS: dict[Any, Callable[..., Any]] = {}


def _of(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_of(Tensor.detach, torch.detach)
def _detach(recorded: RecordedLogits) -> Any:
    return recorded.detach()


@_of(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(recorded: RecordedLogits, *sizes: Any, **more: Any) -> Any:
    hidden, num_classes = recorded.hidden, recorded.head.num_classes
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if more or not sizes or not all(isinstance(size, int) for size in sizes):  # a dtype, say
        return NotImplemented
    rows, (*leading, last) = hidden.shape[:-1].numel(), sizes
    count = 1
    for size in leading:
        count *= size
    if -1 in leading:  # to be inferred
        fits = count != 0 and rows > 0 and rows % count == 0 and leading.count(-1) == 1
    else:
        fits = count == rows
    if not fits or (last != num_classes and (last != -1 or -1 in leading or not rows)):
        return NotImplemented
    return recorded._replace(hidden=hidden.reshape(*leading, hidden.shape[-1]))


@_of(Tensor.flatten, torch.flatten)
def _flatten(recorded: RecordedLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    if end_dim in (-1, recorded.hidden.dim() - 1):
        return NotImplemented
    return recorded._replace(hidden=recorded.hidden.flatten(start_dim, end_dim))


@_of(Tensor.contiguous)
def _contiguous(recorded: RecordedLogits, **more: Any) -> Any:
    return NotImplemented if more else recorded._replace(hidden=recorded.hidden.view_as(recorded.hidden))


@_of(Tensor.__getitem__)
def _select(recorded: RecordedLogits, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if not _selects_rows(parts, recorded.hidden.dim()):
        return NotImplemented
    return recorded._replace(hidden=recorded.hidden[index])


def _selects_rows(parts: tuple[Any, ...], dims: int) -> bool:
    """Whether an index leaves the last dimension, that of the classes, as it is."""
    consumed, ellipsis = 0, False
    for part in parts:
        if part is Ellipsis:
            ellipsis = True
        elif type(part) is Tensor and part.dtype in (torch.bool, torch.int64, torch.int32):
            consumed += part.dim() if part.dtype == torch.bool else 1
        elif isinstance(part, (int, slice)) and not isinstance(part, bool):
            consumed += 1
        elif part is not None:
            return False
    if consumed < dims and (not ellipsis or parts[-1] is Ellipsis):
        return True
    last = parts[-1]
    return isinstance(last, slice) and last == slice(None)


@_of(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def _scale(recorded: RecordedLogits, other: Any, **more: Any) -> Any:
    if more or not _is_number(other) or other <= 0:
        return NotImplemented
    scale, cap, _ = recorded.transform
    changed = {"scale": scale * other} if cap is None else {"cap": cap * other}
    return recorded._replace(transform=recorded.transform._replace(**changed))


@_of(torch.div, torch.divide, torch.true_divide)
@_of(Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__)
def _divide(recorded: RecordedLogits, other: Any, **more: Any) -> Any:
    return _scale(recorded, 1 / other, **more) if _is_number(other) and other != 0 else NotImplemented


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


@_of(torch.tanh, Tensor.tanh, torch.nn.functional.tanh)
def _tanh(recorded: RecordedLogits, **more: Any) -> Any:
    if more or recorded.transform.cap is not None:
        return NotImplemented
    return recorded._replace(transform=recorded.transform._replace(cap=1.0))


@_of(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _shift(recorded: RecordedLogits, other: Any, **more: Any) -> Any:
    """One number for each class."""
    hidden, (scale, cap, before) = recorded.hidden, recorded.transform
    if more or type(other) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer) or other.device != hidden.device:
        return NotImplemented
    of_classes = other.dim() > 0 and other.shape[-1] == other.numel() == recorded.head.num_classes
    if cap is not None or not of_classes or other.dim() > hidden.dim() or not other.is_floating_point():
        return NotImplemented
    shift = other.reshape(-1) / scale
    transform = recorded.transform._replace(shift=shift if before is None else before + shift)
    return recorded._replace(transform=transform, dtype=torch.promote_types(recorded.dtype, other.dtype))


@_of(Tensor.to)
def _to(recorded: RecordedLogits, *where: Any, **more: Any) -> Any:
    if len(where) == 1 and more.keys() <= {"non_blocking"}:
        if isinstance(where[0], torch.dtype):
            return _cast(recorded, dtype=where[0])
        if isinstance(where[0], (str, torch.device)) and torch.device(where[0]) == recorded.hidden.device:
            return recorded
    if not where and more.keys() == {"dtype"}:
        return _cast(recorded, **more)
    return NotImplemented


def _cast(recorded: RecordedLogits, *, dtype: torch.dtype, **more: Any) -> Any:
    """To a dtype that holds the values of the one before."""
    if more:
        return NotImplemented
    if dtype == recorded.dtype:
        return recorded
    wider = torch.promote_types(recorded.dtype, dtype) == dtype
    return recorded._replace(dtype=dtype) if wider else NotImplemented


OPERATIONS.update(
    {Tensor.float: partial(_cast, dtype=torch.float32), Tensor.double: partial(_cast, dtype=torch.float64)}
)

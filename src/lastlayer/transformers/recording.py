"""Which operations on logits that are not computed yet are recorded, and how.

A view of logits `(..., V)` that keeps each row whole is the same view of the hidden states `(..., d)`. Every
function here returns NotImplemented for arguments that it does not know; the real logits are computed then.
"""

from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from lastlayer.transformers.recorded_logits import RecordedLogits, Step

VIEWS: dict[Any, Callable[..., Any]] = {}  # of (hidden, V, *args, **kwargs), give the view of hidden
STEPS: dict[Any, Callable[..., Any]] = {}  # of (recorded, *args, **kwargs), give a Step; None: no operation


def _of(
    table: dict[Any, Callable[..., Any]], *functions: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_of(VIEWS, Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(hidden: Tensor, num_classes: int, *sizes: Any) -> Any:
    sizes = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    if not sizes or not all(isinstance(size, int) for size in sizes):  # a dtype, say
        return NotImplemented
    rows, (*leading, last) = hidden.shape[:-1].numel(), sizes
    count = 1
    for size in leading:
        count *= size
    if -1 in leading:  # to be inferred
        fits = count != 0 and rows > 0 and rows % count == 0 and leading.count(-1) == 1
    else:
        fits = count == rows
    whole = last == num_classes or (last == -1 and -1 not in leading and rows > 0)
    return hidden.reshape(*leading, hidden.shape[-1]) if fits and whole else NotImplemented


@_of(VIEWS, Tensor.flatten, torch.flatten)
def _flatten(hidden: Tensor, _: int, start_dim: int = 0, end_dim: int = -1) -> Any:
    last = end_dim in (-1, hidden.dim() - 1)
    return NotImplemented if last else hidden.flatten(start_dim, end_dim)


@_of(VIEWS, Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(hidden: Tensor, _: int, dim: int) -> Any:
    return NotImplemented if dim in (-1, hidden.dim()) else hidden.unsqueeze(dim)


@_of(VIEWS, Tensor.squeeze, torch.squeeze)
def _squeeze(hidden: Tensor, _: int, dim: Any = None) -> Any:
    last = not isinstance(dim, int) or dim in (-1, hidden.dim() - 1)
    return NotImplemented if last else hidden.squeeze(dim)


@_of(VIEWS, Tensor.contiguous)
def _contiguous(hidden: Tensor, _: int) -> Any:
    return hidden


@_of(VIEWS, Tensor.__getitem__)
def _select(hidden: Tensor, _: int, index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    return hidden[index] if _selects_rows(parts, hidden.dim()) else NotImplemented


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


@_of(STEPS, torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__)
def _scale(_: RecordedLogits, factor: Any) -> Any:
    return Step("scale", factor) if _is_number(factor) else NotImplemented


@_of(STEPS, torch.div, torch.divide, torch.true_divide)
@_of(STEPS, Tensor.div, Tensor.divide, Tensor.true_divide, Tensor.__truediv__)
def _divide(_: RecordedLogits, divisor: Any) -> Any:
    return Step("divide", divisor) if _is_number(divisor) and divisor != 0 else NotImplemented


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


@_of(STEPS, torch.tanh, Tensor.tanh, torch.nn.functional.tanh)
def _tanh(_: RecordedLogits) -> Any:
    return Step("tanh")


@_of(STEPS, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _shift(recorded: RecordedLogits, vector: Any) -> Any:
    """One number for each class."""
    if (
        type(vector) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        or vector.device != recorded.hidden.device
    ):
        return NotImplemented
    of_classes = vector.dim() > 0 and vector.shape[-1] == vector.numel() == recorded.head.num_classes
    if not of_classes or vector.dim() > recorded.hidden.dim() or not vector.is_floating_point():
        return NotImplemented
    return Step("shift", vector.reshape(-1))


@_of(STEPS, Tensor.to)
def _to(recorded: RecordedLogits, *where: Any, **more: Any) -> Any:
    if len(where) == 1 and more.keys() <= {"non_blocking"}:
        if isinstance(where[0], torch.dtype):
            return _cast(recorded, where[0])
        if isinstance(where[0], (str, torch.device)) and torch.device(where[0]) == recorded.hidden.device:
            return None
    if not where and more.keys() == {"dtype"}:
        return _cast(recorded, more["dtype"])
    return NotImplemented


def _cast(recorded: RecordedLogits, dtype: torch.dtype) -> Any:
    return None if dtype == recorded.dtype else Step("cast", dtype)


DTYPE_METHODS = {
    Tensor.float: torch.float32,
    Tensor.double: torch.float64,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.half: torch.float16,
}
STEPS.update({method: partial(_cast, dtype=dtype) for method, dtype in DTYPE_METHODS.items()})

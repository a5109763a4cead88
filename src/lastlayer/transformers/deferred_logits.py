"""A tensor that stands for the logits of a head until something needs their values."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lastlayer.transformers.heads import LayerHead, LinearHead
from lastlayer.transformers.recorded_logits import OPERATIONS, RecordedLogits

CHUNK_LOGITS = 1 << 24  # how many a query of rows, such as `argmax(-1)`, computes at once


class DeferredLogits(Tensor):
    """The logits `(..., V)` of a head, not yet computed; `F.cross_entropy` of them never computes them all.

    Has the shape, dtype and device of the logits, and holds what they are computed from. Reshapes that keep the
    classes last, selections of rows, casts to a wider dtype, positive factors, one `tanh`, and before it a number
    added to each class are recorded. `F.cross_entropy` is then `functional.linear_cross_entropy`. `argmax(-1)`,
    `max(-1)`, `topk(k)` and `logsumexp(-1)` run over chunks of rows where no gradient is needed. Anything else
    computes the real logits, once, and goes on with them, so that every result is that of the real logits, to
    rounding.

    `chunked_loss` has a model's head return it.

    Raises:
        TypeError: an in-place operation where another tensor views the same logits, not yet computed.
        RuntimeError: the head's parameters were changed (an optimizer's step) before the values were needed; not
            noticed of logits that a compiled graph has returned.
    """

    recorded: RecordedLogits
    computed: Tensor | None  # once they are computed
    shared: bool  # whether another tensor views the same logits

    def materialize(self) -> Tensor:  # (..., V)
        """The real logits, an ordinary tensor; computed once."""
        if self.computed is None:
            self.computed = self.recorded.compute()
        return self.computed

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self.computed is not None:
            return repr(self.computed)
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        first, *rest = args or (None,)
        if func in COMMUTATIVE and not isinstance(first, DeferredLogits) and len(rest) == 1:
            first, rest = rest[0], [first]
        if isinstance(first, DeferredLogits) and first.computed is None:
            found = _record(func, first, *rest, **kwargs)
            if found is not NotImplemented:
                return found
            if first.shared and _is_in_place(func, kwargs):
                raise TypeError(
                    "logits that are not computed yet cannot be changed in place where another tensor views them: "
                    "use an operation that is not in place, or call logits.materialize() before taking a view"
                )
        return func(*_materialized(args), **_materialized(kwargs))


def defer(head: LinearHead | LayerHead, hidden: Tensor, used: list[str] | None = None) -> DeferredLogits:
    """`head.logits(hidden)`, computed when needed; what of them is computed is noted in `used`."""
    return _holding(RecordedLogits.of(head, hidden, [] if used is None else used))


def _holding(recorded: RecordedLogits, *, shared: bool = False) -> DeferredLogits:
    # One number, expanded: no memory is used, and the shape is right. What reads it by mistake reads NaN.
    one = torch.full((), torch.nan, dtype=recorded.dtype, device=recorded.hidden.device)
    logits: Any = one.expand(*recorded.hidden.shape[:-1], recorded.head.num_classes).as_subclass(DeferredLogits)
    logits.recorded, logits.computed, logits.shared = recorded, None, shared
    return logits


def _getters(*names: str) -> list[Any]:
    return [getattr(Tensor, name).__get__ for name in names]


# Strides are those of the placeholder: torch.compile guards on them, and must not compute the logits for it.
METADATA = {
    *(Tensor.stride, Tensor.storage_offset),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(
        Tensor.is_floating_point,
        torch.is_floating_point,
        Tensor.is_complex,
        Tensor.element_size,
        Tensor.get_device,
    ),
    *(Tensor.is_conj, Tensor.is_neg, Tensor.is_inference),
    *_getters("shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes"),
    *_getters(
        "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_mkldnn", "is_quantized", "is_nested"
    ),
}
REQUIRES_GRAD, IS_LEAF, GRAD = (_getters(name) for name in ("requires_grad", "is_leaf", "grad"))
COMMUTATIVE = {torch.mul, torch.multiply, torch.add, Tensor.mul, Tensor.add, Tensor.__mul__, Tensor.__add__}
# Functions of rows, and the place of their argument `dim` after the logits.
ROW_QUERIES = {
    **dict.fromkeys((torch.argmax, Tensor.argmax, torch.max, Tensor.max, torch.logsumexp, Tensor.logsumexp), 0),
    **dict.fromkeys((torch.topk, Tensor.topk), 1),
}


def _record(func: Any, logits: DeferredLogits, *args: Any, **kwargs: Any) -> Any:
    """The result of an operation that needs no real logits, or only some at a time; else NotImplemented."""
    recorded = logits.recorded
    if func in OPERATIONS:
        found = OPERATIONS[func](recorded, *args, **kwargs)
        if found is NotImplemented or found is recorded:
            return logits if found is recorded else NotImplemented
        view = found.hidden is not recorded.hidden
        logits.shared = logits.shared or view
        return _holding(found, shared=view)
    if func in REQUIRES_GRAD:
        return recorded.requires_grad
    if func in IS_LEAF:
        return not recorded.requires_grad
    if func in GRAD:
        return None
    if func is F.cross_entropy:
        return _cross_entropy(recorded, *args, **kwargs)
    if func in ROW_QUERIES:
        return _query_rows(func, recorded, *args, **kwargs)
    return NotImplemented


def _cross_entropy(
    recorded: RecordedLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`F.cross_entropy` where the classes are the last dimension, and no gradient of the targets is needed."""
    unknown = recorded.hidden.dim() > 2 or size_average is not None or reduce is not None
    if unknown or isinstance(target, DeferredLogits) or target.requires_grad:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return recorded.cross_entropy(target, weight=weight, **options)


def _query_rows(func: Any, recorded: RecordedLogits, *args: Any, **kwargs: Any) -> Any:
    """A function of each row, over chunks of rows; not where its gradient is needed."""
    hidden, place, arguments = recorded.hidden, ROW_QUERIES[func], list(args)
    differentiable = func not in (torch.argmax, Tensor.argmax)
    if (
        hidden.dim() < 2
        or not hidden.numel()
        or (differentiable and recorded.requires_grad and torch.is_grad_enabled())
    ):
        return NotImplemented
    if len(arguments) > place:
        dim, arguments[place] = arguments[place], -1
    else:
        dim, kwargs["dim"] = kwargs.get("dim", -1 if place else None), -1
    if not isinstance(dim, int) or dim not in (-1, hidden.dim() - 1):
        return NotImplemented
    recorded = recorded.detach()
    parts = recorded.hidden.flatten(0, -2).split(max(1, CHUNK_LOGITS // recorded.head.num_classes))
    found = [func(recorded._replace(hidden=part).compute(), *arguments, **kwargs) for part in parts]

    def joined(results: list[Tensor]) -> Tensor:
        whole = torch.cat(results)
        return whole.reshape(*hidden.shape[:-1], *whole.shape[1:])

    if isinstance(found[0], Tensor):
        return joined(found)
    return type(found[0])([joined(list(results)) for results in zip(*found, strict=True)])


IN_PLACE = {f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow")}


def _is_in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    own = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return own or bool(kwargs.get("inplace", False))


def _materialized(value: Any) -> Any:
    """The same arguments with real logits."""
    if isinstance(value, DeferredLogits):
        return value.materialize()
    if isinstance(value, dict):
        return {key: _materialized(part) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_materialized(part) for part in value)
    return value

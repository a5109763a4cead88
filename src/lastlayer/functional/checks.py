"""Checks of what a caller passes: each error names the argument, what it was, and what it may be."""

import operator
from collections.abc import Iterable

import torch
from torch import Tensor

from lastlayer.functional.ordinary import eager_on_cpu, ordinary
from lastlayer.functional.precision import autocast_is_on

REDUCTIONS = ("mean", "sum", "none")


def check_positive(name: str, value: int) -> int:
    """`value` as an int, or an error unless it is a whole number of at least 1."""
    return check_count(name, value, 1)


def check_count(name: str, value: int, least: int, most: int | None = None) -> int:
    """`value` as an int, or an error unless `least <= value <= most`."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """`value`, or a ValueError that lists the choices."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")
    return value


def check_hidden(hidden: Tensor, in_features: int, dtype: torch.dtype | None = None) -> None:
    """An error unless `hidden` is a floating `(..., in_features)` tensor (of `dtype`, outside autocast)."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden must be a Tensor, got {type(hidden).__name__}")
    if not hidden.is_floating_point():
        raise TypeError(f"hidden must be a floating-point tensor, got {hidden.dtype}")
    if hidden.dim() == 0 or hidden.shape[-1] != in_features:
        raise ValueError(
            f"hidden must have shape (..., {in_features}), in_features last; got {tuple(hidden.shape)}"
        )
    if dtype is not None and hidden.dtype != dtype and not autocast_is_on(hidden.device.type):
        raise TypeError(
            f"hidden must have the layer's dtype {dtype}, got {hidden.dtype}; "
            f"cast it with hidden.to({dtype}), the layer with layer.to({hidden.dtype}), or use torch.autocast"
        )


def integer_ids(name: str, ids: Tensor, kind: str = "class ids") -> Tensor:
    """`ids` as int64, or an error unless they are a tensor of an integer dtype."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a Tensor of {kind}, got {type(ids).__name__}")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"{name} must be {kind} of an integer dtype, such as torch.int64; got {ids.dtype}")
    return ids.long()


def check_targets(
    targets: Tensor, shape: torch.Size, num_classes: int, ignore_index: int | None = None
) -> tuple[Tensor, bool]:
    """`targets` as int64, or an error unless they are class ids of `shape`; and whether some may be ignored."""
    targets = integer_ids("targets", targets)
    if targets.shape != shape:
        raise ValueError(f"targets must have hidden's leading shape {tuple(shape)}, got {tuple(targets.shape)}")
    return targets, check_range("targets", targets, num_classes, ignore_index)


def check_ids(
    name: str, ids: Tensor, num_classes: int, ignore_index: int | None, kind: str = "class ids"
) -> tuple[Tensor, bool]:
    """`ids` as int64, and whether some may be `ignore_index`; or an error unless all are one of both."""
    ids = integer_ids(name, ids, kind)
    return ids, check_range(name, ids, num_classes, ignore_index, kind)


def check_range(
    name: str, ids: Tensor, num_classes: int, ignore_index: int | None, kind: str = "class ids"
) -> bool:
    """Whether some of the int64 `ids` may be `ignore_index`; an error unless all others are from 0 to V - 1.

    Eager on a CPU, ids out of range raise IndexError; on a GPU or compiled they are asserted on the device,
    never by a synchronisation.
    """
    if not eager_on_cpu(ids):
        valid = (ids >= 0) & (ids < num_classes)
        if ignore_index is not None:
            valid |= ids == ignore_index
        assert_on_device(valid, f"{name} must be {kind} in range, or ignore_index")
        return True
    if not ids.numel() or _are_below(ids, num_classes):  # the usual case, in one pass
        return ignore_index is not None and 0 <= ignore_index < num_classes
    absent = torch.zeros_like(ids, dtype=torch.bool) if ignore_index is None else ids == ignore_index
    if _are_below(ids.masked_fill(absent, 0), num_classes):
        return True
    wrong = int(ids[~absent & ((ids < 0) | (ids >= num_classes))][0])
    also = "" if ignore_index is None else f", or ignore_index={ignore_index}"
    raise IndexError(f"{name} must be {kind} from 0 to {num_classes - 1}{also}; got {wrong}")


def _are_below(ids: Tensor, num_classes: int) -> bool:
    least, most = ids.aminmax()
    return least.item() >= 0 and most.item() < num_classes


def assert_on_device(valid: Tensor, message: str) -> None:
    """An assertion that `valid` is true everywhere, without a synchronisation; none where there are no values.

    PyTorch has no public assertion on the device: `assert` and `torch._check` wait for its result, and
    `torch._assert_async` is this operator.
    """
    if torch.compiler.is_compiling() or ordinary(valid):
        torch.ops.aten._assert_async.msg(valid.all(), message)


def check_fraction(name: str, value: float) -> float:
    """`value`, or a ValueError unless it is from 0 to 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    return value


def check_vector(name: str, vector: Tensor, length: int) -> None:
    """An error unless `vector` is a floating tensor `(length,)`."""
    if not isinstance(vector, Tensor) or not vector.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(vector, 'dtype', vector)}")
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(vector.shape)}")


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """An error unless `weight (V, d)` and `bias (V,)` are a linear layer for `hidden (..., d)`."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating-point tensor, got {getattr(weight, 'dtype', weight)}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape (num_classes, in_features), got {tuple(weight.shape)}")
    check_hidden(hidden, weight.shape[1], weight.dtype)
    if bias is not None:
        check_vector("bias", bias, len(weight))


def check_above_zero(name: str, value: float) -> float:
    """`value`, or a ValueError unless it is finite and above 0."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """`value`, or a ValueError unless it is finite and at least 0."""
    if not 0.0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}")
    return value

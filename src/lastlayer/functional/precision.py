"""The dtypes that products, logarithms and sums run in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on for this type of device; on "meta" it never is."""
    # not by torch.amp.is_autocast_available, which PyTorch 2.11 cannot trace
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype that the matrix products run in: autocast's where it is on."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if autocast_is_on(device) else hidden.dtype


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logarithms and sums: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_exact(logits: Tensor) -> Tensor:
    """`logits` in the dtype of logarithms and sums."""
    return logits.to(exact_dtype(logits.dtype))


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast; a null context where autocast is off already."""
    if not autocast_is_on(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)

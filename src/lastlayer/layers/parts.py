"""What layers over one weight share, and how a module's buffers are kept."""

import torch
from torch import Tensor, nn

from lastlayer.functional.logit_map import LogitMap, check_logit_map


def tied_or_new(
    weight: nn.Parameter | None,
    shape: tuple[int, int],  # (V, d)
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Parameter:
    """The Parameter itself, or a new one, drawn as `nn.Linear` draws it."""
    if weight is None:
        new = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        draw(new, shape[1])
        return new
    return tied(weight, shape)


def draw(parameter: Tensor, width: int) -> None:
    """Draws a parameter as `nn.Linear` draws its own: uniform within `1 / sqrt(width)`."""
    nn.init.uniform_(parameter, -(width**-0.5), width**-0.5)


def tied(weight: nn.Parameter, shape: tuple[int, int]) -> nn.Parameter:
    """The Parameter, or an error unless it is one of this shape."""
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"weight must be an nn.Parameter, such as embedding.weight; got {type(weight).__name__}")
    if weight.shape != shape:
        raise ValueError(f"weight must have shape {shape}, got {tuple(weight.shape)}")
    return weight


def map_beside(logit_map: LogitMap | None, weight: nn.Parameter) -> LogitMap | None:
    """The map, checked, on the weight's device and in its dtype."""
    check_logit_map(logit_map)
    return None if logit_map is None else logit_map.to(device=weight.device, dtype=weight.dtype)


def keep_buffers(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Gives buffers that were moved or cast their dtype back, and those that went to "meta" their values."""
    for name, buffer in before.items():
        moved = getattr(module, name)
        if not buffer.is_meta:
            setattr(module, name, buffer if moved.is_meta else buffer.to(moved.device))

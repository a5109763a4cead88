"""Which implementation computes the results of a screen: the thresholds, and one pure function over them."""

from typing import Literal

import torch

from lastlayer.kernels.screening import NUMBER_TYPES

Backend = Literal["full", "compiled", "plain"]

# Coordinates of a hidden state up to which no 32-bit sum of products of its whole numbers overflows.
MOST_WIDTH = 8192


def backend_for(
    *,
    rows: int,
    num_classes: int,
    candidates: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    contiguous: bool,
    compiled: bool,
    full_is_faster: bool,
) -> Backend:
    """What computes the results: the full layer, the screen by the compiled engine, or it in plain PyTorch.

    Args:
        rows: hidden states in the query.
        num_classes, candidates, width: of the screen.
        dtype, device, contiguous: of the weight.
        compiled: whether the compiled engine is there.
        full_is_faster: what the screen's plan says for so many rows.

    >>> import torch
    >>> layer = {"num_classes": 50_000, "candidates": 32, "width": 512, "dtype": torch.float32, "contiguous": True}
    >>> layer |= {"device": torch.device("cpu"), "compiled": True}
    >>> backend_for(rows=1, full_is_faster=False, **layer)
    'compiled'
    >>> backend_for(rows=2000, full_is_faster=False, **layer)  # the candidates' rows are more than all rows
    'full'
    """
    if full_is_faster or rows * candidates >= num_classes:
        return "full"
    return "compiled" if compiled and engine_takes(width, dtype, device, contiguous) else "plain"


def engine_takes(width: int, dtype: torch.dtype, device: torch.device, contiguous: bool) -> bool:
    """Whether the compiled engine takes a weight: float32 or shorter, on a CPU, rows one after another."""
    return dtype in NUMBER_TYPES and device.type == "cpu" and contiguous and width <= MOST_WIDTH

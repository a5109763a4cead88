"""Which implementation runs: the thresholds of every family of kernels, and a pure function each that decides.

"compiled" is the C++ of `csrc/`, "plain" its twin in PyTorch. Nothing here computes anything: call a function with
what a layer would be called with, and it says what would run.
"""

from typing import Literal

import torch

from lastlayer.kernels import engine

Backend = Literal["compiled", "plain"]

# Multiply-adds from which a group is computed by matrix products that threads share; smaller groups they share.
GROUP_WORK = 1 << 23


def softmax_rows_backend_for(
    device: torch.device,
    dtype: torch.dtype,
    *,
    label_smoothing: bool = False,
) -> Backend:
    """What forms the loss and gradient of logits: in `FullSoftmax`, `AdaptiveSoftmax`, `MixtureOfSoftmaxes`.

    A logit map that has no `kernel_map()` is always plain.

    >>> import torch
    >>> softmax_rows_backend_for(torch.device("cpu"), torch.float64)
    'plain'
    """
    known = dtype in (torch.float32, torch.bfloat16) and not label_smoothing
    return "compiled" if known and _engine_serves(device) else "plain"


def grouped_softmax_backend_for(
    device: torch.device,
    dtype: torch.dtype,  # of the hidden states in the products
    weight_dtype: torch.dtype,
) -> Backend:
    """What computes the clusters of `HierarchicalSoftmax`, and its head.

    >>> import torch
    >>> grouped_softmax_backend_for(torch.device("cpu"), torch.float32, torch.bfloat16)
    'plain'
    """
    known = dtype == weight_dtype and dtype in (torch.float32, torch.float64)
    return "compiled" if known and _engine_serves(device) else "plain"


def paths_backend_for(device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype) -> Backend:
    """What computes the paths of `TreeSoftmax`."""
    known = dtype == weight_dtype and dtype in (torch.float32, torch.float64)
    return "compiled" if known and _engine_serves(device) else "plain"


def factored_backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """What reads, differentiates and steps a `FactoredOutput` whose state has this dtype.

    A step that is near singular, or of more rows than 1.5 d, is always plain.
    """
    return "compiled" if dtype in (torch.float32, torch.float64) and _engine_serves(device) else "plain"


def _engine_serves(device: torch.device) -> bool:
    """Whether compiled kernels can run on this device here and now; they cannot be part of a compiled graph."""
    return device.type == "cpu" and not torch.compiler.is_compiling() and engine.available()

"""The parameters of Theano's `h_softmax` and those of `HierarchicalSoftmax`, each from the other."""

from typing import NamedTuple

import torch
from torch import Tensor

from lastlayer.functional.checks import check_count


class TheanoParameters(NamedTuple):
    """What `theano.tensor.nnet.h_softmax` takes: nC classes, as it calls clusters, of nO outputs each."""

    W1: Tensor  # (d, nC)
    b1: Tensor  # (nC,)
    W2: Tensor  # (nC, d, nO)
    b2: Tensor  # (nC, nO)


def check_theano(parameters: TheanoParameters, num_classes: int) -> int:
    """nO, or an error unless the shapes fit each other and the `nC nO` places hold all classes, none empty."""
    for name, tensor in zip(TheanoParameters._fields, parameters, strict=True):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(
                f"{name} must be a floating-point Tensor, got {getattr(tensor, 'dtype', type(tensor))}"
            )
    W1, b1, W2, b2 = parameters
    if W1.dim() != 2 or W2.dim() != 3 or 0 in W2.shape:
        raise ValueError(f"W1 must be (d, nC) and W2 (nC, d, nO); got {tuple(W1.shape)} and {tuple(W2.shape)}")
    nC, d, nO = W2.shape
    for name, tensor, shape in (("W1", W1, (d, nC)), ("b1", b1, (nC,)), ("b2", b2, (nC, nO))):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape}, as W2 is {tuple(W2.shape)}; got {tuple(tensor.shape)}"
            )
    check_count("num_classes", num_classes, (nC - 1) * nO + 1, nC * nO)
    return nO


def class_rows(blocks: Tensor, num_classes: int) -> Tensor:  # (nC, ..., nO) to (V, ...)
    """Output o of class c is row `c nO + o`; the places past the last class are left out."""
    return blocks.movedim(-1, 1).flatten(0, 1)[:num_classes]


def blocks_of(rows: Tensor, num_blocks: int, size: int) -> Tensor:  # (V, ...) to (nC, ..., nO)
    """The inverse of `class_rows`: the places past the last class hold 0."""
    padded = rows.new_zeros(num_blocks * size, *rows.shape[1:])
    padded[: len(rows)] = rows
    return padded.unflatten(0, (num_blocks, size)).movedim(1, -1)


def block_ids(num_classes: int, size: int) -> Tensor:  # (V,)
    """Theano's class of each output, `y // nO`."""
    return torch.arange(num_classes, device="cpu").div_(size, rounding_mode="floor")

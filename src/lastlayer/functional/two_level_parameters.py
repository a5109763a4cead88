"""The parameters of a two-level softmax from those of a full one or of Theano's `h_softmax`, and back."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lastlayer.functional.checks import check_count
from lastlayer.functional.segments import row_clusters


def means_above(
    weight: Tensor,  # (V, d), cluster after cluster
    bias: Tensor | None,  # (V,), likewise
    offsets: Tensor,  # (C + 1,): cluster c holds the rows from offsets[c] up to offsets[c + 1]
) -> tuple[Tensor, Tensor]:  # (C, d), (C,)
    """The head over a full softmax's own vectors: their means, and the log-sum-exp of their biases.

    Where hidden is 0, both are the same model.
    """
    sizes = offsets.diff()
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    sums = weight.new_zeros(len(sizes), weight.shape[1]).index_add_(0, row_clusters(offsets, len(weight)), weight)
    return sums / sizes[:, None], torch.stack([own.logsumexp(0) for own in bias.split(sizes.tolist())])


def one_level(
    head_weight: Tensor,  # (C, d)
    head_bias: Tensor | None,  # (C,)
    weight: Tensor,  # (V, d), cluster after cluster
    bias: Tensor | None,  # (V,)
    offsets: Tensor,  # (C + 1,)
    at: Tensor,  # (d,)
) -> tuple[Tensor, Tensor]:  # (V, d), (V,), cluster after cluster
    """Weight and bias of the full softmax that is nearest to a two-level one around the hidden state `at`.

    The logit of a class is its own, plus its cluster's, less its cluster's normaliser: which is not linear in the
    hidden state, and is expanded to first order.
    """
    logits = F.linear(at, weight, bias)
    shift, shift_at = head_weight.clone(), F.linear(at, head_weight, head_bias)
    by_cluster = (tensor.split(offsets.diff().tolist()) for tensor in (logits, weight))
    for c, (own, rows) in enumerate(zip(*by_cluster, strict=True)):
        shift[c] -= own.softmax(0) @ rows
        shift_at[c] -= own.logsumexp(0)
    clusters = row_clusters(offsets, len(logits))
    weight = weight + shift[clusters]
    return weight, logits + shift_at[clusters] - weight @ at


class TheanoParameters(NamedTuple):
    """What `theano.tensor.nnet.h_softmax` takes: nC classes, as it calls clusters, of nO outputs each."""

    W1: Tensor  # (d, nC)
    b1: Tensor  # (nC,)
    W2: Tensor  # (nC, d, nO)
    b2: Tensor  # (nC, nO)


def check_theano(parameters: TheanoParameters, num_classes: int) -> int:
    """nO, or an error unless the shapes fit each other and the `nC nO` places hold all classes, none empty."""
    for name, tensor in parameters._asdict().items():
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

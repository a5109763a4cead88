"""Classes that are barred by a bias of -inf: they have no probability, and nothing has a gradient through them."""

from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.checks import eager_on_cpu


def barred_classes(bias: Tensor | None) -> Tensor | None:  # (V,) to (V,) bool
    """Which classes have a bias of -inf; None where none has, if that can be read without a synchronisation."""
    if bias is None:
        return None
    barred = bias.detach() == -torch.inf
    return barred if not eager_on_cpu(barred) or bool(barred.any()) else None


def map_barred(logit_map: Callable[[Tensor], Tensor], logits: Tensor, barred: Tensor | None) -> Tensor:
    """`logit_map(logits)`, but -inf at barred classes, whatever the map makes of it (a soft cap a finite number).

    The map sees 0 there, and so its derivative is finite where its gradient is 0.
    """
    if barred is None:
        return logit_map(logits)
    return logit_map(logits.masked_fill(barred, 0)).masked_fill(barred, -torch.inf)

"""The law of tensors that have shapes but no values: on "meta"."""

from typing import Any

from torch import Tensor

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import LayerCase
from lastlayer.testing.rows import rows_for


def law_without_values(case: LayerCase) -> None:
    """10. On "meta" every call has the shapes and dtypes that it has with values; its gradients too.

    But that of a single class, which depends on nothing, may have none, and a sampled loss has no classes to draw.
    """
    for reduction in ("mean", "none"):
        real, planned = case.build(reduction=reduction), case.make(reduction=reduction, device="meta").double()
        planned.train(real.training)
        hidden, targets = rows_for(real)
        expected = _kinds(case, real, hidden, targets)
        found = _kinds(case, planned, hidden.to("meta"), targets.to("meta"))
        for on_meta, with_values in zip(found, expected, strict=True):
            assert on_meta == with_values or (real.num_classes == 1 and None in (on_meta, with_values)), (
                f"on meta {found}, with values {expected}"
            )


def _kinds(case: LayerCase, layer: OutputLayer, hidden: Tensor, targets: Tensor) -> list[Any]:
    """Shape and dtype of the result of every call, and of every gradient."""
    hidden = hidden.detach().requires_grad_()
    loss = layer(hidden, targets) if case.likelihood else -layer.target_log_prob(hidden, targets)
    best = layer.topk(hidden, min(2, layer.num_classes))
    results = [
        loss,
        layer.log_prob(hidden),
        layer.target_log_prob(hidden, targets),
        layer.score(hidden, targets[:, None]),
        *best,
    ]
    if loss.requires_grad:
        loss.sum().backward()
    results += [hidden.grad, *(parameter.grad for parameter in layer.parameters())]
    return [None if result is None else (result.shape, result.dtype) for result in results]

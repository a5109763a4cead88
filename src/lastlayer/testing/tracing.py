"""The laws of calls without values: on "meta", and in exported programs."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import LayerCase, assert_equal, rows_for

Results = tuple[Tensor, ...]


class Call(nn.Module):
    """A call of a layer as a module."""

    def __init__(self, layer: OutputLayer, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, *arguments: Tensor) -> Any:
        return self.call(*arguments)


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
    """Shape and dtype of the result of every call, and of every gradient of the first."""
    hidden = hidden.detach().requires_grad_()
    results = _results(case, layer, hidden, targets)
    if results[0].requires_grad:
        results[0].sum().backward()
    everything = [*results, hidden.grad, *(parameter.grad for parameter in layer.parameters())]
    return [None if result is None else (result.shape, result.dtype) for result in everything]


def _results(case: LayerCase, layer: OutputLayer, hidden: Tensor, targets: Tensor) -> Results:
    """The loss of a likelihood layer, and what every query gives."""
    values = (call(hidden) for call, _ in case.calls(layer, targets).values())
    return *values, layer.topk(hidden, 1).indices


def law_exports(case: LayerCase) -> None:
    """11. `torch.export` takes all queries and the loss, in one program for any number of rows.

    A sampled loss may refuse instead, by an error that names lastlayer; where it does not, it draws what it draws.
    """
    layer = case.build(reduction="sum")

    def queries(hidden: Tensor, targets: Tensor) -> Results:
        return _results(case, layer, hidden, targets)

    if case.likelihood:
        check_export(layer, queries)
        return
    try:
        check_export(layer, lambda hidden, targets: (layer(hidden, targets), *queries(hidden, targets)))
    except RuntimeError as refused:
        if "lastlayer" not in str(refused):
            raise
        check_export(layer, queries)


def check_export(layer: OutputLayer, call: Callable[[Tensor, Tensor], Results]) -> None:
    """The exported call gives what the call gives; traced with another number of rows than it is run with."""
    dynamic = {0: torch.export.Dim("rows", min=2, max=1 << 30)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own tracer
        example, shapes = rows_for(layer), ((dynamic, dynamic),)
        exported = torch.export.export(Call(layer, call), example, dynamic_shapes=shapes, strict=False).module()
    for count in (2, 11):
        rows = rows_for(layer, count)
        results = []
        for run in (exported, call):
            torch.manual_seed(count)  # a sampled loss draws
            results.append(run(*rows))
        assert_equal(*results, name=f"{count} rows")

"""The law of exported programs."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import LayerCase
from lastlayer.testing.rows import assert_equal, rows_for

Results = tuple[Tensor, ...]


def law_exports(case: LayerCase) -> None:
    """11. `torch.export` takes `log_prob`, `topk` and the loss, in one program for any number of rows.

    A sampled loss may refuse instead, by an error that names lastlayer; where it does not, it is finite.
    """
    layer = case.build(reduction="sum")
    if case.likelihood:
        _check(layer, lambda hidden, targets: (*_queries(layer, hidden), layer(hidden, targets)))
        return
    _check(layer, lambda hidden, targets: _queries(layer, hidden))
    try:
        loss = _exported(layer, lambda hidden, targets: (layer(hidden, targets),))
    except RuntimeError as refused:
        assert "lastlayer" in str(refused), refused
    else:
        assert bool(loss(*rows_for(layer, 5))[0].isfinite())


def _queries(layer: OutputLayer, hidden: Tensor) -> Results:
    best = layer.topk(hidden, min(2, layer.num_classes))
    return layer.log_prob(hidden), *best


def _check(layer: OutputLayer, call: Callable[[Tensor, Tensor], Results]) -> None:
    exported = _exported(layer, call)
    for count in (2, 11):
        rows = rows_for(layer, count)
        assert_equal(exported(*rows), call(*rows), name=f"{count} rows")


def _exported(layer: OutputLayer, call: Callable[[Tensor, Tensor], Results]) -> Callable[..., Results]:
    """The call as an exported program, traced with another number of rows than it is then run with."""
    rows = torch.export.Dim("rows", min=2, max=1 << 30)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own tracer
        program = torch.export.export(
            _Calls(layer, call), rows_for(layer), dynamic_shapes=({0: rows}, {0: rows}), strict=False
        )
        return program.module()


class _Calls(nn.Module):
    """A call of a layer as a module."""

    def __init__(self, layer: OutputLayer, call: Callable[[Tensor, Tensor], Results]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, hidden: Tensor, targets: Tensor) -> Results:
        return self.call(hidden, targets)

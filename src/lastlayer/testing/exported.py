"""The law of exported programs."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.layers.base import OutputLayer
from lastlayer.testing.cases import LayerCase
from lastlayer.testing.rows import Call, assert_equal, rows_for

Results = tuple[Tensor, ...]


def law_exports(case: LayerCase) -> None:
    """11. `torch.export` takes all queries and the loss, in one program for any number of rows.

    A sampled loss may refuse instead, by an error that names lastlayer; where it does not, it draws what it draws.
    """
    layer = case.build(reduction="sum")
    try:
        _check(layer, lambda hidden, targets: (layer(hidden, targets), *_queries(layer, hidden, targets)))
    except RuntimeError as refused:
        if case.likelihood or "lastlayer" not in str(refused):
            raise
        _check(layer, lambda hidden, targets: _queries(layer, hidden, targets))


def _queries(layer: OutputLayer, hidden: Tensor, targets: Tensor) -> Results:
    best = layer.topk(hidden, min(2, layer.num_classes))
    of_targets = layer.target_log_prob(hidden, targets), layer.score(hidden, targets[:, None])
    return layer.log_prob(hidden), *of_targets, *best


def _check(layer: OutputLayer, call: Callable[[Tensor, Tensor], Results]) -> None:
    exported = _exported(layer, call)
    for count in (2, 11):
        rows = rows_for(layer, count)
        results = []
        for run in (exported, call):
            torch.manual_seed(count)  # a sampled loss draws
            results.append(run(*rows))
        assert_equal(*results, name=f"{count} rows")


def _exported(layer: OutputLayer, call: Callable[[Tensor, Tensor], Results]) -> Callable[..., Results]:
    """The call as an exported program, traced with another number of rows than it is then run with."""
    rows = torch.export.Dim("rows", min=2, max=1 << 30)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own tracer
        program = torch.export.export(
            Call(layer, call), rows_for(layer), dynamic_shapes=(({0: rows}, {0: rows}),), strict=False
        )
        return program.module()

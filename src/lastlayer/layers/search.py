"""The best classes of a layer that need not look at all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from lastlayer.functional.best_classes import SearchCost, worth_searching
from lastlayer.functional.ordinary import readable
from lastlayer.functional.selection import Selection, topk_in_chunks
from lastlayer.layers.base import OutputLayer

# Maps some rows and the classes they may return to log-probabilities and classes, (n, k) each, and the rows that
# were given up.
Search = Callable[[Tensor, Selection | None], tuple[Tensor, Tensor, Tensor]]


def searched_topk(
    layer: OutputLayer, search: Search, cost: SearchCost, hidden: Tensor, k: int, selection: Selection | None
) -> tuple[Tensor, Tensor]:  # (N, k) each
    """The best classes by `search`, where that is worth it: no gradient flows through it, but through `_score` of
    what it found. Rows that it gives up, and all rows of a small problem, are computed from all log-probabilities,
    whose gradients are dense."""
    searching = worth_searching(cost, hidden.shape[0], layer.num_classes, layer.in_features, k)
    searching = searching and readable(hidden, *layer.parameters())
    if not searching and not (torch.is_grad_enabled() and layer.sparse_parameters()):
        return layer._dense_topk(layer._log_prob, hidden, k, selection)

    def of_chunk(rows: Tensor, own: Selection | None) -> tuple[Tensor, Tensor]:
        log_prob, indices, rest = search(rows, own)
        if len(rest):
            own = None if own is None else own.rows(rest)
            log_prob[rest], indices[rest] = layer._dense_topk(layer._log_prob, rows[rest], k, own)
        return log_prob, indices

    with torch.no_grad():
        if searching:
            found = topk_in_chunks(of_chunk, layer._row_chunks(hidden), selection)
        else:
            found = layer._dense_topk(layer._log_prob, hidden, k, selection)
    return layer._differentiable(hidden, *found)

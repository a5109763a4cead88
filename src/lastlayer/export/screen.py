"""A screen as a graph: preview, candidates, exact logits, certificate, and the full layer where it is needed."""

from collections.abc import Sequence

import torch

from lastlayer.export.graph import Graph
from lastlayer.export.head import INFINITY, HeadGraph
from lastlayer.export.previews import preview_scores
from lastlayer.screening.int8_preview import PreparedInt8
from lastlayer.screening.screen import MODERATE
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.screening.svd_preview import PreparedSVD

# Rows from which on the full layer is used: in ONNX Runtime the screen was the faster one for 32 rows, not for 64
# (benchmarks/results/onnx_export.json).
FULL_FROM = 48


def screen_graph(graph: Graph, screen: ScreenedSoftmax, hidden: str, k: int) -> list[str]:
    """`log_prob (n, k)`, `indices (n, k)`, `certified (n,)` of `hidden (n, d)`, as `screen.topk` computes them."""
    prepared = screen._prepared
    if not isinstance(prepared, PreparedInt8 | PreparedSVD):
        raise TypeError(
            "screen_or_layer must have an Int8Preview or an SVDPreview to be exported, this screen has "
            f"{type(screen.preview).__name__}"
        )
    head = HeadGraph(graph, screen.weight, screen.bias, screen.logit_map)
    if screen.use == "full":
        return head.full(hidden, k)
    return graph.choose(
        graph.add("GreaterOrEqual", graph.add("Gather", graph.add("Shape", hidden), 0), full_from(screen)),
        lambda: head.full(hidden, k),
        lambda: _screened(graph, screen, prepared, head, hidden, k),
    )


def full_from(screen: ScreenedSoftmax) -> int:
    """The number of rows from which on the graph computes the full layer.

    At the latest where gathering the candidates' rows would move more numbers than the full layer reads.
    """
    most = -(-screen.out_features // screen.candidates)
    return most if screen.use == "screen" else min(most, FULL_FROM)


def _screened(
    graph: Graph,
    screen: ScreenedSoftmax,
    prepared: PreparedInt8 | PreparedSVD,
    head: HeadGraph,
    hidden: str,  # (n, d)
    k: int,
) -> list[str]:
    """The screen, and the full layer for the rows that it does not prove, where `screen.exact`."""
    norm = graph.add("ReduceL2", graph.cast(hidden, torch.float64), [1])
    scores, of_rows = preview_scores(graph, prepared, hidden, norm)
    _, chosen = graph.add_all("TopK", scores, [screen.candidates], outputs=2, axis=1, sorted=0)
    exact = head.logits_at(hidden, chosen)
    values, places = graph.add_all("TopK", exact, [k], outputs=2, axis=1)
    indices = head.named(values, graph.add("GatherElements", chosen, places, axis=1))

    certified = _certified(
        graph, screen, scores, of_rows, norm, chosen, graph.add("Gather", values, [k - 1], axis=1)
    )
    shift = prepared.normalizer_shift
    others = scores if shift is None else graph.add("Add", scores, shift)
    logits = graph.add("ScatterElements", others, chosen, exact, axis=1)
    found = [head.log_prob(logits, indices), indices, certified]
    return _with_full_rows(graph, head, hidden, k, found) if screen.exact else found


def _certified(
    graph: Graph,
    screen: ScreenedSoftmax,
    scores: str,  # (n, V)
    of_rows: str,  # (n, m)
    norm: str,  # (n, 1)
    chosen: str,  # (n, C)
    kth: str,  # (n, 1), the k-th best exact logit
) -> str:  # (n,), bool
    """Whether no other class's logit can reach `kth`, and no number of the row can overflow or is NaN."""
    upper = graph.add("Gemm", of_rows, screen._prepared.of_classes, scores)  # scores and the bound on their error
    nothing = graph.add("Expand", -INFINITY, graph.add("Shape", chosen))
    upper = graph.add("ScatterElements", upper, chosen, nothing, axis=1)
    highest = graph.add("ReduceMax", upper, [1])
    below = graph.add("Or", graph.add("Less", highest, kth), graph.add("Equal", highest, -INFINITY))

    limits = screen._limits
    most = graph.add("Mul", norm, torch.tensor(limits.norm, dtype=torch.float64))
    of_bound = graph.add("MatMul", graph.cast(of_rows, torch.float64), limits.of_terms[:, None])
    most = graph.add("Add", graph.add("Add", most, torch.tensor(limits.bias, dtype=torch.float64)), of_bound)
    limit = torch.tensor(MODERATE[graph.dtype], dtype=torch.float64)
    moderate = graph.add("And", graph.add("Less", norm, limit), graph.add("Less", most, limit))
    return graph.add("Squeeze", graph.add("And", below, moderate), [1])


def _with_full_rows(graph: Graph, head: HeadGraph, hidden: str, k: int, found: Sequence[str]) -> list[str]:
    """`found`, and in its place the full layer's result for the rows that are not certified, if there are any."""
    log_prob, indices, certified = found
    open_rows = graph.add("Not", certified)
    any_open = graph.add("Greater", graph.add("ReduceSum", graph.cast(open_rows, torch.int64), keepdims=0), 0)

    def full_rows() -> list[str]:
        at = graph.add("Transpose", graph.add("NonZero", open_rows), perm=[1, 0])  # (m, 1)
        part = head.full(graph.add("GatherND", hidden, at), k)
        return [graph.add("ScatterND", whole, at, own) for whole, own in zip(found, part, strict=True)]

    return graph.choose(any_open, full_rows, lambda: [log_prob, indices, certified])

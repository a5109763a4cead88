"""The previews as graphs: approximate scores of all classes, and the rows' part of the bound on their error."""

import torch
from torch import Tensor

from lastlayer.export.graph import Graph
from lastlayer.kernels.screening import WHOLE
from lastlayer.screening.exact import rounding_share
from lastlayer.screening.int8_preview import PreparedInt8
from lastlayer.screening.quantised import LEAST_STEP, Int8Rows
from lastlayer.screening.svd_preview import PreparedSVD

# A hidden state is `step * (128 high + low)` with whole |high|, |low| <= 64. They are stored as unsigned numbers,
# in which ZERO_POINT stands for 0: processors without VNNI add two products of an unsigned and a signed number in
# 16 bits, which saturate above 32,767, and 2 * 128 * 127 does not reach that.
ZERO_POINT = 64


def preview_scores(
    graph: Graph,
    prepared: PreparedInt8 | PreparedSVD,
    hidden: str,  # (n, d)
    norm: str,  # (n, 1), float64, of hidden
) -> tuple[str, str]:
    """Scores `(n, V)`, bias included, and the rows' part of the error bound `(n, m)`, as of `prepared`."""
    vectors = graph.cast(hidden, torch.float64)
    if isinstance(prepared, PreparedSVD):
        return _svd(graph, prepared, hidden, vectors, norm)
    scores, left_over = _integer_product(graph, prepared.rows, vectors, prepared.bias)
    ones = graph.add("Expand", _double(1), graph.add("Shape", norm))
    return scores, _of_rows(graph, norm, left_over, ones)


def _svd(graph: Graph, prepared: PreparedSVD, hidden: str, vectors: str, norm: str) -> tuple[str, str]:
    window = graph.add("MatMul", vectors, prepared.to_head.T)
    stored = [graph.add("ReduceL2", window, [1])]
    if isinstance(prepared.rows, Int8Rows):
        scores, left_over = _integer_product(graph, prepared.rows, window, prepared.bias)
        stored.append(left_over)
    else:
        columns = graph.constant("preview", prepared.rows.columns.to(prepared.dtype))
        scores = graph.add("Gemm", graph.cast(window, graph.dtype), columns, prepared.bias)
    dropped = graph.add("ReduceL2", graph.add("MatMul", hidden, prepared.to_tail.T), [1])
    rounded = graph.add("Mul", norm, _double(prepared.tail_rounding))
    tail = graph.add("Add", graph.cast(dropped, torch.float64), rounded)
    share = rounding_share(prepared.to_head.shape[1], prepared.dtype)
    rounding = graph.add("Mul", graph.add("Add", norm, _double(1)), _double(share))
    return scores, _of_rows(graph, *stored, tail, rounding)


def _integer_product(
    graph: Graph,
    rows: Int8Rows,
    vectors: str,  # (n, w), float64
    bias: Tensor,  # (V,)
) -> tuple[str, str]:
    """`vectors @ rows.T + bias (n, V)`, rounded, and the norms `(n, 1)` of the vectors' rounding."""
    most = graph.add("ReduceMax", graph.add("Abs", vectors), [1])
    step = graph.add("Max", graph.add("Div", most, _double(WHOLE)), _double(LEAST_STEP))
    step = graph.cast(graph.cast(step, torch.float32), torch.float64)
    number = graph.add("Round", graph.add("Div", vectors, step))
    high = graph.add("Round", graph.add("Div", number, _double(128)))
    low = graph.add("Sub", number, graph.add("Mul", high, _double(128)))
    left_over = graph.add("ReduceL2", graph.add("Sub", vectors, graph.add("Mul", number, step)), [1])

    # each row's high part, then its low part: (n, 2 w) to (2 n, w)
    columns = rows.columns()
    parts = graph.add("Reshape", graph.add("Concat", high, low, axis=1), [-1, len(columns)])
    unsigned = graph.cast(graph.add("Add", parts, _double(ZERO_POINT)), torch.uint8)
    zero_point = torch.tensor(ZERO_POINT, dtype=torch.uint8)
    products = graph.add("MatMulInteger", unsigned, graph.constant("preview", columns), zero_point)
    # (n, 1, 2) @ (n, 2, V): step * (128 high + low)
    products = graph.add("Reshape", graph.cast(products, graph.dtype), [-1, 2, columns.shape[1]])
    steps = graph.add("Concat", graph.add("Mul", step, _double(128)), step, axis=1)
    steps = graph.add("Unsqueeze", graph.cast(steps, graph.dtype), [1])
    whole = graph.add("Squeeze", graph.add("MatMul", steps, products), [1])
    return graph.add("Add", graph.add("Mul", whole, rows.scale.to(graph.dtype)), bias), left_over


def _of_rows(graph: Graph, *terms: str) -> str:  # (n, 1) each, float64, to (n, m)
    return graph.cast(graph.add("Concat", *terms, axis=1), graph.dtype)


def _double(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)

"""A screen and the full layer as graphs: what `lastlayer.screening.screen` computes, by ONNX operators."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lastlayer.export.graph import Graph
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.precision import exact_dtype
from lastlayer.kernels.screening import WHOLE
from lastlayer.screening.exact import rounding_share
from lastlayer.screening.int8_preview import PreparedInt8
from lastlayer.screening.quantised import LEAST_STEP, Int8Rows
from lastlayer.screening.screen import MODERATE
from lastlayer.screening.screened import ScreenedSoftmax
from lastlayer.screening.svd_preview import PreparedSVD

INFINITY = float("inf")

# Rows from which on the full layer is used: in ONNX Runtime the screen was the faster one for 32 rows, not for 64
# (benchmarks/results/onnx_export.json).
FULL_FROM = 48

# A hidden state is `step * (128 high + low)` with whole |high|, |low| <= 64. They are stored as unsigned numbers,
# in which ZERO_POINT stands for 0: processors without VNNI add two products of an unsigned and a signed number in
# 16 bits, which saturate above 32,767, and 2 * 128 * 127 does not reach that.
ZERO_POINT = 64


class HeadGraph:
    """A matrix, its bias and its logit map as constants of a graph, and the nodes that query them."""

    def __init__(
        self,
        graph: Graph,
        weight: Tensor,  # (V, d); half precision is stored as the float32 numbers it stands for
        bias: Tensor | None,  # (V,)
        logit_map: nn.Module | None,
    ) -> None:
        assert logit_map is None or isinstance(logit_map, LogitMap)
        self.graph, self.logit_map = graph, logit_map
        dtype = exact_dtype(weight.dtype)
        self.weight = graph.constant("weight", weight.to(dtype))
        self.bias = None if bias is None else graph.constant("bias", bias.to(dtype))
        self.bars = bias is not None and bool(bias.isinf().any())

    def full(self, hidden: str, k: int) -> list[str]:
        """`log_prob (n, k)`, `indices (n, k)`, and whether a row's normaliser is finite `(n,)`."""
        graph = self.graph
        logits = graph.add("Gemm", hidden, self.weight, self.bias, transB=1)
        values, indices = graph.add_all("TopK", logits, [k], outputs=2, axis=1)
        log_prob = self.log_prob(logits, indices)
        best = graph.add("Gather", log_prob, 0, axis=1)  # NaN or infinite where the normaliser is
        finite = graph.add("Less", graph.add("Abs", best), INFINITY)
        return [log_prob, self.named(values, indices), finite]

    def log_prob(self, logits: str, classes: str) -> str:  # (n, V), (n, k) to (n, k)
        """The log-probabilities of some classes of each row."""
        mapped = logits
        if self.logit_map is not None:
            mapped = self.logit_map.to_graph(self.graph, logits)
            if self.bars:
                barred = self.graph.add("Equal", logits, -INFINITY)
                mapped = self.graph.add("Where", barred, logits, mapped)
        every = self.graph.add("LogSoftmax", mapped, axis=1)
        return self.graph.add("GatherElements", every, classes, axis=1)

    def logits_at(self, hidden: str, classes: str) -> str:  # (n, d), (n, C) to (n, C)
        """The logits of some classes of each row, from the weight's own rows."""
        graph = self.graph
        rows = graph.add("Gather", self.weight, classes)
        logits = graph.add("Squeeze", graph.add("MatMul", rows, graph.add("Unsqueeze", hidden, [2])), [2])
        return logits if self.bias is None else graph.add("Add", logits, graph.add("Gather", self.bias, classes))

    def named(self, values: str, classes: str) -> str:
        """-1 for a class whose logit is -inf: it is barred."""
        if not self.bars:
            return classes
        return self.graph.add("Where", self.graph.add("Equal", values, -INFINITY), -1, classes)


class ScreenGraph:
    """A screen's preview and bounds as constants of a graph, and the nodes that query it."""

    def __init__(self, graph: Graph, screen: ScreenedSoftmax) -> None:
        prepared = screen._prepared
        if not isinstance(prepared, PreparedInt8 | PreparedSVD):
            raise TypeError(
                "screen_or_layer must have an Int8Preview or an SVDPreview to be exported, this screen has "
                f"{type(screen.preview).__name__}"
            )
        self.graph, self.screen, self.prepared = graph, screen, prepared
        self.head = HeadGraph(graph, screen.weight, screen.bias, screen.logit_map)

    def topk(self, hidden: str, k: int) -> list[str]:
        """`log_prob (n, k)`, `indices (n, k)`, `certified (n,)` of `hidden (n, d)`, as `screen.topk` has them."""
        if self.screen.use == "full":
            return self.head.full(hidden, k)
        most = -(-self.screen.out_features // self.screen.candidates)  # then the gathered rows are more than all
        full_from = most if self.screen.use == "screen" else min(most, FULL_FROM)
        rows = self.graph.add("Gather", self.graph.add("Shape", hidden), 0)
        is_large = self.graph.add("GreaterOrEqual", rows, full_from)
        return self.graph.choose(is_large, lambda: self.head.full(hidden, k), lambda: self._screened(hidden, k))

    def _screened(self, hidden: str, k: int) -> list[str]:
        """The screen, and the full layer for the rows that it does not prove, where `screen.exact`."""
        graph, head = self.graph, self.head
        norm = graph.add("ReduceL2", graph.cast(hidden, torch.float64), [1])
        scores, of_rows = self._scores(hidden, norm)
        _, chosen = graph.add_all("TopK", scores, [self.screen.candidates], outputs=2, axis=1, sorted=0)
        exact = head.logits_at(hidden, chosen)
        values, places = graph.add_all("TopK", exact, [k], outputs=2, axis=1)
        indices = head.named(values, graph.add("GatherElements", chosen, places, axis=1))
        kth = graph.add("Gather", values, [k - 1], axis=1)
        certified = graph.add("And", self._below(scores, of_rows, chosen, kth), self._moderate(norm, of_rows))
        logits = graph.add("ScatterElements", scores, chosen, exact, axis=1)
        found = [head.log_prob(logits, indices), indices, graph.add("Squeeze", certified, [1])]
        return self._with_full_rows(hidden, k, found) if self.screen.exact else found

    def _scores(self, hidden: str, norm: str) -> tuple[str, str]:
        """Scores `(n, V)`, bias included, and the rows' part of the error bound `(n, m)`, as of `prepared`."""
        graph, prepared = self.graph, self.prepared
        vectors = graph.cast(hidden, torch.float64)
        if isinstance(prepared, PreparedInt8):
            scores, left_over = self._integer_product(prepared.rows, vectors)
            terms = [norm, left_over, graph.add("Expand", _double(1), graph.add("Shape", norm))]
        else:
            window = graph.add("MatMul", vectors, prepared.to_head.T)
            terms = [graph.add("ReduceL2", window, [1])]
            if isinstance(prepared.rows, Int8Rows):
                scores, left_over = self._integer_product(prepared.rows, window)
                terms.append(left_over)
            else:
                columns = graph.constant("preview", prepared.rows.columns.to(prepared.dtype))
                scores = graph.add("Gemm", graph.cast(window, graph.dtype), columns, prepared.bias)
            dropped = graph.add("ReduceL2", graph.add("MatMul", hidden, prepared.to_tail.T), [1])
            rounded = graph.add("Mul", norm, _double(prepared.tail_rounding))
            share = rounding_share(prepared.to_head.shape[1], prepared.dtype)
            terms.append(graph.add("Add", graph.cast(dropped, torch.float64), rounded))
            terms.append(graph.add("Mul", graph.add("Add", norm, _double(1)), _double(share)))
        return scores, graph.cast(graph.add("Concat", *terms, axis=1), graph.dtype)

    def _integer_product(self, rows: Int8Rows, vectors: str) -> tuple[str, str]:  # vectors (n, w), float64
        """`vectors @ rows.T + bias (n, V)`, rounded, and the norms `(n, 1)` of the rounding."""
        graph = self.graph
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
        scaled = graph.add("Mul", whole, rows.scale.to(graph.dtype))
        return graph.add("Add", scaled, self.prepared.bias), left_over

    def _below(self, scores: str, of_rows: str, chosen: str, kth: str) -> str:  # (n, 1), bool
        """Whether no class that is not chosen can reach `kth (n, 1)`, the k-th best exact logit."""
        graph = self.graph
        upper = graph.add("Gemm", of_rows, self.prepared.of_classes, scores)  # scores and the bound on their error
        nothing = graph.add("Expand", -INFINITY, graph.add("Shape", chosen))
        upper = graph.add("ScatterElements", upper, chosen, nothing, axis=1)
        highest = graph.add("ReduceMax", upper, [1])
        return graph.add("Or", graph.add("Less", highest, kth), graph.add("Equal", highest, -INFINITY))

    def _moderate(self, norm: str, of_rows: str) -> str:  # (n, 1), bool
        """Whether no number of a row can overflow or is NaN, as `Limits.moderate`."""
        graph, limits = self.graph, self.screen._limits
        of_bound = graph.add("MatMul", graph.cast(of_rows, torch.float64), limits.of_terms[:, None])
        most = graph.add("Add", graph.add("Mul", norm, _double(limits.norm)), _double(limits.bias))
        limit = _double(MODERATE[graph.dtype])
        is_below = graph.add("Less", graph.add("Add", most, of_bound), limit)
        return graph.add("And", graph.add("Less", norm, limit), is_below)

    def _with_full_rows(self, hidden: str, k: int, found: Sequence[str]) -> list[str]:
        """`found`, and in its place the full layer's result for rows that are not certified, if there are any."""
        graph = self.graph
        open_rows = graph.add("Not", found[2])
        count = graph.add("ReduceSum", graph.cast(open_rows, torch.int64), keepdims=0)

        def full_rows() -> list[str]:
            at = graph.add("Transpose", graph.add("NonZero", open_rows), perm=[1, 0])  # (m, 1)
            part = self.head.full(graph.add("GatherND", hidden, at), k)
            return [graph.add("ScatterND", whole, at, own) for whole, own in zip(found, part, strict=True)]

        return graph.choose(graph.add("Greater", count, 0), full_rows, lambda: found)


def _double(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)

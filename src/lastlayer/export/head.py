"""The full layer as a graph: logits of all classes, the best of them, their log-probabilities."""

from torch import Tensor, nn

from lastlayer.export.graph import Graph
from lastlayer.functional.logit_map import LogitMap
from lastlayer.functional.precision import exact_dtype

INFINITY = float("inf")


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
        every = self.graph.add("LogSoftmax", self._mapped(logits), axis=1)
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

    def _mapped(self, logits: str) -> str:
        if self.logit_map is None:
            return logits
        mapped = self.logit_map.to_graph(self.graph, logits)
        if not self.bars:
            return mapped
        return self.graph.add("Where", self.graph.add("Equal", logits, -INFINITY), logits, mapped)

"""A logit map that keeps every logit between two bounds (as Gemma 2 does)."""

from typing import Any

import torch
from torch import Tensor

from lastlayer.functional.checks import check_above_zero
from lastlayer.functional.logit_map import GraphBuilder, LogitMap
from lastlayer.kernels.softmax_rows import KernelMap


class SoftCap(LogitMap):
    """`f(x) = cap * tanh(x / cap)`: nearly the identity for small logits, never beyond `±cap`.

    Keeps a few huge logits from dominating the loss. Not for a model that needs probabilities near 1: no
    probability can exceed `1 / (1 + (V - 1) exp(-2 cap))`.

    Args:
        cap: the bound; positive and finite.

    Raises:
        ValueError: a cap that is not.

    >>> import torch
    >>> SoftCap(30.0)(torch.tensor([0.1, 1000.0]))
    tensor([ 0.1000, 30.0000])
    """

    increases = True  # no check on a grid is needed

    def __init__(self, cap: float) -> None:
        super().__init__()
        self.cap = float(check_above_zero("cap", cap))

    def forward(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / self.cap) * self.cap

    def derivative(self, logits: Tensor) -> Tensor:
        return 1 - torch.tanh(logits / self.cap).square()

    def inverse(self, values: Tensor) -> Tensor:
        return torch.atanh(values / self.cap) * self.cap

    def vjp(self, logits: Tensor, gradient: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        return gradient * self.derivative(logits), ()

    def kernel_map(self) -> KernelMap:
        return KernelMap("soft_cap", (self.cap,))

    def to_graph(self, graph: GraphBuilder, logits: str) -> str:
        return graph.add("Mul", graph.add("Tanh", graph.add("Div", logits, self.cap)), self.cap)

    def settings(self) -> dict[str, Any]:
        return {"cap": self.cap}

    def extra_repr(self) -> str:
        return f"cap={self.cap:g}"

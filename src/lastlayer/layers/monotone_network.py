"""A one-layer network with positive weights as a logit map (Daniels & Velikova 2010)."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer.functional.checks import check_positive
from lastlayer.functional.logit_map import GraphBuilder, LogitMap, apply_map, in_blocks

BLOCK_NUMBERS = 1 << 20  # of the (logits, units) matrix that exists at once
REACH = 10.0  # the units' centres start spread over [-REACH, REACH]


class MonotoneNetwork(LogitMap):
    """`f(x) = a x + Σ_k v_k sigmoid(u_k x + b_k)` with `a, u, v > 0` (softplus of parameters): smooth, unbounded.

    Any increasing function can be approached with enough units, but each logit costs `hidden_units` exponentials:
    PLIF is as flexible and much cheaper. The linear term keeps the image unbounded, without which no class could
    become certain. Memory is that of the logits: the (logits, units) matrix exists a block at a time, in the
    backward pass too.

    Args:
        hidden_units: K.

    Raises:
        ValueError: K below 1.

    Source: Daniels & Velikova, "Monotone and Partially Monotone Neural Networks", IEEE TNN 2010; as a logit map in
    Ganea et al., ICML 2019.

    >>> import torch
    >>> values = MonotoneNetwork(10)(torch.linspace(-30, 30, 7))
    >>> bool((values.diff() > 0).all())
    True
    """

    def __init__(self, hidden_units: int) -> None:
        super().__init__()
        self.hidden_units = check_positive("hidden_units", hidden_units)
        self.raw_slope = nn.Parameter(torch.empty(1))  # FSDP takes no scalar
        self.raw_rates = nn.Parameter(torch.empty(hidden_units))
        self.shifts = nn.Parameter(torch.empty(hidden_units))
        self.raw_heights = nn.Parameter(torch.empty(hidden_units))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Slope and rates of 1, heights of 1 / K, and centres spread evenly."""
        one = math.log(math.e - 1)  # softplus gives 1
        self.raw_slope.fill_(one)
        self.raw_rates.fill_(one)
        K = self.hidden_units
        self.shifts.copy_(-torch.linspace(-REACH, REACH, K) if K > 1 else torch.zeros(1))
        self.raw_heights.fill_(math.log(math.expm1(1 / K)))

    def forward(self, logits: Tensor) -> Tensor:
        return apply_map(self, logits)

    def plain(self, logits: Tensor) -> Tensor:
        slope, rates, shifts, heights = self._positive(logits.dtype)
        return slope * logits + torch.sigmoid(logits[..., None] * rates + shifts) @ heights

    @torch.no_grad()
    def evaluate(self, logits: Tensor) -> Tensor:
        slope, rates, shifts, heights = self._positive(logits.dtype)
        values = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for x, out in in_blocks(self._block, logits, values):
            torch.addmv(slope * x, torch.sigmoid(self._inputs(x, rates, shifts)), heights, out=out)
        return values

    @torch.no_grad()
    def vjp(self, logits: Tensor, gradient: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """With σ_k the units and `τ_k = σ_k (1 - σ_k)`, sums over logits x with gradient g of f(x):

        ∂x = g (a + Σ v_k u_k τ_k)    ∂a = Σ g x    ∂u_k = v_k Σ g τ_k x    ∂b_k = v_k Σ g τ_k    ∂v_k = Σ g σ_k
        """
        slope, rates, shifts, heights = self._positive(logits.dtype)
        of_slope = logits.new_zeros((), dtype=torch.float64)
        of_rates, of_shifts, of_heights = logits.new_zeros(3, self.hidden_units, dtype=torch.float64)
        of_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for x, g, out in in_blocks(self._block, logits, gradient, of_logits):
            unit = torch.sigmoid(self._inputs(x, rates, shifts))
            of_slope += g @ x
            of_heights += unit.T @ g
            bend = unit.mul_(1 - unit)
            of_shifts += bend.T @ g
            of_rates += bend.T @ (g * x)
            torch.mul(bend @ (rates * heights) + slope, g, out=out)
        of_parameters = (
            of_slope * torch.sigmoid(self.raw_slope),
            of_rates * heights * torch.sigmoid(self.raw_rates),
            of_shifts * heights,
            of_heights * torch.sigmoid(self.raw_heights),
        )
        return of_logits, tuple(
            part.to(p.dtype) if p.requires_grad else None
            for part, p in zip(of_parameters, self.parameters(), strict=True)
        )

    def to_graph(self, graph: GraphBuilder, logits: str) -> str:
        """Unit by unit: the (logits, units) matrix does not exist."""
        slope, *of_units = (part.detach().tolist() for part in self._positive(graph.dtype))
        total = graph.add("Mul", logits, slope[0])
        for rate, shift, height in zip(*of_units, strict=True):
            unit = graph.add("Sigmoid", graph.add("Add", graph.add("Mul", logits, rate), shift))
            total = graph.add("Add", total, graph.add("Mul", unit, height))
        return total

    def settings(self) -> dict[str, Any]:
        return {"hidden_units": self.hidden_units}

    def extra_repr(self) -> str:
        return f"hidden_units={self.hidden_units}"

    def _positive(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`a`, `u`, `b`, `v` in the dtype of the logits."""
        slope, rates, heights = (
            F.softplus(raw.to(dtype)) for raw in (self.raw_slope, self.raw_rates, self.raw_heights)
        )
        return slope, rates, self.shifts.to(dtype), heights

    @property
    def _block(self) -> int:
        return max(1, BLOCK_NUMBERS // self.hidden_units)

    @staticmethod
    def _inputs(x: Tensor, rates: Tensor, shifts: Tensor) -> Tensor:  # (n, K)
        return torch.addcmul(shifts, x[:, None], rates)

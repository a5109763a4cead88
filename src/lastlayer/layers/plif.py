"""PLIF (Ganea et al. 2019): a learned increasing function of one logit, piecewise linear."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lastlayer.functional.checks import check_above_zero, check_not_negative, check_positive
from lastlayer.functional.logit_map import GraphBuilder, LogitMap, MapPass, apply_map, in_blocks
from lastlayer.functional.ordinary import eager_on_cpu
from lastlayer.kernels.softmax_rows import KernelMap

BLOCK = 1 << 19  # logits looked up at once
UNIT = math.log(math.e - 1)  # softplus(UNIT) is 1
INT32 = 6  # as ONNX numbers its types


class PLIF(LogitMap):
    """A continuous, increasing, piecewise linear `f`, learned: as cheap as the softmax, of a higher rank.

    With T the bound, K segments of width `δ = 2T / K`, their left ends `l_k = -T + k δ` and slopes
    `s_k = softplus(w_k + ln(e - 1))`, w being `raw_slopes`:

        i = clamp(floor((x + T) / δ), 0, K - 1)        f(x) = s_i (x - l_i) + δ Σ_{j<i} s_j

    Beyond the bound it goes on with the first and the last slope: logits are extrapolated, not clipped.
    With g the gradient of f(x), forward and backward are lookups, so K costs nothing a logit:

        ∂x = g s_i        ∂s_k = A_k + δ Σ_{j>k} B_j,  A_k = Σ_{i=k} g (x - l_k),  B_k = Σ_{i=k} g

    In float32 it stays accurate to 5e-5 at 100,000 knots, since sums over the K segments, the prefix sums of the
    slopes and those of the gradient, are in float64; only operations on a single logit are in float32.

    Exclude `raw_slopes` from weight decay; it needs a learning rate of its own (the papers: 0.02).
    On a GPU under `torch.use_deterministic_algorithms(True)` the sums use `index_add_`, which is deterministic.

    Useful where the width is far below the rank that the data need, as in the synthetic experiment of
    `lastlayer reproduce softmax-bottleneck`. For language models the replication found a frozen random one as good
    as a learned one, and both a fraction of a perplexity point below the softmax.

    Args:
        num_knots: K.
        bound: T.
        init_std: of the noise on `w`; 0: every slope is 1, and the model starts as the plain softmax.
        frozen: keep the slopes as they are drawn.

    Raises:
        ValueError: sizes that are not positive, a negative `init_std`.

    Source: Ganea, Gelly, Bécigneul, Severyn, "Breaking the Softmax Bottleneck via Learnable Monotonic Pointwise
    Non-linearities", ICML 2019.

    >>> import torch, lastlayer
    >>> layer = lastlayer.FullSoftmax(16, 1000, logit_map=lastlayer.PLIF(num_knots=100, bound=20.0))
    >>> layer(torch.randn(4, 16), torch.randint(1000, (4,))).backward()
    >>> layer.logit_map.raw_slopes.grad.shape
    torch.Size([100])
    """

    def __init__(
        self, num_knots: int = 100_000, bound: float = 20.0, *, init_std: float = 0.0, frozen: bool = False
    ) -> None:
        super().__init__()
        self.num_knots = check_positive("num_knots", num_knots)
        self.bound = float(check_above_zero("bound", bound))
        check_not_negative("init_std", init_std)
        self.init_std = init_std
        self.raw_slopes = nn.Parameter(torch.empty(self.num_knots), requires_grad=not frozen)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Slopes of 1, with noise of `init_std` on `w`."""
        self.raw_slopes.copy_(self.init_std * torch.randn(self.num_knots))

    @property
    def slopes(self) -> Tensor:  # (K,) float64
        """The slopes, all positive; of `raw_slopes` 0 exactly 1."""
        return F.softplus(self.raw_slopes.double() + UNIT)

    def forward(self, logits: Tensor) -> Tensor:
        return apply_map(self, logits)

    def plain(self, logits: Tensor) -> Tensor:
        slopes, offsets = self.lines().to(logits.dtype).unbind(1)
        knots, _ = self.knots(logits.detach().reshape(-1))
        lines = (part.index_select(0, knots).reshape(logits.shape) for part in (slopes, offsets))
        return next(lines) * logits + next(lines)

    def begin(self) -> "PLIFPass":
        return PLIFPass(self)

    def evaluate(self, logits: Tensor) -> Tensor:
        return self.begin().values(logits)

    @torch.no_grad()
    def inverse(self, values: Tensor) -> Tensor:
        lines = self.lines()
        ends = self._left_ends()
        at_ends = lines[:, 0] * ends + lines[:, 1]
        wide = values.double()
        knots = (torch.searchsorted(at_ends, wide.contiguous(), right=True) - 1).clamp(0, self.num_knots - 1)
        return ((wide - lines[:, 1][knots]) / lines[:, 0][knots]).to(values.dtype)

    def vjp(self, logits: Tensor, gradient: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        once = self.begin()
        return once.back(logits, gradient), once.gradients()

    @torch.no_grad()
    def kernel_map(self) -> KernelMap:
        return KernelMap("plif", (self.bound, self.width), self.lines().float())

    def to_graph(self, graph: GraphBuilder, logits: str) -> str:
        at = graph.add("Mul", graph.add("Add", logits, self.bound), 1 / self.width)
        knots = graph.add("Cast", graph.add("Clip", at, 0.0, float(self.num_knots - 1)), to=INT32)
        slopes, offsets = (
            graph.add("Gather", part.to(graph.dtype), knots) for part in self.lines().detach().unbind(1)
        )
        return graph.add("Add", graph.add("Mul", slopes, logits), offsets)

    def settings(self) -> dict[str, Any]:
        return {
            "num_knots": self.num_knots,
            "bound": self.bound,
            "frozen": not self.raw_slopes.requires_grad,
        }

    def extra_repr(self) -> str:
        frozen = "" if self.raw_slopes.requires_grad else ", frozen=True"
        return f"num_knots={self.num_knots}, bound={self.bound:g}{frozen}"

    @property
    def width(self) -> float:
        """δ, of a segment."""
        return 2 * self.bound / self.num_knots

    def _left_ends(self) -> Tensor:  # (K,) float64
        steps = torch.arange(self.num_knots, dtype=torch.float64, device=self.raw_slopes.device)
        return steps.mul_(self.width).sub_(self.bound)

    def lines(self) -> Tensor:  # (K, 2) float64
        """`f(x) = line[0] x + line[1]` on each segment."""
        slopes = self.slopes
        before = slopes.cumsum(0) - slopes
        return torch.stack([slopes, before * self.width - self._left_ends() * slopes], 1)

    def knots(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The segments of some logits, int32; and where on the grid they are, a new tensor, at least float32."""
        wide = torch.promote_types(flat.dtype, torch.float32)  # half precision counts to 256 or 2048 only
        at = (flat.to(wide) + self.bound).mul_(1 / self.width)
        # nan must not become an index; it is still in the logit that the line is taken at.
        return at.nan_to_num(0.0).clamp_(0, self.num_knots - 1).int(), at


class PLIFPass(MapPass):
    """A PLIF over many logits: its lines are computed once, and the sums become a gradient once."""

    logit_map: PLIF

    def __init__(self, logit_map: PLIF) -> None:
        super().__init__(logit_map)
        self.lines: Tensor | None = None  # (2, K) in the dtype of the logits
        self.sums: Tensor | None = None  # (2, K) float64: A_k / δ and B_k

    # `with`, not the decorator: `torch.compile` cannot call a decorated method of an object made in its graph.

    def values(self, logits: Tensor) -> Tensor:
        with torch.no_grad():
            slopes, offsets = self._lines(logits.dtype)
            values = torch.empty_like(logits, memory_format=torch.contiguous_format)
            for x, out in in_blocks(BLOCK, logits, values):
                knots, _ = self.logit_map.knots(x)
                torch.addcmul(offsets.index_select(0, knots), slopes.index_select(0, knots), x, out=out)
            return values

    def back(self, logits: Tensor, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            slopes, _ = self._lines(logits.dtype)
            counted = self.logit_map.raw_slopes.requires_grad
            if counted and self.sums is None:
                self.sums = torch.zeros(2, self.logit_map.num_knots, dtype=torch.float64, device=logits.device)
            of_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
            for x, g, out in in_blocks(BLOCK, logits, gradient, of_logits):
                knots, at = self.logit_map.knots(x)
                torch.mul(slopes.index_select(0, knots), g, out=out)
                if counted and self.sums is not None:
                    _count(self.sums[0], knots, (g * at.sub_(knots)).double())
                    _count(self.sums[1], knots, g.double())
            return of_logits

    def add_sums(self, sums: Tensor) -> None:
        self.sums = sums.T if self.sums is None else self.sums.add_(sums.T)

    def gradients(self) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            if self.sums is None:
                return super().gradients()
            inside, whole = self.sums
            raw = self.logit_map.raw_slopes
            beyond = whole.sum() - whole.cumsum(0)  # Σ_{j>k} B_j
            of_raw = beyond.add_(inside).mul_(self.logit_map.width).mul_(torch.sigmoid(raw.double() + UNIT))
            return (of_raw.to(raw.dtype),)

    def _lines(self, dtype: torch.dtype) -> Tensor:
        if self.lines is None:
            self.lines = self.logit_map.lines().T.to(dtype).contiguous()
        return self.lines


def _count(sums: Tensor, knots: Tensor, weights: Tensor) -> None:
    """Adds each weight to the sum at its knot; deterministic on a GPU too, where that is requested."""
    if eager_on_cpu(sums):
        sums += torch.bincount(knots, weights, len(sums))
    else:
        sums.index_add_(0, knots, weights)
